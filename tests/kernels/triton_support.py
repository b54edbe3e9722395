"""The table of layouts and settings that the Triton kernels are tested with, and the comparisons."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, ScaleFormat, Scheme
from coreai_kernels.types import grid_shape
from tests.kernels.support import SPECIAL, assert_same_bits, assert_same_memory_format

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass(frozen=True)
class Layout:
    """Shape, blocks and strides of an input."""

    name: str
    shape: tuple[int, ...]
    block_size: tuple[int, ...]
    strides: str = "contiguous"
    specials: bool = True

    def tensor(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensor:
        """Normal values, one in 16 NaN, infinite, signed zero, subnormal or huge, but in few blocks."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator) * 3
        if self.specials and x.numel() >= 32:
            count = max(1, x.numel() // 16)
            first = int(torch.randint(0, x.numel() // 2, (), generator=generator))
            which = torch.randint(0, len(SPECIAL), (count,), generator=generator)
            x.view(-1)[first : first + count] = torch.tensor(SPECIAL)[which]
        return self.strided(x.to(dtype).to(device))

    def strided(self, x: Tensor) -> Tensor:
        if self.strides == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if self.strides == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.strides == "sliced":
            return torch.cat([x, x], -1)[..., : x.shape[-1]]
        if self.strides == "expanded":
            return x[:1].expand(x.shape)
        if self.strides == "unaligned":
            return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)
        return x

    @property
    def grid(self) -> tuple[int, ...]:
        return grid_shape(torch.Size(self.shape), self.block_size)


LAYOUTS = [
    Layout("scalar", (), ()),
    Layout("tensor_odd", (5, 7), (5, 7)),
    Layout("tensor", (64, 48), (64, 48)),
    Layout("tensor_sliced", (16, 24), (16, 24), "sliced"),
    Layout("rows", (20, 64), (1, 64)),
    Layout("rows_masked", (13, 40), (1, 40)),
    Layout("rows_odd", (12, 27), (1, 27)),
    Layout("rows_unaligned", (6, 64), (1, 64), "unaligned"),
    Layout("rows_long", (2, 5000), (1, 5000)),
    Layout("rows_too_long", (2, 33000), (1, 33000), specials=False),
    Layout("runs_32", (8, 96), (1, 32)),
    Layout("runs_4", (8, 32), (1, 4)),
    Layout("columns", (40, 48), (40, 1)),
    Layout("columns_odd", (27, 10), (27, 1)),
    Layout("columns_tall", (5000, 9), (5000, 1)),
    Layout("columns_of_32", (64, 24), (32, 1)),
    Layout("rows_transposed", (24, 16), (1, 16), "transposed"),
    Layout("blocks_2d", (32, 48), (16, 8)),
    Layout("blocks_2d_odd", (6, 9), (3, 3)),
    Layout("channels_nchw", (2, 8, 4, 4), (2, 1, 4, 4)),
    Layout("channels_nchw_odd", (2, 6, 3, 3), (2, 1, 3, 3)),
    Layout("channels_last", (2, 16, 3, 4), (2, 1, 3, 4), "channels_last"),
    Layout("blocks_conv", (4, 4, 3, 3), (2, 2, 1, 1)),
    Layout("blocks_3d", (8, 6, 4), (4, 2, 2)),
    Layout("ones", (1, 16, 1, 8), (1, 1, 1, 8), "channels_last"),
    Layout("expanded", (4, 16), (1, 8), "expanded"),
]


# Three that share a launch, and some that have one of their own or no place in a launch for several tensors.
FOREACH = [
    Layout("runs_32_of_18", (9, 64), (1, 32)),
    Layout("runs_32_of_20", (10, 64), (1, 32)),
    Layout("runs_32_of_30", (10, 96), (1, 32)),
    *[layout for layout in LAYOUTS if torch.Size(layout.shape).numel() <= 600][::2],
]


@dataclass(frozen=True)
class Kind:
    """A number format and a formulation."""

    name: str
    format: Format
    quant_min: float
    quant_max: float
    formulation: str
    dtype: torch.dtype

    @property
    def config(self) -> dict[str, Any]:
        return {"format": self.format, "quant_min": self.quant_min, "quant_max": self.quant_max}

    def params(self, layout: Layout, device: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        scale = torch.rand(layout.grid, generator=generator) + 0.02
        if scale.numel() > 4:
            scale.view(-1)[1], scale.view(-1)[3] = float("inf"), float("nan")
        params = {"scale": scale}
        if self.formulation == "zero_point":
            low, high = int(self.quant_min), int(self.quant_max)
            params["zero_point"] = torch.randint(
                low, high + 1, layout.grid, generator=generator, dtype=torch.int32
            )
        if self.formulation == "minval":
            params["minval"] = -torch.rand(layout.grid, generator=generator)
        return {name: value.to(device) for name, value in params.items()}


KINDS = [
    Kind("int4_zero_point", Format.INT, -8, 7, "zero_point", torch.int8),
    Kind("uint8_minval", Format.INT, 0, 255, "minval", torch.uint8),
    Kind("int2", Format.INT, -2, 1, "none", torch.int8),
    Kind("e4m3", Format.E4M3, -448, 448, "none", torch.float8_e4m3fn),
    Kind("e5m2", Format.E5M2, -57344, 57344, "none", torch.float8_e5m2),
    Kind("e2m1", Format.E2M1, -6, 6, "none", torch.float8_e4m3fn),
    Kind("int8", Format.INT, -128, 127, "zero_point", torch.int8),
    Kind("int_as_e5m2", Format.INT, -100, 155, "zero_point", torch.float8_e5m2),
]


@dataclass(frozen=True)
class Step:
    """A setting of ``observe_and_fake_quantize``."""

    name: str
    kind: Kind
    scheme: Scheme
    update: RangeUpdate
    use_minval: bool = False
    range_min: float | None = None
    range_max: float | None = None
    more: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.kind.config | {
            "scheme": self.scheme,
            "update": self.update,
            "use_minval": self.use_minval,
            "range_min": self.range_min,
            "range_max": self.range_max,
            **self.more,
        }


_INT4, _UINT8, _, _E4M3, _, _E2M1, _INT8, _ = KINDS
_E8M0 = {"scale_format": ScaleFormat.E8M0}
STEPS = [
    Step("int4_latest", _INT4, Scheme.SYMMETRIC, RangeUpdate.LATEST),
    Step("uint8_average", _UINT8, Scheme.ASYMMETRIC, RangeUpdate.MOVING_AVERAGE),
    Step("uint8_minval_global", _UINT8, Scheme.ASYMMETRIC, RangeUpdate.GLOBAL_MINMAX, True, range_min=-2.3),
    Step("int4_clipped_minval", _INT4, Scheme.SYMMETRIC_WITH_CLIPPING, RangeUpdate.MOVING_AVERAGE, True),
    Step("e4m3_fixed", _E4M3, Scheme.SYMMETRIC, RangeUpdate.GLOBAL_MINMAX, range_min=-1.7, range_max=1.1),
    Step("e2m1_e8m0", _E2M1, Scheme.SYMMETRIC, RangeUpdate.LATEST, more=_E8M0),
    Step(
        "nvfp4",
        _E2M1,
        Scheme.SYMMETRIC,
        RangeUpdate.MOVING_AVERAGE,
        more={"scale_format": ScaleFormat.E4M3},
    ),
    Step("mxint8", _INT8, Scheme.SYMMETRIC, RangeUpdate.MOVING_AVERAGE, more=_E8M0),
]


def ids_of(value: Any) -> str:
    return str(value.name)


def _on_both(backend: str, device: str, run: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results of ``run(device)`` with the reference on the CPU, and with the backend on the device."""
    with ck.use_backend("reference"):
        wanted = run("cpu")
    with ck.use_backend(backend):
        got = run(device)
    return wanted, got


def _compare(wanted: dict[str, Tensor], got: dict[str, Tensor], *setting: object) -> None:
    for name, value in wanted.items():
        assert_same_bits(got[name].cpu(), value, " ".join(map(str, (*setting, name))))


def check_fake_quantize(backend: str, device: str, layout: Layout, kind: Kind, dtype: torch.dtype) -> None:
    """Forward and backward; the gradient comes in three memory formats."""

    def run(on: str) -> dict[str, Tensor]:
        x = layout.tensor(dtype, device=on).detach().requires_grad_()
        y = ck.fake_quantize(x, **kind.params(layout, on), block_size=layout.block_size, **kind.config)
        results = {"output": y.detach()}
        gradients = [
            layout.tensor(dtype, seed=1, device=on),
            layout.tensor(dtype, seed=2, device=on).contiguous(),
            torch.tensor(-1.5, dtype=dtype, device=on).expand(layout.shape),
        ]
        for i, gradient in enumerate(gradients):
            (results[f"gradient {i}"],) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        with torch.no_grad():
            results["without gradient"] = ck.fake_quantize(
                x, **kind.params(layout, on), block_size=layout.block_size, **kind.config
            )
        return results

    wanted, got = _on_both(backend, device, run)
    _compare(wanted, got, kind.name, dtype)
    assert_same_memory_format(got["output"], wanted["output"])


def check_quantize(backend: str, device: str, layout: Layout, kind: Kind, dtype: torch.dtype) -> None:
    """To the storage dtype and back."""

    def run(on: str) -> dict[str, Tensor]:
        x = layout.tensor(dtype, device=on)
        params = kind.params(layout, on)
        stored = ck.quantize(x, **params, block_size=layout.block_size, **kind.config, dtype=kind.dtype)
        config = {name: value for name, value in kind.config.items() if name != "quant_max"}
        y = ck.dequantize(stored, **params, block_size=layout.block_size, **config, dtype=dtype)
        return {"stored": stored.float(), "restored": y}

    _compare(*_on_both(backend, device, run), kind.name, dtype)


def check_observe_range(backend: str, device: str, layout: Layout, dtype: torch.dtype) -> None:
    def run(on: str) -> dict[str, Tensor]:
        low, high = ck.observe_range(layout.tensor(dtype, device=on), block_size=layout.block_size)
        return {"minimum": low, "maximum": high}

    _compare(*_on_both(backend, device, run), dtype)


def check_foreach_fake_quantize(
    backend: str, device: str, layouts: list[Layout], kind: Kind, dtype: torch.dtype
) -> None:
    """A list of all layouts at once, forward and backward."""

    def run(on: str) -> dict[str, Tensor]:
        params = [kind.params(layout, on) for layout in layouts]
        lists = {f"{name}s": [row[name] for row in params] for name in params[0]}
        inputs = [layout.tensor(dtype, device=on).detach().requires_grad_() for layout in layouts]
        outputs = ck.foreach_fake_quantize(
            inputs, **lists, block_sizes=[layout.block_size for layout in layouts], **kind.config
        )
        return _and_gradients(layouts, inputs, outputs, on)

    _compare(*_on_both(backend, device, run), kind.name, dtype)


def check_foreach_step(
    backend: str, device: str, layouts: list[Layout], step: Step, dtype: torch.dtype
) -> None:
    """Two steps of a list of all layouts: outputs, gradients and states."""

    def run(on: str) -> dict[str, Tensor]:
        states: dict[str, list[Tensor]] = {"scales": [], "zero_points": [], "minvals": []}
        states |= {"running_mins": [], "running_maxs": []}
        for layout in layouts:
            states["scales"].append(torch.zeros(layout.grid, device=on))
            if step.kind.format == Format.INT:
                states["zero_points"].append(torch.zeros(layout.grid, device=on, dtype=torch.int32))
                states["minvals"].append(torch.zeros(layout.grid, device=on))
            if step.update != RangeUpdate.LATEST:
                states["running_mins"].append(torch.zeros(layout.grid, device=on, dtype=dtype))
                states["running_maxs"].append(torch.zeros(layout.grid, device=on, dtype=dtype))
        given = {name: values for name, values in states.items() if values}
        results: dict[str, Tensor] = {}
        for i in range(2):
            inputs = [layout.tensor(dtype, seed=i, device=on).detach().requires_grad_() for layout in layouts]
            outputs = ck.foreach_observe_and_fake_quantize(
                inputs,
                **given,
                block_sizes=[layout.block_size for layout in layouts],
                has_running=i > 0,
                **step.config,
            )
            found = _and_gradients(layouts, inputs, outputs, on)
            for name, values in given.items():
                found |= {
                    f"{name} {layout.name}": v.clone() for layout, v in zip(layouts, values, strict=True)
                }
            results |= {f"{name} {i}": value for name, value in found.items()}
        return results

    _compare(*_on_both(backend, device, run), step.name, dtype)


def _and_gradients(
    layouts: list[Layout], inputs: list[Tensor], outputs: list[Tensor], device: str
) -> dict[str, Tensor]:
    """Outputs, and gradients of all but the first."""
    gradients = [
        layout.tensor(y.dtype, seed=1, device=device) for layout, y in zip(layouts, outputs, strict=True)
    ]
    torch.autograd.backward(outputs[1:], gradients[1:])
    results = {}
    for layout, x, y in zip(layouts, inputs, outputs, strict=True):
        results[f"output {layout.name}"] = y.detach()
        if x.grad is not None:
            results[f"gradient {layout.name}"] = x.grad
    return results


def check_step(
    backend: str, device: str, layout: Layout, step: Step, dtype: torch.dtype, *, functional: bool = False
) -> None:
    """Steps from the first, without a running range, on; outputs, masks and the whole state."""

    def run(on: str) -> dict[str, Tensor]:
        grid = layout.grid
        state: dict[str, Tensor] = {"scale": torch.zeros(grid, device=on)}
        if step.kind.format == Format.INT:
            state["zero_point"] = torch.zeros(grid, device=on, dtype=torch.int32)
            state["minval"] = torch.zeros(grid, device=on)
        if step.update != RangeUpdate.LATEST:
            state["running_min"] = torch.zeros(grid, device=on, dtype=dtype)
            state["running_max"] = torch.zeros(grid, device=on, dtype=dtype)
        results: dict[str, Tensor] = {}
        for i in range(3 if layout.specials else 2):
            x = layout.tensor(dtype, seed=10 + i, device=on)
            if i < 2:  # the special values come last, or NaN would fill the running range from the start
                x = torch.nan_to_num(x, posinf=3.0, neginf=-3.0).clamp(-9, 9)
            x = x.detach()
            if functional:
                results |= _functional(x, state, i, step, layout)
                continue
            x.requires_grad_()
            y = ck.observe_and_fake_quantize(
                x, **state, block_size=layout.block_size, has_running=i > 0, **step.config
            )
            y.backward(torch.ones_like(y))
            results[f"output {i}"], results[f"gradient {i}"] = y.detach(), x.grad  # type: ignore[assignment]
            results |= {f"{name} {i}": value.clone() for name, value in state.items()}
        return results

    _compare(*_on_both(backend, device, run), step.name, dtype)


def _functional(x: Tensor, state: dict[str, Tensor], i: int, step: Step, layout: Layout) -> dict[str, Tensor]:
    from coreai_kernels.ops.library import implementation

    running = (state.get("running_min"), state.get("running_max")) if i else (None, None)
    c = step.config
    found = implementation("observe_and_fake_quantize")(
        x,
        *running,
        list(layout.block_size),
        c["scheme"],
        c["format"],
        c["quant_min"],
        c["quant_max"],
        c["use_minval"],
        c["update"],
        0.01,
        c["range_min"],
        c["range_max"],
        int(c.get("scale_format", ScaleFormat.FLOAT32)),
        True,
    )
    names = ("output", "mask", "scale", "zero_point", "minval", "running_min", "running_max")
    state |= dict(zip(names[2:], found[2:], strict=True))
    return {f"{name} {i}": value for name, value in zip(names, found, strict=True)}
