"""Quantization-aware training on the fused simulators."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.base_model_compressor import training_flags
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.controllers.algorithms import quantizers
from coreai_opt.controllers.algorithms.learnable import LearnableRangeQuantize
from coreai_opt.controllers.algorithms.quantization_config import QuantizationConfig
from coreai_opt.controllers.algorithms.ranges import ActivationRange, needs_fixed_range, weight_range
from coreai_opt.controllers.core import qdq
from coreai_opt.controllers.core.api import CompressionStage, State
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.batchnorm import adapt_batchnorm
from coreai_opt.controllers.core.inputs import batches, example_inputs, require_loader
from coreai_opt.controllers.core.layers import INPUT, channel_axis_of
from coreai_opt.controllers.core.masks import bake, installed, original
from coreai_opt.controllers.core.schedulers import BaseCompressionScheduler
from coreai_opt.controllers.core.scopes import select_layers
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["QuantizationBuilder", "QuantizationController", "StagedScheduler"]

Ranges = dict[str, tuple[Tensor, Tensor]]


def input_simulators(model: nn.Module) -> dict[str, Any]:
    """The simulators of inputs, by the name of their layer."""
    return {
        name: module._modules[INPUT] for name, module in model.named_modules() if INPUT in module._modules
    }


@dataclass(frozen=True)
class LayerQuantization:
    """How one tensor is quantized. ``bits`` is None for a tensor that passes unquantized now."""

    name: str
    tensor: str
    bits: int
    scheme: str
    granularity: str
    enabled: bool


@AlgorithmStatistics.register("quantization")
@dataclass(frozen=True)
class QuantizationStatistics(AlgorithmStatistics):
    """Quantized tensors. ``compression_rate``: bits saved ÷ bits of the same weights before."""

    preset: str
    compression_rate: float
    quantized_weights: int
    quantized_activations: int
    tensors: list[LayerQuantization] = field(default_factory=list)


class StagedScheduler(BaseCompressionScheduler):
    """Switches activations and weights to quantized values at their epochs.

    Args:
        controller: of the quantization.
    """

    def __init__(self, controller: "QuantizationController") -> None:
        super().__init__()
        self.controller = controller

    def epoch_step(self, next: int | None = None) -> None:
        """See the base. Where something is switched on, its ranges are initialised anew."""
        super().epoch_step(next)
        params = self.controller.config.params
        if self.current_epoch >= params.weights_quant_start_epoch:
            self.controller.switch_on("weights")
        if self.current_epoch >= params.activations_quant_start_epoch:
            self.controller.switch_on("activations")


class QuantizationController(BaseCompressionAlgorithmController):
    """Simulates quantized weights and layer inputs.

    Its rate is the share of the quantized weights' bits that is saved. A range that was initialised from data
    is kept; one that was not, follows what the simulator observes.
    """

    def __init__(self, target_model: nn.Module, config: QuantizationConfig, builder: Any) -> None:
        super().__init__(target_model)
        self.config = config
        self._builder = builder
        self.weights = builder.weight_simulators(target_model)
        self.activations = input_simulators(target_model)
        self._scheduler = StagedScheduler(self)
        self._on = {
            "weights": config.params.weights_quant_start_epoch == 0,
            "activations": config.params.activations_quant_start_epoch == 0,
        }
        for part, on in self._on.items():
            if not on:
                self._switch(part, False)

    def _switch(self, part: str, on: bool) -> None:
        for simulator in getattr(self, part).values():
            simulator.enable_fake_quant(on)

    def switch_on(self, part: str) -> None:
        """Quantize the ``weights`` or the ``activations`` from now on."""
        if self._on[part]:
            return
        self._on[part] = True
        self._builder.initialize_ranges(self._model, part)
        self._switch(part, True)

    def observe_over_ranks(self) -> None:
        """Let ranges that were not initialised from data follow the inputs of all ranks."""
        if not self.config.initializer.range.num_init_samples:
            for simulator in self.activations.values():
                quantizers.observe_over_ranks(simulator)

    def _get_compression_rate(self) -> float:
        saved = full = 0
        for name, simulator in self.weights.items():
            weight = original(self._model.get_submodule(name))
            bits = 8 * weight.element_size()
            full += bits * weight.numel()
            if self._on["weights"]:
                saved += (bits - (simulator.n_bits or bits)) * weight.numel()
        return saved / max(full, 1)

    def compression_stage(self) -> CompressionStage:
        """FULLY_COMPRESSED once weights and activations are quantized."""
        full, none = CompressionStage.FULLY_COMPRESSED, CompressionStage.UNCOMPRESSED
        return CompressionStage.combine(full if on else none for on in self._on.values())

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """See the base."""
        tensors = [
            LayerQuantization(
                name=name,
                tensor=part.removesuffix("s"),
                bits=simulator.n_bits,
                scheme=str(simulator.qscheme),
                granularity=type(simulator.granularity).__name__.removesuffix("Granularity"),
                enabled=self._on[part],
            )
            for part in ("weights", "activations")
            for name, simulator in getattr(self, part).items()
        ]
        own = QuantizationStatistics(
            self.config.preset, self.compression_rate, len(self.weights), len(self.activations), tensors
        )
        return CompressionStatistics(quantization=own)

    def strip_model(self, model: nn.Module) -> None:
        """Leave quantized values in the weights; the simulators of inputs stay, and observe no more."""
        bake(model, (FakeQuantizeImplBase, LearnableRangeQuantize))
        for simulator in input_simulators(model).values():
            simulator.enable_observer(False)

    def lower_model(self, model: nn.Module) -> None:
        """Strip, and leave the weights' parameters in the layers: pruning takes its share of them, too."""
        if not all(self._on.values()):
            raise RuntimeError("a model is exported once weights and activations are quantized: see params")
        found = {}
        for name in self.weights:
            layer = model.get_submodule(name)
            with torch.no_grad():
                _ = layer.weight  # observes once more
            found[name] = self._builder.weight_simulators(model)[name].calculate_qparams()
        self.strip_model(model)
        for name, (scale, zero_point, _) in found.items():
            layer = model.get_submodule(name)
            layer.register_buffer(qdq.SCALE, scale.detach(), persistent=False)
            layer.register_buffer(qdq.ZERO_POINT, zero_point.detach(), persistent=False)

    def finish_lowering(self, model: nn.Module) -> None:
        """Put QuantizeLinear and DequantizeLinear where the simulators were."""
        qdq.install_qdq(model, self.weights, self.activations)

    def _get_algorithm_state(self) -> State:
        return dict(self._on)

    def _load_algorithm_state(self, state: State) -> None:
        for part in self._on:
            self._on[part] = state[part]
            self._switch(part, state[part])


@BaseCompressionAlgorithmBuilder.register("quantization")
class QuantizationBuilder(BaseCompressionAlgorithmBuilder):
    """Quantizes the weights and the inputs of convolutions and linear layers."""

    config_type = QuantizationConfig
    order = 80

    def check(self, model: nn.Module) -> None:
        """See the base."""
        select_layers(model, self.config)
        if self.config.learnable_ranges and not self._collects:
            raise ValueError("learnable_ranges starts from ranges of data: num_init_samples must not be 0")
        if self._collects and self.context.initialize:
            require_loader(self.context)

    @property
    def _collects(self) -> bool:
        return bool(self.config.initializer.range.num_init_samples)

    def weight_simulators(self, model: nn.Module) -> dict[str, Any]:
        """The simulators of weights, by the name of their layer."""
        simulators: tuple[Any, ...] = (FakeQuantizeImplBase, LearnableRangeQuantize)
        return installed(model, simulators)  # type: ignore[arg-type]

    def _apply_to(self, model: nn.Module) -> None:
        layers = select_layers(model, self.config)
        if self._loaded is not None:
            self._signed: dict[str, bool] = dict(self._loaded["signed"])
            ranges: Ranges = {}
        else:
            names = self._names_with_quantized_inputs(model, layers)
            ranges = self._collect(model, names) if self._collects and self.context.initialize else {}
            self._signed = self._signs(names, ranges)
        for name, layer in layers.items():
            quantizers.put_on_weight(layer, self._learned(self._weight_simulator(name, layer)))
            if name in self._signed:
                simulator = self._input_simulator(name, original(layer).device, ranges.get(name))
                quantizers.put_on_input(layer, self._learned(simulator))

    def _weight_simulator(self, name: str, layer: nn.Module) -> FakeQuantizeImplBase:
        weight, axis = original(layer), self._axis(layer)
        spec = self.config.weights.spec(self.config.weights.signed is not False, axis)
        target = CompressionTargetTensor.WEIGHT
        simulator = quantizers.make_simulator(spec, target, f"{name}.weight", weight.device)
        if needs_fixed_range(self.config.initializer.range):
            low, high = weight_range(weight, axis, self.config.initializer.range)
            quantizers.set_range(simulator, low, high, weight.shape, axis)
        elif self.config.learnable_ranges:
            simulator(weight.detach())
        return simulator

    def _input_simulator(self, name: str, device: torch.device, found: Any) -> FakeQuantizeImplBase:
        spec = self.config.activations.spec(self._signed[name])
        target = CompressionTargetTensor.ACTIVATION
        simulator = quantizers.make_simulator(spec, target, f"{name} input", device)
        if found is not None:
            self._set_input_range(simulator, name, *found)
        return simulator

    def _set_input_range(self, simulator: Any, name: str, low: Tensor, high: Tensor) -> None:
        if not self._signed[name] and self.config.activations.mode == "symmetric":
            low = low.clamp(min=0)
        quantizers.set_range(simulator, low, high, torch.Size([2]), None)

    def _learned(self, simulator: FakeQuantizeImplBase) -> nn.Module:
        """The simulator, or one with its range to be learned."""
        if not self.config.learnable_ranges:
            return simulator
        scale: Any = simulator.qparams_calculator.scale
        # A range that comes from a saved state has not been observed.
        shape = tuple(scale.shape) if scale.numel() else (1,)
        learned = LearnableRangeQuantize(simulator, shape, scale.device)  # type: ignore[arg-type]
        if scale.numel():
            learned.adopt(simulator)
        for parameter in learned.parameters():
            self.scale_gradient(parameter)
        return learned

    def _axis(self, layer: nn.Module) -> int | None:
        return channel_axis_of(layer) if self.config.weights.per_channel else None

    def _initialize(self, model: nn.Module) -> None:
        samples = self.config.initializer.batchnorm_adaptation.num_bn_adaptation_samples
        adapt_batchnorm(model, self.context, samples)

    def initialize_ranges(self, model: nn.Module, part: str) -> None:
        """Find the ranges of the ``weights`` or ``activations`` anew."""
        if part == "weights":
            for name, simulator in self.weight_simulators(model).items():
                fresh = self._weight_simulator(name, model.get_submodule(name))
                self._renew(simulator, fresh)
        elif self._collects and self.context.init_args.train_loader is not None:
            simulators = input_simulators(model)
            for name, found in self._collect(model, list(self._signed)).items():
                self._renew(simulators[name], self._input_simulator(name, found[0].device, found))

    def _renew(self, simulator: Any, fresh: FakeQuantizeImplBase) -> None:
        """Give a simulator the range of a fresh one, if that has one."""
        if isinstance(simulator, LearnableRangeQuantize):
            simulator.adopt(fresh)
        elif fresh.qparams_calculator.scale.numel():  # type: ignore[operator, union-attr]
            calculator = fresh.qparams_calculator
            simulator.qparams_calculator.load_state_dict(calculator.state_dict())
            simulator.enable_observer(False)

    def _signs(self, names: list[str], ranges: Ranges) -> dict[str, bool]:
        asked = self.config.activations
        if asked.signed is not None:
            return dict.fromkeys(names, asked.signed)
        if asked.mode == "asymmetric":
            return dict.fromkeys(names, False)
        lows = torch.stack([ranges[name][0] for name in names]).tolist() if ranges else []
        return dict.fromkeys(names, True) | {n: low < 0 for n, low in zip(names, lows, strict=bool(ranges))}

    @torch.no_grad()
    def _collect(self, model: nn.Module, names: list[str]) -> Ranges:
        """Ranges of the unquantized inputs of layers, from the registered loader."""
        initializer = self.config.initializer.range
        symmetric = self.config.activations.mode == "symmetric"
        found = {name: ActivationRange(initializer, symmetric) for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda layer, args, kwargs, to=found[name]: to.observe(args[0] if args else kwargs["input"]),
                with_kwargs=True,
                prepend=True,
            )
            for name in names
        ]
        self._run(model, handles, batches(self.context, model, initializer.num_init_samples))
        return {name: each.result() for name, each in found.items()}

    @torch.no_grad()
    def _names_with_quantized_inputs(self, model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
        if self.config.quantize_inputs:
            return list(layers)
        args, kwargs = example_inputs(self.context, model)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        from_outside: set[str] = set()

        def look(name: str, value: Tensor) -> None:
            if any(value is each for each in given):
                from_outside.add(name)

        handles = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: look(name, args[0] if args else kwargs["input"]),
                with_kwargs=True,
            )
            for name, layer in layers.items()
        ]
        self._run(model, handles, [(args, kwargs)])
        return [name for name in layers if name not in from_outside]

    def _run(self, model: nn.Module, handles: list[Any], inputs: Any) -> None:
        try:
            with training_flags(model, False):
                for args, kwargs in inputs:
                    model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def build_controller(self, model: nn.Module) -> QuantizationController:
        """See the base."""
        return QuantizationController(model, self.config, self)

    def _get_state(self) -> State:
        return {"signed": dict(self._signed)}
