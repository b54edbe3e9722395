"""Calibration data runs through a prepared model, layer after layer: one layer's statistics at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt._call_inputs import Arguments
from coreai_opt.quantization.post_training._accumulators import Accumulator
from coreai_opt.quantization.post_training._capture import Capture, StoppedError, columns_of
from coreai_opt.quantization.post_training._layers import Layer
from coreai_opt.quantization.post_training._order import Block, Readers, first_tensor, order_of

__all__ = ["Granularity", "Stage", "check_finite", "run_stages"]

Granularity = Literal["block", "layer"]


@dataclass
class Stage:
    """Layers that read the same tensor, and the statistic of it.

    Attributes:
        layers: the layers.
        statistic: of their inputs; None if they need none, for :func:`run_stages`' ``is_done`` said so.
    """

    layers: Readers
    statistic: Any


def run_stages(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Arguments],
    make: Callable[[], Accumulator],
    *,
    granularity: Granularity,
    is_done: Callable[[Readers], bool],
    simulate: bool,
) -> Iterator[Stage]:
    """Each stage in the order of the model's forward, with what the data gives its layers to read.

    Where a list of modules is a chain, the inputs of one of them are kept, and each is run alone; of other
    layers the model is run anew, up to the layer.

    Args:
        model: prepared, in evaluation mode, with all simulators off.
        layers: which ones.
        batches: the data.
        make: gives a new statistic.
        granularity: whether all layers of a module of the chain are measured before the first of them is
            changed, or one after another.
        is_done: whether the layers need no statistic.
        simulate: whether the layers that were handed out are simulated from then on.

    Raises:
        ValueError: an input is NaN or infinite.
    """
    order = order_of(model, layers, batches[0])

    def measured(
        readers: list[Readers], run: Callable[[Capture], None], calls: int | None
    ) -> Iterator[Stage]:
        pending = [each for each in readers if not is_done(each)]
        statistics = {each[0]: make() for each in pending}
        if pending:
            run(
                Capture(
                    [each[0] for each in pending],
                    lambda layer, given: statistics[layer].add(columns_of(layer, given)),
                    calls,
                )
            )
        for each in readers:
            statistic = statistics.pop(each[0], None)
            if statistic is not None:
                check_finite(each[0], statistic)
            for layer in each[1:]:
                layer.operation, layer.settings = each[0].operation, each[0].settings
            yield Stage(each, statistic)
            if simulate:
                for layer in each:
                    layer.simulator.enable_fake_quant(True)

    def whole(readers: Readers) -> Iterator[Stage]:
        calls = 1 if not order.repeated.intersection(readers) else None

        def run(capture: Capture) -> None:
            with parametrize.cached():
                for batch in batches:
                    _forward(model, batch.args, batch.kwargs, capture)

        yield from measured([readers], run, calls)

    for each in order.before:
        yield from whole(each)
    if order.chain:
        inputs = _inputs_of(model, order.chain[0].module, batches)
        for index, block in enumerate(order.chain):
            parts = [block.readers] if granularity == "block" else [[each] for each in block.readers]
            for part in parts:
                yield from measured(part, partial(_run, block, inputs), None)
            if index + 1 < len(order.chain):
                _advance(block, inputs)
        inputs.clear()
    for each in order.after:
        yield from whole(each)


def check_finite(layer: Layer, statistic: Accumulator) -> None:
    """ValueError if an input of the layer was NaN or infinite."""
    if not statistic.is_finite():
        raise ValueError(
            f"{layer.name}: its inputs hold NaN or infinite values; check the calibration data, and that the "
            f"model computes finite values on it"
        )


def _forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], capture: Capture) -> None:
    capture.seen = 0
    try:
        with torch.no_grad(), capture:
            module(*args, **kwargs)
    except StoppedError:
        pass


def _run(block: Block, inputs: Sequence[Arguments], capture: Capture) -> None:
    with parametrize.cached():  # weights are simulated once for all inputs
        for each in inputs:
            _forward(block.module, each.args, each.kwargs, capture)


def _inputs_of(model: nn.Module, block: nn.Module, batches: Sequence[Arguments]) -> list[Arguments]:
    found: list[Arguments] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Arguments(args, kwargs))
        raise StoppedError

    handle = block.register_forward_pre_hook(take, with_kwargs=True)
    try:
        for batch in batches:
            try:
                with torch.no_grad():
                    model(*batch.args, **batch.kwargs)
            except StoppedError:
                pass
    finally:
        handle.remove()
    return found


def _advance(block: Block, inputs: list[Arguments]) -> None:
    """Replace a block's inputs by those of the next one."""
    with torch.no_grad(), parametrize.cached():
        for index, each in enumerate(inputs):
            handed_on = first_tensor(block.module(*each.args, **each.kwargs))
            assert isinstance(handed_on, Tensor)
            inputs[index] = Arguments((handed_on, *each.args[1:]), each.kwargs)
