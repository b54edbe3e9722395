"""The search itself."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from tqdm.auto import tqdm

from coreai_opt._call_inputs import Arguments, arguments_of, arguments_of_batch
from coreai_opt._state_tensors import refuse_meta
from coreai_opt.inspection.bits_per_weight import StoredTensor, stored_tensors
from coreai_opt.search.assigning import greedy, optimal, options_of, pareto_front
from coreai_opt.search.candidates import Candidate, checked_candidates
from coreai_opt.search.measuring import Measurement, Metric, Prober
from coreai_opt.search.progress import Ledger, fingerprint
from coreai_opt.search.result import SearchResult

__all__ = ["search"]


def search(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    bits_per_weight: float | None = None,
    size_bytes: int | None = None,
    candidates: Iterable[Candidate] | None = None,
    metric: Metric = "mse",
    method: Literal["optimal", "greedy"] = "optimal",
    layers: Sequence[str] | None = None,
    candidates_per_forward: int = 1,
    state_path: str | None = None,
    progress: bool = True,
) -> SearchResult:
    """Choose a candidate for each layer so that the model fits a budget and its outputs move least.

    Each candidate is tried in each layer alone, with one forward a sample. The damages of layers are taken to
    add up; the assignment with the least sum is found by dynamic programming. It is then measured as a whole,
    and so is each candidate everywhere; if one of these fits the budget and does less damage, it is returned.
    The same arguments give the same result.

    Args:
        model: a float model; it is copied, and stays as it is.
        samples: what the model gets, one a forward, such as a list of batches or a DataLoader: tensors,
            tuples of positional arguments, or mappings of keyword arguments. A list, as a DataLoader makes
            of several tensors, may go on behind what ``forward`` requires, with targets: these are passed
            over.
        bits_per_weight: budget for the average of all parameters and buffers, uncompressed ones included.
        size_bytes: the budget as a size; one of the two must be given.
        candidates: what layers may be compressed to; None for :func:`default_candidates`.
        metric: ``"mse"``, the mean squared error of all floating-point outputs relative to their power;
            ``"psnr"``, the same relative to the square of their largest magnitude: the peak signal-to-noise
            ratio in dB is ``-10 * log10`` of it; ``"kl"``, the Kullback-Leibler divergence of the softmax
            over the last axis; or a function of the outputs and the float model's outputs that gives a
            number, less for better.
        method: ``"optimal"``, or ``"greedy"``: candidates from the least harmful on, until the budget is met.
        layers: regular expressions of the names of layers to compress; None for all that a candidate fits.
        candidates_per_forward: so many candidates of a layer share one forward, by ``torch.vmap``: less time,
            more memory, for models that run under it. Damages may differ in their last digits from those
            of one at a time.
        state_path: a file that keeps measurements: a search that was ended goes on from there.
        progress: show a bar.

    Raises:
        TypeError: ``model`` is no module, a candidate none, or ``layers`` no sequence of texts; ``forward``
            does not take a sample; or the metric gives no number.
        RuntimeError: the model is on the meta device, or prepared already.
        ValueError: no budget, or two; no samples; an unknown metric or method, or one whose numbers are not
            finite; ``candidates_per_forward`` is no positive number; no layer to compress; the state belongs
            to another search; or nothing fits the budget: the message says what does.
    """
    _check(model, bits_per_weight, size_bytes, metric, method, candidates_per_forward)
    layers = _checked_patterns(layers)
    refuse_meta(model)
    batches = [_arguments(model, each) for each in samples]
    if not batches:
        raise ValueError("samples must hold at least one sample")
    chosen_candidates = checked_candidates(candidates)
    prober = Prober(model, batches, metric, layers)
    identity: list[Any] = [[(each.args, each.kwargs) for each in batches], layers]
    if candidates_per_forward > 1:
        identity.append(candidates_per_forward)
    ledger = Ledger(state_path, fingerprint(model, identity, chosen_candidates, metric))
    try:
        _check_resumed(prober, chosen_candidates, ledger)
        measurements = _measure(prober, chosen_candidates, candidates_per_forward, ledger, progress)
    finally:
        ledger.save()
    stored = list(stored_tensors(prober.model))
    sizes = _LayerSizes(stored, {each.layer for each in measurements})
    if not sizes.layers:
        among = "" if layers is None else f" among those that layers={layers} names"
        raise ValueError(f"no candidate fits any layer{among}: there is nothing to choose")
    budget = sizes.budget(bits_per_weight, size_bytes)
    options = options_of(measurements, sizes.layers)
    found = (optimal if method == "optimal" else greedy)(options, budget)
    if found is None:
        least = sizes.bits_per_weight(min(bits for bits, _ in pareto_front(options)))
        raise ValueError(f"nothing fits the budget: the smallest choice takes {least:.4g} bits per weight")
    return _result(prober, chosen_candidates, measurements, sizes, budget, found, method, options)


def _check(model: Any, bits_per_weight: Any, size_bytes: Any, metric: Any, method: Any, at_once: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if (bits_per_weight is None) == (size_bytes is None):
        raise ValueError(
            f"one of bits_per_weight and size_bytes must be given; got {bits_per_weight!r} and {size_bytes!r}"
        )
    budget = bits_per_weight if size_bytes is None else size_bytes
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise ValueError(f"the budget must be a positive number; got {budget!r}")
    if not callable(metric) and metric not in ("mse", "psnr", "kl"):
        raise ValueError(f"metric must be 'mse', 'psnr', 'kl' or a function; got {metric!r}")
    if method not in ("optimal", "greedy"):
        raise ValueError(f"method must be 'optimal' or 'greedy'; got {method!r}")
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"candidates_per_forward must be a positive number; got {at_once!r}")


def _checked_patterns(layers: Any) -> list[str] | None:
    if layers is None:
        return None
    patterns = [] if isinstance(layers, str) else list(layers)
    if isinstance(layers, str) or not all(isinstance(each, str) for each in patterns):
        raise TypeError(f"layers must be a list of regular expressions; got {layers!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"layers: {pattern!r} is no regular expression: {error}") from None
    return patterns


def _arguments(model: nn.Module, sample: Any) -> Arguments:
    if isinstance(sample, Mapping):
        return arguments_of(model, sample, "a sample")
    if isinstance(sample, list):
        return arguments_of_batch(model, sample)
    return Arguments(sample if isinstance(sample, tuple) else (sample,), {})


class _LayerSizes:
    """The bits of the layers that are searched, and of all else."""

    def __init__(self, stored: Sequence[StoredTensor], searched: set[str]) -> None:
        self.layers = {
            each.module_name: each.bits
            for each in stored
            if each.name == "weight" and each.module_name in searched
        }
        self.elements = sum(each.elements for each in stored)
        self.rest = sum(each.bits for each in stored) - sum(self.layers.values())

    def budget(self, bits_per_weight: float | None, size_bytes: int | None) -> int:
        """Bits for the layers that are searched."""
        total = size_bytes * 8 if size_bytes is not None else (bits_per_weight or 0) * self.elements
        return math.floor(total) - self.rest

    def bits_per_weight(self, bits: int) -> float:
        """Of the whole model, with so many bits for the layers that are searched."""
        return (bits + self.rest) / self.elements


def _check_resumed(prober: Prober, candidates: Sequence[Candidate], ledger: Ledger) -> None:
    """Repeat a measurement of the state: neither a metric nor a forward can be told by its code alone.

    Raises:
        ValueError: it comes out otherwise.
    """
    if not ledger.found:
        return
    kept = max(ledger.found.values(), key=lambda each: abs(each.damage))
    candidate = next(each for each in candidates if each.name == kept.candidate)
    compressed = prober.compressed(candidate)
    damage = prober.damage({kept.layer: compressed[kept.layer][0]}) if kept.layer in compressed else math.nan
    if not math.isclose(damage, kept.damage, rel_tol=1e-3, abs_tol=1e-12):
        raise ValueError(
            f"state_path {ledger.path} belongs to a search with another metric or forward: "
            f"{kept.candidate!r} in layer {kept.layer!r} does a damage of {damage:.6g} now, of "
            f"{kept.damage:.6g} there. Remove the file, or name another one"
        )


def _measure(
    prober: Prober, candidates: Sequence[Candidate], at_once: int, ledger: Ledger, progress: bool
) -> tuple[Measurement, ...]:
    for start in range(0, len(candidates), at_once):
        group = candidates[start : start + at_once]
        names = [candidate.name for candidate in group]
        if all(ledger.has_all(name) for name in names):
            continue
        compressed = {candidate.name: prober.compressed(candidate) for candidate in group}
        for name, found in compressed.items():
            ledger.layers[name] = {layer: bits for layer, (_, bits) in found.items()}
        layers = list(dict.fromkeys(layer for found in compressed.values() for layer in found))
        title = f"{', '.join(names)} ({start + len(group)} of {len(candidates)})"
        for layer in tqdm(layers, desc=title, disable=not progress, leave=False):
            fitting = [name for name in names if layer in compressed[name]]
            # All or none: what shares a forward must not depend on where a search was ended.
            if all((layer, name) in ledger.found for name in fitting):
                continue
            try:
                damages = prober.damages(layer, [compressed[name][layer][0] for name in fitting])
            except Exception as error:
                error.add_note(f"while trying {', '.join(fitting)} in layer {layer!r}")
                raise
            for name, damage in zip(fitting, damages, strict=True):
                ledger.add(Measurement(layer, name, damage, compressed[name][layer][1]))
    return tuple(
        ledger.found[layer, candidate.name]
        for candidate in candidates
        for layer in ledger.layers[candidate.name]
    )


def _result(
    prober: Prober,
    candidates: Sequence[Candidate],
    measurements: tuple[Measurement, ...],
    sizes: _LayerSizes,
    budget: int,
    found: Mapping[str, str | None],
    method: str,
    options: Any,
) -> SearchResult:
    """Measure the assignment as a whole, and each candidate everywhere; return the best that fits."""
    bits = {(each.layer, each.candidate): each.bits for each in measurements}
    weights: dict[str, Tensor] = {}
    uniform: dict[str, tuple[float, float]] = {}
    contenders: list[tuple[float, str, dict[str, str | None]]] = []
    for candidate in candidates:
        compressed = prober.compressed(candidate)
        if not compressed:
            continue
        everywhere: dict[str, str | None] = {
            layer: candidate.name if layer in compressed else None for layer in sizes.layers
        }
        damage = prober.damage({layer: weight for layer, (weight, _) in compressed.items()})
        total = _total(everywhere, bits, sizes)
        uniform[candidate.name] = (sizes.bits_per_weight(total), damage)
        if total <= budget:
            contenders.append((damage, "uniform", everywhere))
        weights.update(
            {layer: weight for layer, (weight, _) in compressed.items() if found[layer] == candidate.name}
        )
    contenders.insert(0, (prober.damage(weights), method, dict(found)))
    damage, how, chosen = min(contenders, key=lambda each: each[0])
    by_name = {candidate.name: candidate for candidate in candidates}
    return SearchResult(
        choice={layer: None if name is None else by_name[name] for layer, name in chosen.items()},
        bits_per_weight=sizes.bits_per_weight(_total(chosen, bits, sizes)),
        damage=damage,
        measurements=measurements,
        front=tuple((sizes.bits_per_weight(total), damage) for total, damage in pareto_front(options)),
        uniform=uniform,
        method=how,
    )


def _total(chosen: Mapping[str, str | None], bits: Mapping[tuple[str, str], int], sizes: _LayerSizes) -> int:
    return sum(sizes.layers[layer] if name is None else bits[layer, name] for layer, name in chosen.items())
