"""Single calls whose value must be the same: tables, fields of specs, registries, extension points."""

import math
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .cases import GRANULARITIES, INT_DTYPES, SCHEMES, SHAPES, UNUSABLE

__all__ = ["VALUES"]

NAMED_DTYPES = (*INT_DTYPES, "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
# Keys of range calculators that Apple's package does not have: docs/post-training.md.
EXTENSIONS = ("percentile", "mse", "entropy")
REGISTRIES = (
    "QParamsCalculatorBase",
    "RangeCalculatorBase",
    "FakeQuantizeImplBase",
    "QuantizationGranularity",
)
ALL_DTYPES = (
    *(getattr(torch, name) for name in INT_DTYPES),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2),
    *(torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32),
)


class _Names:
    """Attributes are the public names of the package under test, looked up when asked for."""

    MODULES = (
        "coreai_opt.quantization.spec",
        "coreai_opt.config.spec",
        "coreai_opt.quantization.spec.fake_quantize",
    )

    def __getattr__(self, name: str) -> Any:
        for module in map(import_module, self.MODULES):
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"no public name {name}")


api = _Names()


def spec(**fields: Any) -> Any:
    return api.QuantizationSpec(**fields)


def shown(**fields: Any) -> Any:
    """The fields of a spec, so that two packages can be compared."""
    made = spec(**fields)
    # Classes are compared by their registry keys, for the default ones are private.
    names = [name for name in type(made).model_fields if not name.endswith("_cls")]
    show: dict[str, Any] = {name: getattr(made, name) for name in names}
    show["granularity"] = repr(made.granularity)
    return show | {name: getattr(made, name) for name in ("n_bits", "quant_min", "quant_max", "target_dtype")}


def simulator(target: str = "weight", **fields: Any) -> Any:
    return api.QuantizationComponentFactory.construct(spec(**fields), api.CompressionTargetTensor(target))


def block(**fields: Any) -> Any:
    return api.PerBlockGranularity(**fields)


def channel(**fields: Any) -> Any:
    return api.PerChannelGranularity(**fields)


def granularity(fields: dict[str, Any]) -> Any:
    fields = dict(fields)
    return api.QuantizationGranularity.get_class(fields.pop("type"))(**fields)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """The value of the call, or the name of the first builtin class of the exception."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - compared
        return "raised " + next(c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins")


def block_size_table(target: str) -> Iterator[tuple[str, Any]]:
    where = api.CompressionTargetTensor(target)
    for fields in (*GRANULARITIES, *UNUSABLE):
        for shape in (*SHAPES, (0, 4), (4, 6)):
            made = granularity(fields)
            yield f"{made!r} {shape}", attempt(made.get_block_size, torch.Size(shape), where)


def resolved_sizes() -> Iterator[tuple[str, Any]]:
    shapes = ((4, 8), (12,), (2, 6, 9), (1, 1), (0, 4))
    pairs = ((4, 8), (-1, 4), (2, -1), (-1, -1), (3, 4), (0, 1), (-2, 1), (8, 16))
    sizes = (*pairs, (-1,), (4,), (2, 3, -1), (1, 6, 3), ())
    for shape in shapes:
        for size in sizes:
            yield f"{shape} {size}", attempt(api.resolve_block_sizes, torch.Size(shape), size)


def table(method: str) -> dict[str, Any]:
    """What a class method of the spec says of each dtype."""
    return {str(dtype): attempt(getattr(api.QuantizationSpec, method), dtype) for dtype in ALL_DTYPES}


def ranges(granularity: Any, shape: tuple[int, ...], target: str = "weight") -> Any:
    calculator = api.MinMaxRangeCalculator(granularity, api.CompressionTargetTensor(target))
    return calculator(torch.randn(shape))


def bfloat16_patterns() -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def step(module: Any, x: Tensor) -> dict[str, Any]:
    x = x.detach().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return {"output": y, "gradient": x.grad, "state": dict(module.state_dict())}


def second_gradients(**arguments: Any) -> Any:
    x = torch.linspace(-2, 2, 64).reshape(2, 32).requires_grad_()
    output = simulator(**arguments)(x)
    (gradient,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)


def both_steps(*arguments: Any, **fields: Any) -> Any:
    module = simulator(*arguments, **fields)
    return step(module, torch.randn(4, 10)), step(module, torch.randn(4, 10))


def custom_range_calculator() -> Any:
    class HalfRange(api.RangeCalculatorBase):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.amin(1, keepdim=True) / 2, x.amax(1, keepdim=True) / 2

    api.RangeCalculatorBase.register("parity_half")(HalfRange)
    fields = {"granularity": channel(axis=0), "qscheme": "asymmetric"}
    return [both_steps(range_calculator_cls=named, **fields) for named in (HalfRange, "parity_half")]


def custom_calculator() -> Any:
    class Doubled(api.StaticQParamsCalculator):  # type: ignore[misc, name-defined]
        def compute_qparams(self, tensor: Tensor, min_val: Tensor, max_val: Tensor) -> Any:
            return super().compute_qparams(tensor, 2 * min_val, 2 * max_val)

    api.QParamsCalculatorBase.register("parity_doubled")(Doubled)
    return both_steps(qparam_calculator_cls="parity_doubled", dtype="int4")


def custom_running_calculator() -> Any:
    class Latest(api.MovingAverageQParamsCalculator):  # type: ignore[misc, name-defined]
        def update_running_range(self, min_val: Tensor, max_val: Tensor) -> Any:
            return super().update_running_range(min_val * 3, max_val * 3)

    api.QParamsCalculatorBase.register("parity_latest")(Latest)
    return both_steps(qparam_calculator_cls="parity_latest", dtype="uint8", granularity=channel(axis=0))


def custom_quantize() -> Any:
    base = api.FakeQuantizeImplBase.get_class("default")

    class Truncating(base):  # type: ignore[misc, valid-type]
        def dequantize(self, tensor: Tensor, scale: Tensor, *rest: Any, **options: Any) -> Any:
            return super().dequantize(tensor, scale * 2, *rest, **options)

    api.FakeQuantizeImplBase.register("parity_truncating")(Truncating)
    module = simulator(fake_quantize_cls="parity_truncating", dtype="int4")
    x = torch.randn(4, 10)
    trained = step(module, x)
    return trained, module.dequantize(torch.ones(4, 10, dtype=torch.int8), *module.calculate_qparams())


def methods_that_hand_on() -> Any:
    base = api.FakeQuantizeImplBase.get_class("default")
    found = {}
    for name in ("quantize", "dequantize", "get_block_size", "_fused_fake_quant_dequant"):

        def hand_on(self: Any, *arguments: Any, name: str = name, **options: Any) -> Any:
            return getattr(base, name)(self, *arguments, **options)

        api.FakeQuantizeImplBase.register(f"parity_{name}")(type("Mine", (base,), {name: hand_on}))
        for dtype in ("int4", "float8_e4m3fn"):
            module = simulator("activation", fake_quantize_cls=f"parity_{name}", dtype=dtype)
            steps = [step(module, torch.randn(4, 10)) for _ in range(2)]
            module.enable_observer(False)
            found[f"{name}, {dtype}"] = [*steps, step(module, torch.randn(4, 10))]
    return found


def ranges_of_ones_own() -> Any:
    """Quantized values in a narrower range than the dtype's, which a user has assigned."""
    found = {}
    cases = [
        *(
            ("int8", scheme, low, high)
            for scheme in SCHEMES
            for low, high in ((-127, 5), (-9, 100), (-50, -10))
        ),
        *(("uint4", scheme, *bounds) for scheme in SCHEMES for bounds in ((0, 6), (3, 14))),
        *(("float8_e4m3fn", "symmetric", *bounds) for bounds in ((-100, 448), (-448, 30), (0, 448))),
        ("float4_e2m1fn", "symmetric", -2, 6),
    ]
    for dtype, scheme, low, high in cases:
        module = simulator("activation", dtype=dtype, qscheme=scheme)
        for each in (module, module.qparams_calculator):
            each.quant_min, each.quant_max = low, high
        x = torch.randn(4, 10)
        found[f"{dtype} {scheme} {low} {high}"] = [step(module, x), step(module, 2 * x)]
    return found


def partial() -> Any:
    made = api.QuantizationComponentFactory.construct_partial(
        spec(dtype="uint4", granularity=channel(axis=0)), api.CompressionTargetTensor.ACTIVATION
    )
    module = made()
    return step(module, torch.randn(4, 10)), module.quantization_target, module.qscheme, module.is_stateless


def repeated_key() -> Any:
    """Which of two classes a key names that was registered twice."""
    for _ in range(2):

        class Twice(api.StaticQParamsCalculator):  # type: ignore[misc, name-defined]
            pass

        api.QParamsCalculatorBase.register("parity_twice")(Twice)
    return api.QParamsCalculatorBase.get_class("parity_twice") is Twice


VALUES: dict[str, Callable[[], Any]] = {
    "fp4_forward, each bfloat16": lambda: api.fp4_forward(bfloat16_patterns().float()),
    "fp4_forward refuses bfloat16": lambda: api.fp4_forward(torch.ones(2, dtype=torch.bfloat16)),
    "fp4_forward refuses float16": lambda: api.fp4_forward(torch.ones(2, dtype=torch.float16)),
    "fp4_forward refuses float64": lambda: api.fp4_forward(torch.ones(2, dtype=torch.float64)),
    "fp4_forward refuses integers": lambda: api.fp4_forward(torch.ones(2, dtype=torch.int32)),
    "fp4_forward refuses numbers": lambda: api.fp4_forward(3),
    "fp4_forward ties": lambda: api.fp4_forward(torch.linspace(-8, 8, 4097)),
    "fp4_forward neighbours of ties": lambda: [
        api.fp4_forward(torch.nextafter(torch.arange(-8, 8, 0.125), torch.tensor(bound)))
        for bound in (math.inf, -math.inf)
    ],
    "fp4_forward empty": lambda: api.fp4_forward(torch.empty(0)),
    "fp4_forward scalar": lambda: api.fp4_forward(torch.tensor(2.6)),
    "block sizes, weight": lambda: dict(block_size_table("weight")),
    "block sizes, activation": lambda: dict(block_size_table("activation")),
    "resolve_block_sizes": lambda: dict(resolved_sizes()),
    "quant ranges": lambda: {
        f"{dtype} {scheme}": attempt(
            api.QuantizationSpec.get_quant_range, dtype, api.QuantizationScheme(scheme)
        )
        for dtype in ALL_DTYPES
        for scheme in SCHEMES
    },
    "bits": lambda: table("get_n_bits_from_dtype"),
    "target dtypes": lambda: table("get_target_dtype"),
    "spec defaults": lambda: shown(),
    "specs of dtypes by name": lambda: {name: shown(dtype=name) for name in NAMED_DTYPES[:-1]},
    "spec fp4": lambda: (shown(dtype="float4_e2m1fn"), shown(dtype=torch.float4_e2m1fn_x2)),
    "spec int6": lambda: shown(dtype="int6"),
    "spec int6 with clipping": lambda: shown(dtype="int6", qscheme="symmetric_with_clipping"),
    "spec uint6": lambda: shown(dtype=torch.uint6),
    "spec mxint8": lambda: shown(dtype="int8", scale_dtype="float8_e8m0"),
    "spec e8m0": lambda: shown(dtype="float8_e5m2", scale_dtype="float8_e8m0fnu"),
    "spec by strings": lambda: shown(
        qscheme="asymmetric", qformulation="minval", qparam_calculator_cls="dynamic"
    ),
    "spec granularity from dicts": lambda: [
        shown(granularity={"type": "per_block", **fields})
        for fields in ({"axis": 1, "block_size": 4}, {"block_size": [1, -1]})
    ],
    "spec float_range of ints": lambda: shown(float_range=(-1, 2)),
    "spec float_range one side": lambda: shown(float_range=[None, 2]),
    "spec compression type": lambda: spec().get_compression_type(),
    "spec equality": lambda: (spec() == spec(), spec() == spec(dtype="int4")),
    "spec extra args": lambda: [spec(dtype=d).get_extra_args() for d in ("int8", "uint4", "float8_e4m3fn")],
    "default specs": lambda: [
        {n: getattr(made, n) for n in ("dtype", "qscheme", "qformulation", "float_range", "scale_dtype")}
        | {"granularity": repr(made.granularity), "calculator": made.qparam_calculator_cls}
        for made in (api.default_weight_quantization_spec(), api.default_activation_quantization_spec())
    ],
    "registry keys": lambda: {
        name: {
            key
            for key in getattr(api, name).list_registry_keys()
            if not key.startswith("parity_") and key not in EXTENSIONS
        }
        for name in REGISTRIES
    },
    "registry get_class": lambda: [
        api.QParamsCalculatorBase.get_class("static"),
        api.QuantizationGranularity.get_class("per_block"),
        api.RangeCalculatorBase.get_class("minmax"),
    ],
    "registry resolve": lambda: [
        api.QParamsCalculatorBase.resolve("moving_average"),
        api.QParamsCalculatorBase.resolve(api.StaticQParamsCalculator),
    ],
    "default calculators": lambda: [
        type(simulator(target).qparams_calculator) for target in ("weight", "activation", "lut")
    ],
    "granularity reprs": lambda: [repr(granularity(fields)) for fields in (*GRANULARITIES, *UNUSABLE)],
    "granularity strs": lambda: [str(granularity(fields)) for fields in (*GRANULARITIES, *UNUSABLE)],
    "granularity from a list": lambda: repr(block(block_size=[1, 4])),
    "granularity equality": lambda: (
        block(block_size=4) == block(block_size=4),
        channel(axis=0) == channel(axis=1),
    ),
    "granularity dump": lambda: [granularity(fields).model_dump() for fields in (*GRANULARITIES, *UNUSABLE)],
    "simulator get_block_size": lambda: [
        simulator(granularity=granularity(fields)).get_block_size(torch.Size((8, 4, 3, 3)))
        for fields in GRANULARITIES[:7]
    ],
    "simulator attributes": lambda: [
        [
            getattr(simulator(dtype=dtype), name)
            for name in ("dtype", "target_dtype", "quant_min", "quant_max", "n_bits")
        ]
        for dtype in NAMED_DTYPES
    ],
    "simulator state dict keys": lambda: {
        f"{dtype} {name}": list(simulator("activation", dtype=dtype, qparam_calculator_cls=name).state_dict())
        for dtype in ("int8", "float8_e4m3fn")
        for name in ("static", "moving_average", "global_minmax", "dynamic", "default")
    },
    "range per tensor": lambda: ranges(api.PerTensorGranularity(), (3, 4)),
    "range per channel": lambda: ranges(channel(axis=-1), (3, 4)),
    "range per channel, no axis": lambda: [
        attempt(ranges, channel(), (3, 4), target) for target in ("weight", "activation")
    ],
    "range per block": lambda: ranges(block(block_size=(1, -1, 2)), (3, 4, 6)),
    "range of a scalar": lambda: ranges(api.PerTensorGranularity(), ()),
    "range with NaN": lambda: api.MinMaxRangeCalculator(channel(axis=0))(
        torch.tensor([[1.0, math.nan], [2, 3]])
    ),
    "default weight simulator": lambda: both_steps("weight"),
    "default activation simulator": lambda: both_steps("activation"),
    "gradients of gradients": lambda: [
        second_gradients(dtype=dtype, granularity=granularity)
        for dtype in ("int4", "uint8", "float8_e4m3fn", "float4_e2m1fn")
        for granularity in (api.PerTensorGranularity(), channel(axis=0), block(axis=1, block_size=8))
    ],
    "LUT simulator": lambda: both_steps("lut"),
    "custom range calculator": custom_range_calculator,
    "custom qparams calculator": custom_calculator,
    "custom running calculator": custom_running_calculator,
    "custom dequantize": custom_quantize,
    "methods that hand on": methods_that_hand_on,
    "ranges of one's own": ranges_of_ones_own,
    "partial": partial,
    "repr of partial": lambda: (
        api.QuantizationComponentFactory.construct_partial(
            spec(), api.CompressionTargetTensor.WEIGHT
        ).__class__.__name__
    ),
    "disabled by block": lambda: (
        (module := simulator(granularity=block(axis=1, block_size=3))).is_disabled(),
        module(torch.ones(3, 4)),
        module.is_disabled(),
        module(torch.ones(3, 3)),
        module.is_disabled(),
        dict(module.state_dict()),
    ),
}
