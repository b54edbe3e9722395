"""The cases of the GPU check: one tensor with its parameters, and who does what to it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from coreai_kernels import Format, QuantConfig, RangeUpdate, ScaleFormat, Scheme

__all__ = ["DTYPES", "FORMATS", "OPERATIONS", "Case", "cases", "is_compiled"]

OPERATIONS = ("forward", "backward", "step")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALL = ("tensor", "channel", "block32")
# Name: format, quant_min, quant_max, scale format, granularities.
FORMATS = {
    "int8": (Format.INT, -128.0, 127.0, ScaleFormat.FLOAT32, ALL),
    "int4": (Format.INT, -8.0, 7.0, ScaleFormat.FLOAT32, ALL),
    "fp8": (Format.E4M3, -448.0, 448.0, ScaleFormat.FLOAT32, ALL),
    "fp4": (Format.E2M1, -6.0, 6.0, ScaleFormat.E8M0, ALL),
    "mxint8": (Format.INT, -128.0, 127.0, ScaleFormat.E8M0, ("block32",)),
    "nvfp4": (Format.E2M1, -6.0, 6.0, ScaleFormat.E4M3, ("block16",)),
}


def blocks_of(granularity: str, size: int) -> tuple[int, int]:
    return {"tensor": (size, size), "channel": (1, size), "block32": (1, 32), "block16": (1, 16)}[granularity]


class Case:
    """One tensor with its parameters; each operation as ours, torch's own and the reference's."""

    def __init__(
        self, size: int, dtype: torch.dtype, format_name: str, granularity: str, device: str = "cuda"
    ) -> None:
        self.format, self.low, self.high, self.scale_format, _ = FORMATS[format_name]
        self.format_name, self.granularity = format_name, granularity
        self.block_size = list(blocks_of(granularity, size))
        self.grid = [size // block for block in self.block_size]
        generator = torch.Generator(device=device).manual_seed(0)
        self.x = torch.randn(size, size, device=device, generator=generator).to(dtype)
        self.scale = torch.full(self.grid, 0.05, device=device)
        self.is_int = self.format == Format.INT
        self.zero_point = torch.zeros(self.grid, dtype=torch.int32, device=device) if self.is_int else None
        self.running = (torch.zeros(self.grid, device=device, dtype=dtype),) * 2
        self.mask = torch.randint(0, 256, ((size * size + 7) // 8,), dtype=torch.uint8, device=device)

    def ours(self, operation: str) -> Callable[[], Any]:
        from coreai_kernels.ops.library import implementation

        forward = implementation("fake_quantize_forward")
        backward = implementation("fake_quantize_backward")
        step = implementation("observe_and_fake_quantize_")
        running = tuple(value.clone() for value in self.running)
        zero_point = self.zero_point
        if operation == "forward":
            return lambda: forward(self.x, self.scale, zero_point, None, *self._element_config())
        if operation == "backward":
            return lambda: backward(self.x, self.mask, [])
        scale = self.scale.clone()
        config = self._config().packed()
        return lambda: step(self.x, scale, zero_point, None, *running, True, config, True)

    def reference(self, operation: str) -> Callable[[], Any]:
        from coreai_kernels.reference import fake_quantize, observe_and_fake_quantize

        if operation == "forward":
            function = torch.compile(fake_quantize.forward, dynamic=False)
            return lambda: function(self.x, self.scale, self.zero_point, None, *self._element_config())
        if operation == "backward":
            function = torch.compile(fake_quantize.backward, dynamic=False)
            return lambda: function(self.x, self.mask, [0, 1])
        function = torch.compile(observe_and_fake_quantize.observe_and_fake_quantize, dynamic=False)
        config = self._config()
        return lambda: function(self.x, *self.running, config, True)

    def torchs_own(self, operation: str) -> Callable[[], Any] | None:
        """ATen's fused integer operators; the step is the one that observes, too."""
        if not self.is_int or self.granularity.startswith("block") or self.zero_point is None:
            return None
        low, high = int(self.low), int(self.high)
        scale, zero_point = self.scale.view(-1), self.zero_point.view(-1)
        per_tensor = self.granularity == "tensor"
        if operation == "forward" and per_tensor:
            return lambda: torch.fake_quantize_per_tensor_affine(self.x, scale, zero_point, low, high)
        if operation == "forward":
            return lambda: torch.fake_quantize_per_channel_affine(self.x, scale, zero_point, 0, low, high)
        if operation == "backward":
            mask = torch.rand_like(self.x, dtype=torch.float32) > 0.1
            if per_tensor:
                return lambda: torch.ops.aten.fake_quantize_per_tensor_affine_cachemask_backward(self.x, mask)
            return lambda: torch.ops.aten.fake_quantize_per_channel_affine_cachemask_backward(self.x, mask)
        on = torch.ones(1, dtype=torch.int64, device=self.x.device)
        running = [torch.zeros_like(scale) for _ in range(2)]
        state = (*running, scale.clone(), zero_point.clone())
        return lambda: torch.fused_moving_avg_obs_fake_quant(
            self.x, on, on, *state, 0.01, low, high, 0, not per_tensor, True
        )

    def floor_bytes(self, operation: str) -> float:
        """The least traffic (LIMITS): a read and a write, a bit, and a second read for the whole tensor."""
        element = self.x.element_size()
        # The scales of NVFP4 follow from one of the tensor, too.
        sees_all = self.granularity == "tensor" or self.scale_format == ScaleFormat.E4M3
        reads = 2 if operation == "step" and sees_all else 1
        return self.x.numel() * ((reads + 1) * element + 1 / 8)

    def _element_config(self) -> tuple[Any, ...]:
        return self.block_size, self.format, self.low, self.high, True

    def _config(self) -> Any:
        return QuantConfig(
            block_size=tuple(self.block_size),
            scheme=Scheme.SYMMETRIC,
            format=self.format,
            quant_min=self.low,
            quant_max=self.high,
            update=RangeUpdate.MOVING_AVERAGE,
            scale_format=self.scale_format,
        )


def cases(size: int, dtype: torch.dtype, device: str = "cuda") -> Iterator[tuple[Case, str]]:
    """Each case of a size with each of its operations."""
    for format_name, (*_, granularities) in FORMATS.items():
        for granularity in granularities:
            case = Case(size, dtype, format_name, granularity, device)
            for operation in OPERATIONS:
                # The backward pass does not know the format nor the blocks.
                if operation != "backward" or (format_name, granularity) == ("int8", "tensor"):
                    yield case, operation


def is_compiled(case: Case) -> bool:
    """Whether the compiled reference is measured: it takes seconds to compile."""
    compiled = (("int8", "tensor"), ("int8", "channel"), ("int4", "block32"))
    return case.x.size(0) == 4096 and (case.format_name, case.granularity) in compiled
