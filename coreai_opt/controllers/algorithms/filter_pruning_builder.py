"""Builds filter pruning into a model: what can be pruned, and in which order."""

import copy

from torch import nn

from coreai_opt.controllers.algorithms.filter_pruning import (
    FilterMask,
    FilterPruningController,
    pruned_layers,
)
from coreai_opt.controllers.algorithms.filter_pruning_config import FilterPruningConfig
from coreai_opt.controllers.algorithms.legr import Evolution, LegrParams, load_coefficients, save_coefficients
from coreai_opt.controllers.core.api import State
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmBuilder,
)
from coreai_opt.controllers.core.batchnorm import adapt_batchnorm
from coreai_opt.controllers.core.inputs import example_inputs, loss_after_training
from coreai_opt.controllers.core.layers import CONVOLUTIONS
from coreai_opt.controllers.core.masks import install
from coreai_opt.controllers.core.scopes import matching, modules_in_scope
from coreai_opt.controllers.structures.channels import Channels, find_channels
from coreai_opt.controllers.structures.flops import CostModel
from coreai_opt.controllers.structures.verify import mask_axis, masked_tensors, removable

__all__ = ["FilterPruningBuilder"]


@BaseCompressionAlgorithmBuilder.register("filter_pruning")
class FilterPruningBuilder(BaseCompressionAlgorithmBuilder):
    """Masks the filters of convolutions, and what follows them."""

    config_type = FilterPruningConfig
    order = 10

    def check(self, model: nn.Module) -> None:
        """See the base. Follows the channels through the model, too."""
        self.layers(model, CONVOLUTIONS)
        self._inputs = example_inputs(self.context, model)
        channels = find_channels(model, *self._inputs)
        if self._loaded is not None and "clusters" in self._loaded:
            saved = [set(each) for each in self._loaded["clusters"]]
            numbers = [n for n, each in enumerate(channels.clusters) if set(each.producers) in saved]
        else:
            numbers = self._choose(model, channels)
        if not numbers:
            left = "; ".join(f"{each.name}: {each.reason}" for each in self.left_whole[:5])
            raise ValueError(
                "filter_pruning finds no filters to prune: channels that reach the model's output, or an "
                "operation that mixes them, stay; so do those that read the input (prune_first_conv) and "
                f"those of convolutions with strides (prune_downsample_convs). {left}".rstrip(". ")
            )
        self._channels = channels.only(numbers)
        self._costs = CostModel(model, self._channels, *self._inputs)

    def _choose(self, model: nn.Module, channels: Channels) -> list[int]:
        """The clusters that the configuration wants pruned, and that can be; says which cannot."""
        params, scope = self.config.params, modules_in_scope(model, self.config)
        ignored = matching(self.config.ignored_scopes, model, "ignored_scopes", self.config.validate_scopes)
        ran = {*channels.producers, *channels.followers}
        for name in self.layers(model, CONVOLUTIONS):
            if name in channels.whole:
                self.leave_whole(name, channels.whole[name])
            elif name not in ran and name not in {run.layer for run in channels.runs}:
                self.leave_whole(name, "its forward does not run")
        numbers = []
        for number, cluster in enumerate(channels.clusters):
            outside = [name for name in cluster.producers if name not in scope]
            outside += [
                name
                for name in cluster.followers
                if name in ignored
                or (name not in scope and isinstance(model.get_submodule(name), CONVOLUTIONS))
            ]
            if outside:
                for name in (name for name in cluster.producers if name in scope):
                    self.leave_whole(name, f"{outside[0]!r}, which is not in scope, has the same channels")
            elif (params.prune_first_conv or not cluster.reads_input) and (
                params.prune_downsample_convs or not cluster.strided
            ):
                numbers.append(number)
        good, bad = removable(model, channels.only(numbers), *self._inputs)
        for index, reason in bad.items():
            for name in channels.clusters[numbers[index]].producers:
                self.leave_whole(name, reason)
        return [numbers[index] for index in good]

    def _get_state(self) -> State:
        return {"clusters": [list(cluster.producers) for cluster in self._channels.clusters]}

    def _apply_to(self, model: nn.Module) -> None:
        if not hasattr(self, "_channels"):
            self.check(model)
        for name, spans in pruned_layers(self._channels).items():
            layer = model.get_submodule(name)
            for attribute in masked_tensors(layer):
                tensor = getattr(layer, attribute)
                axis = mask_axis(layer, tensor)
                outputs = sum(span.entries for span in spans)
                mask = FilterMask(tensor.shape[axis], axis, tensor.dim(), tensor.device, outputs)
                install(layer, mask, name=attribute)

    def _initialize(self, model: nn.Module) -> None:
        """Mask to the initial level: algorithms that are built in later see masked weights."""
        self._controller = self._make_controller(model)
        if self.config.params.interlayer_ranking_type == "learned_ranking":
            self._controller.coefficients = self._learn_ranking(model, self._controller)
        if self.config.pruning_init > 0:
            self._controller.set_level(self.config.pruning_init)
        adapt_batchnorm(model, self.context, self.config.initializer.samples)

    def _learn_ranking(
        self, model: nn.Module, controller: FilterPruningController
    ) -> list[tuple[float, float]]:
        params, names = self.config.params, [each.producers[0] for each in self._channels.clusters]
        if params.load_ranking_coeffs_path is not None:
            return load_coefficients(params.load_ranking_coeffs_path, names)
        legr: LegrParams = params.legr_params
        search = Evolution(controller.relative_importances(), legr)
        state = copy.deepcopy(model.state_dict())

        def judge(coefficients: list[tuple[float, float]]) -> float:
            controller.coefficients = coefficients
            controller.set_level(legr.max_pruning)
            try:
                return loss_after_training(self.context, model, legr.train_steps)
            finally:
                model.load_state_dict(state)

        found = search.run(judge)
        controller.coefficients = None
        controller.set_level(0.0)
        if params.save_ranking_coeffs_path is not None:
            save_coefficients(params.save_ranking_coeffs_path, dict(zip(names, found, strict=True)))
        return found

    def _make_controller(self, model: nn.Module) -> FilterPruningController:
        return FilterPruningController(
            model,
            self.config,
            self._channels,
            self._costs,
            self.context.init_args.steps_per_epoch,
        )

    def build_controller(self, model: nn.Module) -> FilterPruningController:
        """See the base."""
        return getattr(self, "_controller", None) or self._make_controller(model)
