"""The pruner of models: masks by magnitude, on a schedule."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coreai_kernels
from coreai_opt import _prepared_models
from coreai_opt._restoring import undone_on_failure
from coreai_opt._sharding.layout import is_sharded, with_local
from coreai_opt._sharding.masks import whole_mask
from coreai_opt._sharding.selecting import topk_masks
from coreai_opt._state_tensors import StateTarget
from coreai_opt.base_model_compressor import (
    EagerCompressionComponentBuilderMixin,
    _BaseModelCompressor,
    original_of,
    require_mapping,
)
from coreai_opt.common import CompressionType, ExportBackend
from coreai_opt.pruning._export import finalize_pruned
from coreai_opt.pruning._semi_structured import store_semi_structured
from coreai_opt.pruning.config.magnitude_pruner_config import MagnitudePrunerConfig
from coreai_opt.pruning.spec.prune import PruneImplBase, _MagnitudePruneImpl
from coreai_opt.pruning.spec.scheme import Unstructured, kept_of

__all__ = ["MagnitudePruner"]

logger = logging.getLogger(__name__)


class _BasePruner(_BaseModelCompressor):
    """Base of the pruners."""


class MagnitudePruner(EagerCompressionComponentBuilderMixin, _BasePruner):
    """Prunes the smallest magnitudes of a model's weights.

    ``prepare`` puts masks on the weights, as torch parametrizations; then the model is trained as always,
    with ``step()`` after each optimizer step; ``finalize`` leaves plain weights with zeros in them::

        pruner = MagnitudePruner(model, config)
        pruner.prepare((images,))
        for images, labels in loader:
            ...
            optimizer.step()
            pruner.step()
        pruner.finalize(backend=ExportBackend.Torch)

    Masks and steps are part of the prepared model's ``state_dict``: training that is taken up again from
    there goes on as if it had not been interrupted. A state in which tensors have different steps is a
    RuntimeError of ``load_state_dict``, after loading.

    Args:
        model: is changed in place.
        config: what to prune; None for half of every weight.

    Raises:
        TypeError: ``model`` is no module, or ``config`` no :class:`MagnitudePrunerConfig`.
    """

    _config_class = MagnitudePrunerConfig
    _kind = CompressionType.PRUNING
    _simulator_class = PruneImplBase
    _supported_modules = (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.MultiheadAttention,
    )
    _op_types: ClassVar[dict[Callable[..., Any], str]] = {
        F.linear: "linear",
        F.conv1d: "conv1d",
        F.conv2d: "conv2d",
        F.conv3d: "conv3d",
        F.conv_transpose1d: "conv_transpose1d",
        F.conv_transpose2d: "conv_transpose2d",
        F.conv_transpose3d: "conv_transpose3d",
        F.multi_head_attention_forward: "multi_head_attention",
    }

    def __init__(self, model: nn.Module, config: MagnitudePrunerConfig | None = None) -> None:
        super().__init__(model, config)

    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Mapping[str, Any],
        *,
        state_dict: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Put masks on the weights that the model uses, at the sparsity of step 0. Returns the model.

        Args:
            example_inputs: positional arguments for one forward, which leaves no trace in the model; or a
                mapping of keyword arguments.
            state_dict: the state of a model that was prepared with the same configuration. It is loaded
                strictly, and no mask is computed.

        Raises:
            RuntimeError: the model is prepared already; by a Quantizer, too, which comes after the pruner.
                Or ``state_dict`` does not fit the prepared model, or lacks masks.
            ValueError: a scheme does not fit a weight.
            TypeError: ``example_inputs`` is neither a tuple nor a mapping. After any error the model is as it
                was.
        """
        self._require_unprepared()
        if _prepared_models.is_prepared(self._model):
            raise RuntimeError(
                "prepare: the model is prepared by another compressor already. Pruning comes first: "
                "prepare the model with MagnitudePruner, then with the Quantizer or the palettizer"
            )
        with self._given(example_inputs) as args:
            built = [(target, self._build(target)) for target in self._find_targets(args)]
        if state_dict is None:
            self._refresh([(simulator, target.tensor) for target, simulator in built])
        check = self._model.register_load_state_dict_post_hook(_check_steps)
        try:
            with undone_on_failure(self._model):
                for target, simulator in built:
                    self._insert(target, simulator)
                if state_dict is not None:
                    self._load_prepared_state_dict(self._model, state_dict)
        except BaseException:
            check.remove()
            raise
        self._mark_prepared(self._model, state_dict)
        return self._model

    def _mark_finalized(self, model: nn.Module) -> None:
        hooks = model._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _check_steps]:
            del hooks[key]
        super()._mark_finalized(model)

    def _uninitialized_compression_modules(self, model: nn.Module) -> list[str]:
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, PruneImplBase) and module.mask.numel() == 0
        ]

    @staticmethod
    def _build(target: StateTarget) -> PruneImplBase:
        spec: Any = target.spec
        simulator: PruneImplBase = spec.pruning_algo(
            target_sparsity=spec.target_sparsity, pruning_scheme=spec.pruning_scheme
        )
        simulator.tensor_fqn = target.fqn
        simulator.to(target.tensor.device)
        simulator.schedule = getattr(target.config, "sparsity_schedule", None)
        if simulator.schedule is not None:
            simulator.update_sparsity(0)
        return simulator

    def step(self) -> None:
        """Tell the pruner that a training step is over, backward included: masks follow their schedules.

        A mask is computed anew where the sparsity has changed, and stays otherwise.

        Raises:
            RuntimeError: the model is not prepared.
            ValueError: a schedule gives a sparsity outside [0, 1]; nothing changes.
        """
        self._require_prepared(None, "step")
        masked = list(self._masked())
        steps = {simulator: simulator.steps() + 1 for simulator, _ in masked}
        scheduled = [simulator for simulator in steps if simulator.schedule is not None]
        on_their_own = [simulator for simulator in scheduled if _updates_on_its_own(simulator)]
        sparsities = {
            simulator: simulator.sparsity_after(steps[simulator])
            for simulator in scheduled
            if simulator not in on_their_own
        }
        if steps:
            torch._foreach_add_([simulator.step_count for simulator in steps], 1)
        for simulator in steps:
            simulator.count_step()
        for simulator, sparsity in sparsities.items():
            simulator.set_sparsity(sparsity)
        for simulator in on_their_own:
            simulator.update_sparsity(steps[simulator])
        self._refresh(masked)

    @property
    def _step_count(self) -> int:
        return next((simulator.steps() for simulator, _ in self._masked()), 0)

    def _set_steps(self, steps: int) -> None:
        for simulator, _ in self._masked():
            simulator.set_steps(steps)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from the step of :meth:`state_dict`, with the masks that the model holds.

        Raises:
            RuntimeError: the model is not prepared.
            ValueError: there is no step, or one that is no number of steps.
        """
        require_mapping(state_dict)
        # Until this package's 0.1.0: {tensor: {"step_count": ..., "sparsity": ...}}.
        counts = [
            each["step_count"]
            for each in state_dict.values()
            if isinstance(each, Mapping) and "step_count" in each
        ]
        if counts and len(counts) == len(state_dict):
            logger.info("load_state_dict: the steps of %d tensors became one step", len(counts))
            state_dict = {"step_count": max(counts)}
        super().load_state_dict(state_dict)

    def _masked(self) -> Iterator[tuple[PruneImplBase, Tensor]]:
        """Each simulator once, and the weight that it masks."""
        seen: set[int] = set()
        for module, attribute, simulator in self._inserted(self._model):
            if isinstance(simulator, PruneImplBase) and id(simulator) not in seen:
                seen.add(id(simulator))
                yield simulator, original_of(module, attribute)

    @torch.no_grad()
    def _refresh(self, masked: list[tuple[PruneImplBase, Tensor]]) -> None:
        """Compute the masks that are stale; if that fails for one, none changes."""
        groups: dict[Any, list[tuple[PruneImplBase, Tensor]]] = {}
        for simulator, weight in masked:
            groups.setdefault(self._ranked_with(simulator), []).append((simulator, weight))
        stale = [group for group in groups.values() if any(simulator.is_stale for simulator, _ in group)]
        sharded = [group for group in stale if _can_rank_sharded(group)]
        masks: list[tuple[tuple[PruneImplBase, Tensor], Tensor]] = []
        for group in stale:
            if not _can_rank_sharded(group):
                masks += zip(group, _masks_of(group), strict=True)
        # All at once: the ranks exchange as many messages for a model as for one weight.
        for group, of_group in zip(sharded, topk_masks([_ranked(group) for group in sharded]), strict=True):
            for member, mask in zip(group, of_group, strict=True):
                masks.append((member, whole_mask(with_local(member[1], mask))))
        for (simulator, _), mask in masks:
            simulator.set_mask(mask)

    def _ranked_with(self, simulator: PruneImplBase) -> Any:
        """What the tensors that are ranked together have in common."""
        alone = (
            type(simulator) is not _MagnitudePruneImpl or type(simulator.pruning_scheme) is not Unstructured
        )
        if alone or not self._config.global_threshold:
            return id(simulator)
        return simulator.target_sparsity, simulator.sparsity, simulator.schedule

    def finalize(
        self,
        model: nn.Module | None = None,
        backend: ExportBackend = ExportBackend.CoreAI,
        *,
        semi_structured: bool = False,
    ) -> nn.Module:
        """Replace the masked weights by plain ones, with exact zeros. Returns the model.

        Args:
            model: the prepared model, or a copy of it; None for the pruner's own.
            backend: ``ExportBackend.Torch``; ``ExportBackend.CoreAI``, for which weights are held as the
                elements that stay, and where they are; or ``ExportBackend.CoreML``, for which metadata say
                that they are sparse.
            semi_structured: store weights of linear layers, where they are pruned 2:4, as torch's
                semi-structured sparse tensors, for inference. A weight that these do not take on its device
                stays dense, with a warning.

        Raises:
            RuntimeError: the model is not prepared.
            NotImplementedError: the backend is another one that exists.
            ValueError: there is no such backend.
            ImportError: the backend's package is not installed.
        """
        chosen = self._require_prepared(model, "finalize")
        if backend in (ExportBackend.CoreAI, ExportBackend.CoreML):
            finalize_pruned(chosen, ExportBackend(backend))
            self._mark_finalized(chosen)
            return chosen
        self._require_torch(backend)
        found = list(self._inserted(chosen))
        self._finalize_for_torch(chosen)
        if semi_structured:
            for module, attribute, simulator in found:
                store_semi_structured(module, attribute, simulator)
        return chosen


_UPDATE_SPARSITY = PruneImplBase.update_sparsity


def _updates_on_its_own(simulator: PruneImplBase) -> bool:
    """Whether ``update_sparsity`` is a subclass's, or has been replaced."""
    return "update_sparsity" in vars(simulator) or type(simulator).update_sparsity is not _UPDATE_SPARSITY


def _masks_of(group: list[tuple[PruneImplBase, Tensor]]) -> Sequence[Tensor]:
    """The masks of weights that are ranked together, at the sparsity that they have in common."""
    if len(group) == 1:
        return [group[0][0].mask_for(group[0][1])]
    return coreai_kernels.topk_masks(*_ranked(group))


def _ranked(group: list[tuple[PruneImplBase, Tensor]]) -> tuple[list[Tensor], int]:
    """Weights that are ranked together, and how many of their elements stay."""
    weights = [weight for _, weight in group]
    return weights, kept_of(sum(weight.numel() for weight in weights), group[0][0].sparsity)


def _can_rank_sharded(group: list[tuple[PruneImplBase, Tensor]]) -> bool:
    """Whether the weights are sharded, and pruned one element at a time by the built-in rule."""
    return all(
        is_sharded(weight)
        and type(simulator) is _MagnitudePruneImpl
        and type(simulator.pruning_scheme) is Unstructured
        for simulator, weight in group
    )


def _check_steps(model: nn.Module, *args: Any) -> None:
    """Bring steps of older checkpoints into today's form, and check that all tensors have the same.

    Raises:
        RuntimeError: they have not.
    """
    simulators = [module for module in model.modules() if isinstance(module, PruneImplBase)]
    old = [each for each in simulators if each.lacked_step_count]
    if old:
        # This package's metadata counted the steps of tensors with a schedule alone.
        steps = max(each.steps() for each in simulators)
        for each in old:
            each.lacked_step_count = False
            if each.schedule is None:
                each.set_steps(steps)
        logger.warning(
            "The state_dict has no step_count, as those of coreai-opt 0.3.0 and of early versions of this "
            "package: pruning goes on from step %d (MagnitudePruner.load_state_dict({'step_count': ...}) "
            "sets another one).",
            steps,
        )
    counts = {each.steps() for each in simulators}
    if len(counts) > 1:
        raise RuntimeError(
            f"all pruned tensors must have the same step_count; the loaded state has {sorted(counts)}"
        )
