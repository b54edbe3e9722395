"""Builds quantization into a model: what is quantized, with which simulators and ranges."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.base_model_compressor import training_flags
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.controllers.algorithms import quantizers
from coreai_opt.controllers.algorithms.learnable import LearnableRangeQuantize
from coreai_opt.controllers.algorithms.precision import (
    assign_bits,
    hessian_traces,
    multiplications,
    output_errors,
)
from coreai_opt.controllers.algorithms.quantization import QuantizationController
from coreai_opt.controllers.algorithms.quantization_config import (
    PrecisionInitializer,
    QuantizationConfig,
    TensorConfig,
)
from coreai_opt.controllers.algorithms.quantization_plan import (
    Settings,
    Uses,
    WeightKey,
    attention_weights,
    named,
    observe_uses,
)
from coreai_opt.controllers.algorithms.ranges import ActivationRange, needs_fixed_range, weight_range
from coreai_opt.controllers.core.api import State
from coreai_opt.controllers.core.base import BaseCompressionAlgorithmBuilder
from coreai_opt.controllers.core.batchnorm import adapt_batchnorm
from coreai_opt.controllers.core.inputs import batches, has_example, losses, one_batch, require_loader
from coreai_opt.controllers.core.layers import WEIGHTED, channel_axis_of
from coreai_opt.controllers.core.masks import install, original
from coreai_opt.controllers.core.owners import Owners
from coreai_opt.controllers.core.scopes import modules_in_scope
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["QuantizationBuilder"]

logger = logging.getLogger(__name__)

Ranges = dict[str, tuple[Tensor, Tensor]]


def _observe(to: ActivationRange, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in quantizers.inputs_of(layer, args, kwargs):
        to.observe(value)


@BaseCompressionAlgorithmBuilder.register("quantization")
class QuantizationBuilder(BaseCompressionAlgorithmBuilder):
    """Quantizes the weights and the inputs of convolutions, linear layers and attention."""

    config_type = QuantizationConfig
    order = 80

    def check(self, model: nn.Module) -> None:
        """See the base."""
        layers = self.layers(model)
        self._settings = Settings(model, self.config)
        if self.config.learnable_ranges and not all(self.num_init_samples(name) for name in layers):
            raise ValueError("learnable_ranges starts from ranges of data: num_init_samples must not be 0")
        if self.context.initialize and any(self.num_init_samples(name) for name in layers):
            require_loader(self.context)
        precision = self.config.initializer.precision
        if precision is not None and precision.type != "manual":
            bits = self._loaded["bits"] if self._loaded is not None else self._search_bits(model, precision)
            self._bits: dict[str, int] = dict(bits)
            self._settings.assign_bits(self._bits)
        if self.config.activations.unified_scale_ops is not None:
            self.leave_whole(
                "unified_scale_ops", "each layer's input has a range of its own; equal tensors get equal ones"
            )

    def _search_bits(self, model: nn.Module, precision: PrecisionInitializer) -> dict[str, int]:
        """Bits by what each layer loses with them, before anything is changed."""
        layers = {
            name: layer
            for name, layer in self.layers(model).items()
            if self._settings.tensor("weights", name) is not None
        }
        weights = {name: original(layer) for name, layer in layers.items()}
        values = {name: weight.detach().clone() for name, weight in weights.items()}

        def quantized(name: str, bits: int) -> Tensor:
            self._settings.assign_bits({name: bits})
            with torch.no_grad():
                return self._weight_simulator((name, "weight"), layers[name])(values[name])  # type: ignore[no-any-return]

        if precision.type == "autoq":
            data = list(batches(self.context, model, precision.num_data_points))
            sensitivities = output_errors(model, weights, quantized, precision.bits, data)
        else:
            traces = hessian_traces(
                model,
                weights,
                lambda: losses(self.context, model, precision.num_data_points),
                precision.iter_number,
                precision.tolerance,
            )
            sensitivities = {
                name: {
                    bits: max(traces[name], 0.0)
                    * float((quantized(name, bits) - values[name]).float().square().sum())
                    for bits in precision.bits
                }
                for name in layers
            }
        costs = multiplications(model, layers, *one_batch(self.context, model))
        chosen = assign_bits(sensitivities, costs, precision.compression_ratio)
        logger.info("precision: what layers lose %s, bits %s", sensitivities, chosen)
        return chosen

    def num_init_samples(self, name: str) -> int:
        """See :class:`.quantization.RangeFinder`."""
        return self._settings.range_initializer("activations", name).num_init_samples

    def has_fixed_range(self, key: WeightKey) -> bool:
        """See :class:`.quantization.RangeFinder`."""
        return needs_fixed_range(self._settings.range_initializer("weights", key[0]))

    def _apply_to(self, model: nn.Module) -> None:
        if not hasattr(self, "_settings"):
            self.check(model)
        if self._loaded is not None:
            keys = self._loaded.get("weights") or [(name, "weight") for name in self.layers(model)]
            self._weights: list[WeightKey] = [(layer, name) for layer, name in keys]
            self._signed: dict[str, bool] = dict(self._loaded["signed"])
            self._outputs: int = self._loaded.get("outputs", 0)
            ranges: Ranges = {}
        else:
            names = self._find(model)
            ranges = self._collect(model, names) if self.context.initialize else {}
            self._signed = self._signs(names, ranges)
        owners = Owners(model)
        for index, key in enumerate(self._weights):
            layer, attribute = model.get_submodule(key[0]), key[1]
            simulator = self._learned(self._weight_simulator(key, layer, first=index == 0), "weights")
            install(layer, simulator, owners, attribute)
        device = original(model.get_submodule(self._weights[0][0]), self._weights[0][1]).device
        outputs = []
        for name in self._signed:
            simulator = self._learned(self._input_simulator(model, name, device, ranges), "activations")
            if name.startswith(quantizers.OUTPUT):
                outputs.append(simulator)
            else:
                quantizers.put_on_input(model.get_submodule(name), simulator)
        if outputs:
            quantizers.put_on_outputs(model, outputs)

    def _find(self, model: nn.Module) -> list[str]:
        """Decide which weights and inputs are quantized; returns the latter."""
        chosen = modules_in_scope(model, self.config)
        keys: list[WeightKey] = [
            *((name, "weight") for name in self.layers(model)),
            *attention_weights(model, chosen),
        ]
        keys = [key for key in keys if self._settings.tensor("weights", key[0]) is not None]
        # A weight in several layers is quantized once; each layer's input has a range of its own.
        readers = self._readers(model, keys, chosen)
        uses = self._uses(model, keys, readers)
        self._weights = [key for key in keys if uses is None or key in uses.read]
        for key in keys:
            if key not in self._weights:
                self.leave_whole(named(key), "nothing reads its weight in a forward in evaluation mode")
        if not self._weights:
            raise ValueError("quantization: a forward in evaluation mode reads none of the weights in scope")
        names = []
        for name in readers:
            if self._settings.tensor("activations", name) is None:
                continue
            if uses is None or name in uses.called:
                if uses is None or self.config.quantize_inputs or name not in uses.from_outside:
                    names.append(name)
            elif any(layer == name for layer, _ in self._weights):
                self.leave_whole(
                    f"input of {name}", "a function reads the weight; the layer's forward does not run"
                )
        self._outputs = uses.outputs if uses is not None and self.config.quantize_outputs else 0
        return [*names, *(f"{quantizers.OUTPUT}.{index}" for index in range(self._outputs))]

    def _readers(self, model: nn.Module, keys: list[WeightKey], chosen: set[str]) -> dict[str, nn.Module]:
        owners = Owners(model)
        found = {}
        for name, attribute in keys:
            for path, module, _ in owners.of(model.get_submodule(name), attribute):
                if isinstance(module, (*WEIGHTED, nn.MultiheadAttention)) and path in chosen:
                    found[path] = module
        return {name: module for name, module in model.named_modules() if name in found}

    def _uses(self, model: nn.Module, keys: list[WeightKey], layers: dict[str, nn.Module]) -> Uses | None:
        """What a forward uses; None if nothing tells the model's input, so that all is taken to be used."""
        if not has_example(self.context):
            if self.config.quantize_outputs or not self.config.quantize_inputs:
                one_batch(self.context, model)  # raises
            return None
        return observe_uses(model, one_batch(self.context, model), layers, keys)

    def _weight_config(self, key: WeightKey) -> TensorConfig:
        config = self._settings.tensor("weights", key[0])
        assert config is not None  # only those in scope are quantized
        return config

    def _weight_simulator(
        self, key: WeightKey, layer: nn.Module, first: bool = False
    ) -> FakeQuantizeImplBase:
        config, weight = self._weight_config(key), original(layer, key[1])
        axis = channel_axis_of(layer) if config.per_channel else None
        fix = self.config.overflow_fix
        half = config.bits == 8 and (fix == "enable" or (fix == "first_layer_only" and first))
        spec = config.spec(config.signed is not False, axis, half)
        target = CompressionTargetTensor.WEIGHT
        simulator = quantizers.make_simulator(spec, target, f"{key[0]}.{key[1]}", weight.device)
        initializer = self._settings.range_initializer("weights", key[0])
        if needs_fixed_range(initializer):
            low, high = weight_range(weight, axis, initializer)
            quantizers.set_range(simulator, low, high, weight.shape, axis)
        elif self.config.learnable_ranges:
            simulator(weight.detach())
        return simulator

    def _activation_config(self, name: str) -> TensorConfig:
        if name.startswith(quantizers.OUTPUT):
            own: TensorConfig = self.config.activations
            return own.model_copy(update={"per_channel": False})
        config = self._settings.tensor("activations", name)
        assert config is not None  # only those in scope are quantized
        return config

    def _input_axis(self, model: nn.Module, name: str) -> int | None:
        """Axis of an input's channels, where they have ranges of their own."""
        if not self._activation_config(name).per_channel:
            return None
        return -1 if isinstance(model.get_submodule(name), nn.Linear | nn.MultiheadAttention) else 1

    def _input_simulator(
        self, model: nn.Module, name: str, device: torch.device, ranges: Ranges
    ) -> FakeQuantizeImplBase:
        config, axis = self._activation_config(name), self._input_axis(model, name)
        spec = config.spec(self._signed[name], axis)
        target = CompressionTargetTensor.ACTIVATION
        simulator = quantizers.make_simulator(spec, target, f"{name} input", device)
        if name in ranges:
            low, high = ranges[name]
            if not self._signed[name] and config.mode == "symmetric":
                low = low.clamp(min=0)
            shape = torch.Size([2])
            if axis is not None:
                kernel = () if axis == -1 else getattr(model.get_submodule(name), "kernel_size", ())
                shape = torch.Size([1, low.numel(), *[1] * len(kernel)])
            quantizers.set_range(simulator, low, high, shape, None if axis is None else 1)
        return simulator

    def _learned(self, simulator: FakeQuantizeImplBase, group: str) -> nn.Module:
        """The simulator, or one with its range to be learned."""
        if not self.config.learnable_ranges:
            return simulator
        scale: Any = simulator.qparams_calculator.scale
        # A range that comes from a saved state has not been observed.
        shape = tuple(scale.shape) if scale.numel() else (1,)
        learned = LearnableRangeQuantize(
            simulator,
            shape,
            scale.device,
            getattr(self.config, group).logarithm_scale,
            self.gradient_factor,
        )
        if scale.numel():
            learned.adopt(simulator)
        return learned

    def _initialize(self, model: nn.Module) -> None:
        samples = self.config.initializer.batchnorm_adaptation.num_bn_adaptation_samples
        adapt_batchnorm(model, self.context, samples)

    def initialize_ranges(self, controller: QuantizationController, part: str) -> None:
        """Find the ranges of the ``weights`` or ``activations`` anew."""
        model = controller.model
        if part == "weights":
            for index, key in enumerate(self._weights):
                fresh = self._weight_simulator(key, model.get_submodule(key[0]), first=index == 0)
                self._renew(controller.weights[named(key)], fresh)
        elif self.context.init_args.train_loader is not None:
            for name, found in self._collect(model, list(self._signed)).items():
                fresh = self._input_simulator(model, name, found[0].device, {name: found})
                self._renew(controller.activations[name], fresh)

    def _renew(self, simulator: Any, fresh: FakeQuantizeImplBase) -> None:
        """Give a simulator the range of a fresh one, if that has one."""
        if isinstance(simulator, LearnableRangeQuantize):
            simulator.adopt(fresh)
        elif fresh.qparams_calculator.scale.numel():  # type: ignore[operator, union-attr]
            calculator = fresh.qparams_calculator
            simulator.qparams_calculator.load_state_dict(calculator.state_dict())
            simulator.enable_observer(False)

    def _signs(self, names: list[str], ranges: Ranges) -> dict[str, bool]:
        """Whether the integers of each input are signed: as asked for, or as its data are."""
        signs = {}
        lows = {name: ranges[name][0].amin() for name in names if name in ranges}
        values = torch.stack(list(lows.values())).tolist() if lows else []
        least = dict(zip(lows, values, strict=True))
        for name in names:
            config = self._activation_config(name)
            if config.signed is not None:
                signs[name] = config.signed
            else:
                signs[name] = config.mode == "symmetric" and least.get(name, -1.0) < 0
        return signs

    @torch.no_grad()
    def _collect(self, model: nn.Module, names: list[str]) -> Ranges:
        """Ranges of the unquantized inputs of layers, from the registered loader."""
        found: dict[str, ActivationRange] = {}
        samples = 0
        for name in names:
            initializer = self._settings.range_initializer("activations", name)
            if initializer.num_init_samples:
                samples = max(samples, initializer.num_init_samples)
                symmetric = self._activation_config(name).mode == "symmetric"
                found[name] = ActivationRange(initializer, symmetric, self._input_axis(model, name))
        if not found:
            return {}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                partial(_observe, to), with_kwargs=True, prepend=True
            )
            for name, to in found.items()
            if not name.startswith(quantizers.OUTPUT)
        ]
        try:
            with training_flags(model, False):
                for args, kwargs in batches(self.context, model, samples):
                    output = model(*args, **kwargs)
                    for index, value in enumerate(quantizers.floating(output)):
                        if f"{quantizers.OUTPUT}.{index}" in found:
                            found[f"{quantizers.OUTPUT}.{index}"].observe(value)
        finally:
            for handle in handles:
                handle.remove()
        empty = [name for name, each in found.items() if each.is_empty]
        if empty:
            raise ValueError(
                f"quantization: the registered loader gives no batch in which {empty} run, though an example "
                f"of the model's input does"
            )
        return {name: each.result() for name, each in found.items()}

    def build_controller(self, model: nn.Module) -> QuantizationController:
        """See the base."""
        return QuantizationController(model, self.config, self._weights, list(self._signed), self)

    def _get_state(self) -> State:
        return {
            "signed": dict(self._signed),
            "weights": [list(key) for key in self._weights],
            "outputs": self._outputs,
            "bits": dict(getattr(self, "_bits", {})),
        }
