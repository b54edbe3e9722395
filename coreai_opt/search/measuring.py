"""What each candidate does to the outputs of a model, one layer at a time."""

import copy
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from coreai_kernels.wide import widened
from coreai_opt._call_inputs import Arguments
from coreai_opt.config.spec.storage import is_off
from coreai_opt.inspection.bits_per_weight import stored_tensors
from coreai_opt.search.candidates import Candidate, configurations, prepared

__all__ = ["Measurement", "Metric", "Outputs", "Prober", "damage_of"]

# The model's outputs for one sample: its floating-point tensors.
Outputs = list[Tensor]
Metric = Literal["mse", "psnr", "kl"] | Callable[[Any, Any], float]


@dataclass(frozen=True)
class Measurement:
    """One candidate in one layer, all other layers as they were.

    Attributes:
        layer: the module's name.
        candidate: the candidate's name.
        damage: how far the outputs move, by the metric; less is better.
        bits: what the layer's weight takes, with scales and palettes.
    """

    layer: str
    candidate: str
    damage: float
    bits: int


def damage_of(metric: Metric, found: Sequence[Any], expected: Sequence[Any], where: str) -> float:
    """The mean of the metric over samples.

    Args:
        metric: see :func:`coreai_opt.search.search`.
        found: outputs, one a sample.
        expected: the float model's outputs.
        where: what is compressed, for errors.

    Raises:
        TypeError: the metric gives no number.
        ValueError: it is not a finite number; or there is no output that a metric by name compares.
    """
    values = [_damage(metric, *pair) for pair in zip(found, expected, strict=True)]
    mean = math.fsum(values) / len(values)
    if not math.isfinite(mean):
        finite = all(bool(leaf.isfinite().all()) for each in expected for leaf in _floating(each))
        cause = "" if finite else "; outputs of the float model are not finite, either"
        raise ValueError(f"the metric must give finite numbers; it gave {mean} for {where}{cause}")
    return mean


def _damage(metric: Metric, found: Any, expected: Any) -> float:
    if callable(metric):
        value = metric(found, expected)
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"metric must return a number; got {type(value).__name__}: {error}") from error
    pairs = [(widened(a), widened(b)) for a, b in zip(_floating(found), _floating(expected), strict=True)]
    if not pairs:
        raise ValueError(
            f"metric={metric!r} compares floating-point outputs, and the model has none: give a function"
        )
    if metric == "kl":
        logs = [(a.log_softmax(-1), b.log_softmax(-1)) for a, b in pairs]
        return float(torch.stack([_divergence(a, b).sum(-1).mean() for a, b in logs]).sum())
    errors = torch.stack([(a - b).square().mean() for a, b in pairs]).sum()
    if metric == "psnr":
        scales = [b.abs().max().square() for _, b in pairs]
    else:
        scales = [b.square().mean() for _, b in pairs]
    return float(errors / torch.stack(scales).sum().clamp(min=1e-30))


def _divergence(found: Tensor, expected: Tensor) -> Tensor:
    """The terms of the Kullback-Leibler divergence, from logarithms; what has no probability has none."""
    return (expected.exp() * (expected - found)).masked_fill(expected == -math.inf, 0.0)


def _floating(outputs: Any) -> Outputs:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _layers_in_words(layers: Collection[str]) -> str:
    names = list(layers)
    return f"layer {names[0]!r}" if len(names) == 1 else f"{len(names)} layers together"


class Prober:
    """Runs a model with some of its weights replaced by compressed ones; the model is left as it was.

    Args:
        model: the float model, in evaluation mode while it runs.
        samples: arguments, one a forward.
        metric: see :func:`coreai_opt.search.search`.
        patterns: regular expressions of the layers to compress; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Arguments],
        metric: Metric,
        patterns: Sequence[str] | None,
    ) -> None:
        self.model = copy.deepcopy(model).eval()
        self.samples = samples
        self.metric = metric
        self.patterns = patterns
        self.modules = dict(self.model.named_modules())
        self.expected = self._run()

    def _run(self) -> list[Any]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return [self.model(*each.args, **each.kwargs) for each in self.samples]

    def compressed(self, candidate: Candidate) -> dict[str, tuple[Tensor, int]]:
        """The compressed weight of each layer that the candidate fits, and the bits that it takes."""
        configs = configurations({".*": candidate})
        everything = prepared(self.model, configs, self.samples[0], progress=False).eval()
        found: dict[str, tuple[Tensor, int]] = {}
        modules = dict(everything.named_modules())
        for stored in stored_tensors(everything):
            simulators = [each for each in stored.simulators if not is_off(each)]
            if stored.name == "weight" and simulators and self._is_wanted(stored.module_name):
                with torch.no_grad():
                    weight = modules[stored.module_name].weight.detach().clone()  # type: ignore[union-attr, operator]
                found[stored.module_name] = (weight, stored.bits)
        return found

    def _is_wanted(self, layer: str) -> bool:
        return self.patterns is None or any(re.fullmatch(pattern, layer) for pattern in self.patterns)

    def damage(self, weights: Mapping[str, Tensor]) -> float:
        """The damage with the weights of these layers replaced."""
        with self._replaced(weights):
            return damage_of(self.metric, self._run(), self.expected, _layers_in_words(weights))

    def damages(self, layer: str, weights: Sequence[Tensor]) -> list[float]:
        """The damage with the weight of one layer replaced by each of ``weights``.

        Several weights share one forward, which computes once what lies before the layer. Their damages
        may differ in the last digits from those of :meth:`damage`.

        Raises:
            Exception: the model cannot run under ``torch.vmap``; a note says what to do.
        """
        if len(weights) == 1:
            return [self.damage({layer: weights[0]})]
        stacked = torch.stack(list(weights))
        try:
            runs = [self._run_each(layer, stacked, sample) for sample in self.samples]
        except Exception as error:
            error.add_note(
                f"{type(self.model).__name__} was run under torch.vmap with {len(weights)} weights for layer "
                f"{layer!r}, as candidates_per_forward asks; candidates_per_forward=1 runs it as it is"
            )
            raise
        return [
            damage_of(self.metric, found, self.expected, _layers_in_words([layer]))
            for found in zip(*runs, strict=True)
        ]

    def _run_each(self, layer: str, weights: Tensor, sample: Arguments) -> list[Any]:
        """The outputs for one sample with each of the weights."""
        leaves: list[Any] = []
        structures: list[TreeSpec] = []

        def tensors_of_forward(weight: Tensor) -> list[Tensor]:
            replaced = {f"{layer}.weight".lstrip("."): weight}
            outputs = functional_call(self.model, replaced, sample.args, sample.kwargs)
            found, structure = tree_flatten(outputs)
            leaves.extend(found)
            structures.append(structure)
            return [leaf for leaf in found if isinstance(leaf, Tensor)]

        with torch.no_grad():  # vmap refuses random numbers, which would differ from those of a forward alone
            batched = torch.vmap(tensors_of_forward)(weights)
        outputs = []
        for number in range(len(weights)):
            tensors = iter(batched)
            values = [next(tensors)[number] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            outputs.append(tree_unflatten(values, structures[0]))
        return outputs

    @contextmanager
    def _replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        kept = []
        try:
            with torch.no_grad():
                for layer, weight in weights.items():
                    parameter: Any = self.modules[layer].weight
                    kept.append((parameter, parameter.detach().clone()))
                    parameter.copy_(weight)
            yield
        finally:
            with torch.no_grad():
                for parameter, original in kept:
                    parameter.copy_(original)
