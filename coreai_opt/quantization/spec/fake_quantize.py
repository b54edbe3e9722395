"""Fake quantizers: modules that round a tensor to quantized values and let gradients pass."""

import logging
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

import coreai_kernels
from coreai_kernels import Format
from coreai_kernels.imports import assume_constant_result
from coreai_kernels.ops import fake_quantize as fake_quantize_op
from coreai_kernels.ops import observe_and_fake_quantize as training_step_op
from coreai_kernels.ops.quantize import STORAGE_DTYPES
from coreai_kernels.runtime.captured import CapturedCalls
from coreai_kernels.runtime.inductor import is_exporting
from coreai_opt._sharding.layout import is_sharded, with_local, with_sums
from coreai_opt._sharding.ranges import local_parameters
from coreai_opt._utils.spec_utils import PartialConstructor, with_args
from coreai_opt.config.spec.compression_simulator import CompressionSimulatorBase, Storage
from coreai_opt.config.spec.factory import CompressionTargetTensor
from coreai_opt.quantization.spec import _affine
from coreai_opt.quantization.spec._fast_path import Decision, capture_simulation, capture_step
from coreai_opt.quantization.spec._legacy import accept_release_0_2
from coreai_opt.quantization.spec._plan import (
    Facts,
    Plans,
    QuantizationPlan,
    facts_of,
    make_plan,
    plan_for,
    remember_methods,
    simulates_as_built_in,
    state_for,
)
from coreai_opt.quantization.spec._state import is_shaped
from coreai_opt.quantization.spec._storage import storage_of
from coreai_opt.quantization.spec._switches import SwitchableFakeQuantize
from coreai_opt.quantization.spec.errors import _BlockSizeMismatchError
from coreai_opt.quantization.spec.granularity import QuantizationGranularity
from coreai_opt.quantization.spec.qformulation import QuantizationFormulation
from coreai_opt.quantization.spec.qparams_calculator import (
    QParams,
    QParamsCalculatorBase,
    StatelessQParamsCalculatorBase,
)
from coreai_opt.quantization.spec.qscheme import QuantizationScheme

__all__ = ["FakeQuantizeImplBase", "fp4_forward"]

logger = logging.getLogger(__name__)

_NOTHING_CAPTURED = {"_captured": None, "_capture": (None, None)}


class FakeQuantizeImplBase(CompressionSimulatorBase, SwitchableFakeQuantize):
    """Base of the fake quantizers. Subclasses are named in a specification by their key in this registry.

    A subclass implements :meth:`quantize` and :meth:`dequantize`, and simulates through them: the forward is
    ``dequantize(quantize(x, ..., cast_to_target_dtype=False), ...)`` in float32, with the gradient that torch
    gives it.

    A module whose tensor cannot be cut into the blocks asked for disables itself.

    Args:
        dtype: dtype of the quantized values.
        qformulation: zero point or minimum.
        granularity: which elements share parameters.
        target_dtype: dtype that holds one quantized value.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        qparams_calculator: computes scale, zero point and minimum.
        n_bits: bits of a quantized value.
    """

    qparams_calculator: QParamsCalculatorBase
    # Of a parameter's simulator: the name of the module from whose configuration its specification comes.
    configured_by: str | None = None

    @accept_release_0_2
    def __init__(
        self,
        dtype: torch.dtype,
        qformulation: QuantizationFormulation,
        granularity: QuantizationGranularity,
        target_dtype: torch.dtype,
        quant_min: int | float,
        quant_max: int | float,
        qparams_calculator: QParamsCalculatorBase,
        n_bits: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.qformulation = qformulation
        self._granularity = granularity
        self.target_dtype = target_dtype
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.n_bits = n_bits
        self.qparams_calculator = qparams_calculator
        self._plans = Plans()
        self._captured: CapturedCalls | None = None
        self._capture: tuple[CapturedCalls | None, Decision | None] = (None, None)

    @classmethod
    def built_in_class(cls) -> type["FakeQuantizeImplBase"]:
        """The class whose simulation the fused operators reproduce."""
        return _DefaultFakeQuantizeImpl

    @classmethod
    def with_args(cls, **kwargs: Any) -> PartialConstructor["FakeQuantizeImplBase"]:
        """A constructor of the class with ``kwargs`` bound."""
        return with_args(cls, **kwargs)

    @property
    def qscheme(self) -> QuantizationScheme:
        """How the quantized values lie around zero: the calculator's."""
        return self.qparams_calculator.qscheme

    @property
    def quantization_target(self) -> CompressionTargetTensor:
        """The tensor's role: the calculator's."""
        return self.qparams_calculator.quantization_target

    @property
    def granularity(self) -> QuantizationGranularity:
        """Which elements share parameters. Fixed once something has been observed (RuntimeError)."""
        return self._granularity

    @granularity.setter
    def granularity(self, granularity: QuantizationGranularity) -> None:
        self.qparams_calculator.granularity = granularity
        self._granularity = granularity

    @property
    def is_stateless(self) -> bool:
        """Whether the parameters depend on the tensor at hand alone."""
        return isinstance(self.qparams_calculator, StatelessQParamsCalculatorBase)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch observation on or off. No effect on a stateless fake quantizer: it has to observe."""
        if not self.is_stateless:
            super().enable_observer(enabled)

    def get_block_size(self, tensor_shape: torch.Size) -> tuple[int, ...]:
        """Extent of a block along each axis of a tensor of that shape; ValueError if none fits."""
        return self._granularity.get_block_size(tensor_shape, self.quantization_target)

    def storage(self, original: Tensor) -> Storage:
        """What is stored of ``original``. See the base class."""
        return storage_of(self, original)

    def extra_repr(self) -> str:
        """Formulation and switches."""
        flags = self._current_flags()
        observer, fake_quant = ("on" if on else "off" for on in (flags.observe, flags.fake_quant))
        return f"qformulation={self.qformulation}, observer={observer}, fake_quant={fake_quant}"

    def calculate_qparams(self) -> QParams:
        """The kept scale, zero point and minimum; the last two None for floating-point dtypes.

        Warns (UserWarning) if nothing has been observed.

        Raises:
            AttributeError: the calculator keeps none.
        """
        get_qparams = getattr(self.qparams_calculator, "get_qparams", None)
        if get_qparams is None:
            raise AttributeError(
                f"{type(self.qparams_calculator).__name__!r} object has no attribute 'get_qparams': "
                f"it keeps no parameters; call it with a tensor to get that tensor's"
            )
        return get_qparams()  # type: ignore[no-any-return]

    def set_export_mode(self, enabled: bool = True) -> None:
        """Freeze the parameters for export, or go back.

        Raises:
            NotImplementedError: they depend on the input, so there is nothing to freeze.
        """
        self.qparams_calculator.set_export_mode(enabled)  # type: ignore[operator]

    def convert(self, model: torch.fx.GraphModule, observer_node: torch.fx.Node) -> None:
        """Stay in the graph: ``convert_pt2e`` replaces what lacks this method by torchao's own operators."""

    @abstractmethod
    def quantize(
        self,
        tensor: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minval: Tensor | None,
        cast_to_target_dtype: bool = True,
    ) -> Tensor:
        """Quantized values of ``tensor``.

        Args:
            tensor: floating-point values.
            scale: one value per block.
            zero_point: one value per block, None for floating-point dtypes.
            minval: one value per block, None for floating-point dtypes.
            cast_to_target_dtype: return them in the target dtype, or else in the tensor's.
        """

    @abstractmethod
    def dequantize(
        self,
        tensor: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minval: Tensor | None,
        output_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Values that the quantized ``tensor`` stands for, in ``output_dtype``. See :meth:`quantize`."""

    def _fused_fake_quant_dequant(
        self, tensor: Tensor, scale: Tensor, zero_point: Tensor | None, minval: Tensor | None
    ) -> Tensor:
        """Quantize and dequantize."""
        q = self.quantize(tensor, scale, zero_point, minval, cast_to_target_dtype=False)
        return self.dequantize(q, scale, zero_point, minval)

    def forward(self, tensor: Tensor) -> Tensor:
        """Observe ``tensor`` and return its quantized values, as far as both are switched on.

        A tensor that the blocks do not divide is returned unchanged, with a warning in the log; so are all
        later ones.

        Args:
            tensor: float32, bfloat16, float16 or float64, of any shape and strides.

        Returns:
            A tensor of the same shape, dtype and memory format.

        Raises:
            TypeError: the tensor is not floating point.
            ValueError: the granularity does not fit the tensor's shape.
            RuntimeError: the grid of blocks is another than before; or observation is off, and nothing was
                observed.
            IndexError: the tensor is empty.
        """
        flags = self._flags
        if not torch.compiler.is_compiling():
            captured = self._captured
            if captured is not None:
                output = captured(tensor)
                if output is not None:
                    return output
            thrown = flags.thrown.now
            flags.update(self._buffers)
        # Once: another thread may throw a switch at any time.
        disabled, fake_quant, observe = switches = flags.values()
        if disabled or not (fake_quant or observe):
            return tensor
        try:
            if is_sharded(tensor):
                return self._forward_in_parts(with_sums(tensor), observe or self.is_stateless, fake_quant)
            plan = plan_for(self, tensor)
            observes = observe or plan.is_stateless
            config = None if torch.onnx.is_in_onnx_export() else plan.config
            if observes and fake_quant and config is not None:
                calculator: Any = self._modules["qparams_calculator"]
                state = state_for(plan, calculator, tensor)
                if state is not None:
                    output = training_step_op.apply(tensor, *state, config, plan.packed_config)
                    if plan.is_stateless:
                        calculator.show(state[0][:3])
                    if state[0] is plan.state and not torch.compiler.is_compiling():
                        capture_step(self, plan, tensor, Decision(thrown, switches, plan.made_for))
                    return output
            output = self._forward_in_parts(tensor, observes, fake_quant)
            if not observes and not torch.compiler.is_compiling():
                capture_simulation(self, plan, tensor, Decision(thrown, switches, plan.made_for))
            return output
        except _BlockSizeMismatchError:
            if not (observe or self.is_stateless):
                raise
            self._warn_and_disable(tensor.shape)
            return tensor

    def _forward_in_parts(self, tensor: Tensor, observes: bool, simulates: bool) -> Tensor:
        """The forward through the methods of the modules, which subclasses override."""
        qparams = self.qparams_calculator(tensor.detach()) if observes else self.calculate_qparams()
        if not simulates:
            return tensor
        if not observes and not is_shaped(qparams[0]):
            raise RuntimeError(
                f"Tensor {self.tensor_fqn!r} has no quantization parameters: observation is off, and nothing "
                f"was observed before. Run a forward with the observer enabled, or load parameters."
            )
        return self._simulate(tensor, qparams)

    def _simulate(self, tensor: Tensor, qparams: QParams) -> Tensor:
        return self._fused_fake_quant_dequant(tensor.to(torch.float32), *qparams).to(tensor.dtype)

    # Evaluated when a program is traced: which methods are overridden is no matter for the compiled code.
    @assume_constant_result
    def facts(self) -> Facts:
        """What the forward takes from the module, whatever the tensor's shape."""
        return facts_of(self)

    @assume_constant_result
    def _simulates_as_built_in(self) -> bool:
        return simulates_as_built_in(self)

    # torch.__future__.set_swap_module_params_on_conversion: torch swaps only tensors that nobody else holds.
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__.update(_plans=Plans(), **_NOTHING_CAPTURED)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.__dict__.update(_plans=Plans(), **_NOTHING_CAPTURED)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plans": Plans(), **_NOTHING_CAPTURED}

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.update(_plans=Plans(), **_NOTHING_CAPTURED)
        return replica

    def _warn_and_disable(self, shape: torch.Size) -> None:
        self._log_mismatch(tuple(shape))
        self._disable()

    # torch.compile traces no logging: this runs while it traces.
    @assume_constant_result
    def _log_mismatch(self, shape: tuple[int, ...]) -> bool:
        reason = "a block does not divide it"
        try:
            self.get_block_size(torch.Size(shape))
            self.qparams_calculator.range_calculator.get_block_size(torch.Size(shape))
        except _BlockSizeMismatchError as error:
            reason = str(error)
        logger.warning(
            f"Tensor '{self.tensor_fqn}' (target: {self.quantization_target}, shape: {shape}) incompatible "
            f"with block size configuration: {reason}. Skipping quantization."
        )
        return True


@FakeQuantizeImplBase.register("default")
class _DefaultFakeQuantizeImpl(FakeQuantizeImplBase):
    """Fake quantization on the fused kernels, with the straight-through gradient.

    A subclass simulates in the same way, in the blocks of its :meth:`get_block_size`. Its own
    :meth:`quantize` takes part in exports alone; to simulate through it, derive from
    :class:`FakeQuantizeImplBase`.
    """

    def quantize(
        self,
        tensor: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minval: Tensor | None,
        cast_to_target_dtype: bool = True,
    ) -> Tensor:
        """Quantized values of ``tensor``. See the base class.

        Raises:
            ValueError: the granularity does not fit the shape, or the zero point or minimum that the
                formulation needs is missing.
            RuntimeError: a parameter has not one value per block.
        """
        plan = make_plan(self, tensor)
        block_size, fmt, quant_min, quant_max = plan.values
        dtype = self.target_dtype if cast_to_target_dtype else tensor.dtype
        qparams = plan.select(scale, zero_point, minval)
        if _needs_torch_operators(tensor, dtype):
            return _affine.quantize(tensor, *qparams, block_size, Format(fmt), quant_min, quant_max).to(dtype)
        return coreai_kernels.quantize(
            tensor,
            *qparams,
            block_size=block_size,
            quant_min=quant_min,
            quant_max=quant_max,
            format=fmt,
            dtype=dtype,
        )

    def dequantize(
        self,
        tensor: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minval: Tensor | None,
        output_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Values that the quantized ``tensor`` stands for. Errors as for :meth:`quantize`."""
        plan = QuantizationPlan(self, tensor.shape)
        qparams = plan.select(scale, zero_point, minval)
        block_size, fmt, quant_min, _ = plan.values
        if _needs_torch_operators(tensor, tensor.dtype):
            return _affine.dequantize(tensor, *qparams, block_size, Format(fmt), quant_min).to(output_dtype)
        return coreai_kernels.dequantize(
            tensor, *qparams, block_size=block_size, quant_min=quant_min, format=fmt, dtype=output_dtype
        )

    def _fused_fake_quant_dequant(
        self, tensor: Tensor, scale: Tensor, zero_point: Tensor | None, minval: Tensor | None
    ) -> Tensor:
        """Quantize and dequantize in one kernel; the methods of these names are not called."""
        qparams = (scale, zero_point, minval)
        if not _is_exporting():
            return self._straight_through(tensor, qparams)
        built_in = _DefaultFakeQuantizeImpl
        q = built_in.quantize(self, tensor, *qparams, cast_to_target_dtype=False)
        return built_in.dequantize(self, q, *qparams)

    def _simulate(self, tensor: Tensor, qparams: QParams) -> Tensor:
        if _is_exporting() or not self._simulates_as_built_in():
            return super()._simulate(tensor, qparams)
        return self._straight_through(tensor, qparams)  # the kernels convert to float32 themselves

    def _straight_through(self, tensor: Tensor, qparams: QParams) -> Tensor:
        if tensor.numel() == 0:  # whatever the blocks
            return tensor.clone()
        plan = plan_for(self, tensor)
        scale, zero_point, minval = plan.select(*qparams)
        block_size, fmt, quant_min, quant_max = plan.values
        if is_sharded(tensor):
            local, selected, size = local_parameters(tensor, (scale, zero_point, minval), block_size)
            if local.numel():
                local = fake_quantize_op.apply(local, *selected, size, fmt, quant_min, quant_max)
            return with_local(tensor, local)
        return fake_quantize_op.apply(
            tensor, scale, zero_point, minval, block_size, fmt, quant_min, quant_max
        )


remember_methods(_DefaultFakeQuantizeImpl)


def _needs_torch_operators(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels will not do: for gradients, for export, for dtypes that nothing is stored in."""
    needs_grad = tensor.requires_grad and torch.is_grad_enabled()
    return needs_grad or _is_exporting() or dtype not in STORAGE_DTYPES


def _is_exporting() -> bool:
    """Whether a program is made whose readers know torch's operators only; ONNX's older exporter traces."""
    return is_exporting() or torch.onnx.is_in_onnx_export()


def fp4_forward(tensor: Tensor) -> Tensor:
    """The nearest value of 4-bit floating point (e2m1): 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, ties to even.

    Args:
        tensor: floating-point tensor of any shape. Larger values become 6; NaN stays.

    Returns:
        Tensor of the same shape and dtype. Its gradient is zero.

    Raises:
        TypeError: the tensor is not floating point.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"tensor must be floating point, got {tensor.dtype}")
    return _affine.round_to_float4(tensor)
