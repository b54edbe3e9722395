"""Quantization-aware training on the fused simulators: the controller."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from coreai_opt.common import ExportBackend
from coreai_opt.controllers.algorithms import quantizers
from coreai_opt.controllers.algorithms.learnable import LearnableRangeQuantize
from coreai_opt.controllers.algorithms.quantization_config import QuantizationConfig
from coreai_opt.controllers.algorithms.quantization_plan import WeightKey, named
from coreai_opt.controllers.core import qdq
from coreai_opt.controllers.core.api import CompressionStage, State
from coreai_opt.controllers.core.base import BaseCompressionAlgorithmController
from coreai_opt.controllers.core.layers import INPUT, OUTPUT
from coreai_opt.controllers.core.lowering import (
    LoweredActivation,
    LoweredWeight,
    quantized_activation,
    quantized_weight,
)
from coreai_opt.controllers.core.masks import bake, original
from coreai_opt.controllers.core.owners import Owners
from coreai_opt.controllers.core.schedulers import BaseCompressionScheduler, Change, place_of
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.quantization.config import QATSchedule
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["QuantizationController", "RangeFinder", "StagedScheduler"]

logger = logging.getLogger(__name__)

_SIMULATORS: tuple[Any, ...] = (FakeQuantizeImplBase, LearnableRangeQuantize)


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


class RangeFinder(Protocol):
    """Finds ranges from data."""

    def initialize_ranges(self, controller: "QuantizationController", part: str) -> None:
        """Set the ranges of the controller's ``weights`` or ``activations`` anew."""

    def num_init_samples(self, name: str) -> int:
        """Samples from which an activation's range is initialised; 0 where it follows the data."""

    def has_fixed_range(self, key: WeightKey) -> bool:
        """Whether a weight's range is initialised once, and does not follow the weight."""


def weight_simulator(model: nn.Module, key: WeightKey) -> Any:
    """The simulator of a weight."""
    chains: Any = model.get_submodule(key[0]).parametrizations
    return next(link for link in chains[key[1]] if isinstance(link, _SIMULATORS))


def _activation_simulator(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name if name.startswith(OUTPUT) else f"{name}.{INPUT}")


def _integers_of(simulator: Any) -> float:
    return float(simulator.quant_max) - float(simulator.quant_min) + 1


class StagedScheduler(BaseCompressionScheduler):
    """Switches activations and weights to quantized values at their epochs.

    Args:
        controller: of the quantization.
    """

    def __init__(self, controller: "QuantizationController") -> None:
        super().__init__()
        self.controller = controller

    def planned(self, epochs: int, steps_per_epoch: int | None) -> list[Change]:
        """When weights and activations begin to be quantized, and when ranges begin and end to follow."""
        params = self.controller.config.params
        if params.schedule is not None:
            return self._planned_by_step(params.schedule, epochs, steps_per_epoch)
        starts = {
            "weights": params.weights_quant_start_epoch,
            "activations": params.activations_quant_start_epoch,
        }
        parts = sorted(starts, key=lambda part: starts[part])
        return [(starts[part], 0, f"{part} quantized", None) for part in parts if starts[part] < epochs]

    def _planned_by_step(
        self, schedule: QATSchedule, epochs: int, steps_per_epoch: int | None
    ) -> list[Change]:
        steps = [
            (schedule.enable_observer, "ranges follow"),
            (schedule.enable_fake_quant, "weights and activations quantized"),
            (schedule.disable_observer, "ranges stay"),
        ]
        places = [(place_of(step, steps_per_epoch), what) for step, what in steps if step is not None]
        return [(*place, what, None) for place, what in places if place[0] < epochs]

    def step(self, next: int | None = None) -> None:
        """See the base. Where something is switched on, its ranges are initialised anew."""
        super().step(next)
        schedule = self.controller.config.params.schedule
        if schedule is not None:
            observes, simulates = schedule.flags_at(max(self.current_step, 0))
            self.controller.let_ranges_follow(observes)
            for part in ("weights", "activations") if simulates else ():
                self.controller.switch_on(part)

    def epoch_step(self, next: int | None = None) -> None:
        """See :meth:`step`."""
        super().epoch_step(next)
        params = self.controller.config.params
        if params.schedule is not None:
            return
        if self.current_epoch >= params.weights_quant_start_epoch:
            self.controller.switch_on("weights")
        if self.current_epoch >= params.activations_quant_start_epoch:
            self.controller.switch_on("activations")


class QuantizationController(BaseCompressionAlgorithmController):
    """Simulates quantized weights and layer inputs.

    Its rate is the share of the quantized weights' bits that is saved. A range that was initialised from data
    is kept; one that was not, follows what the simulator observes.

    Args:
        target_model: the compressed model.
        config: of the algorithm.
        weights: layers and attributes of the quantized weights.
        activations: names of the layers with quantized inputs, and of quantized outputs.
        builder: finds ranges anew when a stage begins.
    """

    def __init__(
        self,
        target_model: nn.Module,
        config: QuantizationConfig,
        weights: Sequence[WeightKey],
        activations: Sequence[str],
        builder: RangeFinder,
    ) -> None:
        super().__init__(target_model)
        self.config = config
        self._builder = builder
        self._keys = {named(key): key for key in weights}
        self.weights = {name: weight_simulator(target_model, key) for name, key in self._keys.items()}
        self.activations = {name: _activation_simulator(target_model, name) for name in activations}
        self._scheduler = StagedScheduler(self)
        self._on = {part: config.params.starts_at_once(part) for part in ("weights", "activations")}
        self._follows = True
        if config.params.schedule is not None:
            self.let_ranges_follow(config.params.schedule.flags_at(0)[0])
        for part, on in self._on.items():
            if not on:
                self._switch(part, False)

    def _switch(self, part: str, on: bool) -> None:
        for simulator in getattr(self, part).values():
            simulator.enable_fake_quant(on)

    def let_ranges_follow(self, on: bool) -> None:
        """Let the ranges that were not initialised from data follow what is observed, or stay."""
        if on == self._follows:
            return
        self._follows = on
        for name, simulator in self.weights.items():
            if not self._builder.has_fixed_range(self._keys[name]):
                simulator.enable_observer(on)
        for name, simulator in self.activations.items():
            if not self._builder.num_init_samples(name):
                simulator.enable_observer(on)

    def switch_on(self, part: str) -> None:
        """Quantize the ``weights`` or the ``activations`` from now on."""
        if self._on[part]:
            return
        self._on[part] = True
        self._builder.initialize_ranges(self, part)
        self._switch(part, True)

    def observe_over_ranks(self) -> None:
        """Let ranges that were not initialised from data follow the inputs of all ranks."""
        for name, simulator in self.activations.items():
            if not self._builder.num_init_samples(name):
                quantizers.observe_over_ranks(simulator)

    def _get_compression_rate(self) -> float:
        saved = full = 0
        for name, simulator in self.weights.items():
            weight = self._parameter(name)
            bits = 8 * weight.element_size()
            full += bits * weight.numel()
            if self._on["weights"]:
                saved += (bits - (simulator.n_bits or bits)) * weight.numel()
        return saved / max(full, 1)

    def _parameter(self, name: str) -> nn.Parameter:
        layer, attribute = self._keys[name]
        return original(self._model.get_submodule(layer), attribute)

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
            self.config.preset,
            self.compression_rate,
            len(self.weights),
            len(self.activations),
            tensors,
            left_whole=self.left_whole,
        )
        return CompressionStatistics(quantization=own)

    def strip_model(self, model: nn.Module) -> None:
        """Leave quantized values in the weights; the simulators of inputs stay, and observe no more."""
        bake(model, _SIMULATORS)
        for name in self.activations:
            _activation_simulator(model, name).enable_observer(False)

    def lower_model(self, model: nn.Module) -> None:
        """Strip, and leave the weights' parameters in the layers: pruning takes its share of them, too."""
        if not all(self._on.values()):
            raise RuntimeError("a model is exported once weights and activations are quantized: see params")
        found: list[tuple[nn.Module, str, Any]] = []
        owners = Owners(model)
        for key in self._keys.values():
            for _, layer, attribute in owners.of(model.get_submodule(key[0]), key[1]):
                with torch.no_grad():
                    _ = getattr(layer, attribute)  # observes once more
                found.append((layer, attribute, weight_simulator(model, key).calculate_qparams()))
        self.strip_model(model)
        for layer, attribute, (scale, zero_point, _) in found:
            qdq.keep_parameters(layer, attribute, scale, zero_point)

    def lowered_weights(self, model: nn.Module, backend: ExportBackend) -> Iterator[LoweredWeight]:
        """See the base."""
        owners = Owners(model)
        for name, key in self._keys.items():
            for path, layer, attribute in owners.of(model.get_submodule(key[0]), key[1]):
                scale, zero_point = qdq.take_parameters(layer, attribute)
                weight: Any = getattr(layer, attribute)
                record = quantized_weight(weight.detach(), scale, zero_point, self.weights[name], backend)
                yield LoweredWeight(f"{path}.{attribute}", layer, attribute, record)

    def lowered_activations(self, model: nn.Module) -> Iterator[LoweredActivation]:
        """See the base."""
        dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
        for name, simulator in self.activations.items():
            scale, zero_point, _ = simulator.calculate_qparams()
            if not scale.numel():
                self._leave_whole(model, name)
                continue
            record = quantized_activation(scale, zero_point, simulator, dtype)
            path = name if name.startswith(OUTPUT) else f"{name}.{INPUT}"
            owner, _, child = path.rpartition(".")
            yield LoweredActivation(path, model.get_submodule(owner), child, record)

    def _leave_whole(self, model: nn.Module, name: str) -> None:
        logger.warning("the input of %s is exported unquantized: nothing was observed there", name)
        quantizers.take_off_input(model.get_submodule(name))

    def finish_lowering(self, model: nn.Module) -> None:
        """Put QuantizeLinear and DequantizeLinear where the simulators were."""
        owners = Owners(model)
        for name, key in self._keys.items():
            for _, layer, attribute in owners.of(model.get_submodule(key[0]), key[1]):
                qdq.put_on_weight(layer, attribute, self.weights[name])
        for name, simulator in self.activations.items():
            self._lower_activation(model, name, simulator)
        if any(each.n_bits == 8 and _integers_of(each) > 128 for each in self.weights.values()):
            logger.info(
                "int8 weights of full range are exported: on CPUs with AVX2 and without VNNI, ONNX Runtime "
                "sums products in 16 bits, which saturate; set x64quantprecision to 1 in the session's "
                "options there, or quantize with overflow_fix: enable"
            )

    def _lower_activation(self, model: nn.Module, name: str, simulator: Any) -> None:
        scale, zero_point, _ = simulator.calculate_qparams()
        if not scale.numel():
            self._leave_whole(model, name)
            return
        axis = None
        if scale.numel() > 1:
            last = isinstance(model.get_submodule(name), nn.Linear | nn.MultiheadAttention)
            axis = -1 if last else 1
        pair = qdq.quantize_dequantize(simulator, scale, zero_point, axis)
        if name.startswith(OUTPUT):
            outputs: Any = model.get_submodule(OUTPUT)
            outputs[int(name.rpartition(".")[2])] = pair
        else:
            setattr(model.get_submodule(name), INPUT, pair)

    def _get_algorithm_state(self) -> State:
        return dict(self._on)

    def _load_algorithm_state(self, state: State) -> None:
        for part in self._on:
            self._on[part] = state[part]
            self._switch(part, state[part])
