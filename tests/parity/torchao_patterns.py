"""Traces and copies of small patterns, kept for as long as the oracle's process runs.

Apple's graph mode has torchao trace the same few dozen patterns (dropouts, batch norms, convolutions with one
behind them) at each prepare, finalize and switch between training and evaluation: most of the time of its
tests. What is traced depends on the pattern's code and on the shapes of its example inputs.

Most of what is left are copies of some 560 patterns of its own at each prepare, since torch's matcher takes
their second output off. It does so once where a pattern's copy is the same one each time.
"""

import copy
import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.passes.utils import matcher_with_name_node_map_utils as matcher

__all__ = ["keep_copies", "keep_traces"]

_NAME = "_get_aten_graph_module_for_pattern"


def keep_traces() -> None:
    """Let torchao trace each pattern once. To be called before Apple's package is imported."""
    import torchao.quantization.pt2e.qat_utils
    import torchao.quantization.pt2e.utils

    original = getattr(torchao.quantization.pt2e.utils, _NAME)
    kept = _kept(original)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(_NAME) is original:
            setattr(module, _NAME, kept)


def keep_copies() -> None:
    """Let Apple's package copy each pattern once. To be called after it is imported."""
    from coreai_opt.quantization._graph import _annotation_pattern_registry as registry

    split = functools.cache(matcher._split_to_graph_and_name_node_map)
    copy_once = functools.cache(copy.deepcopy)
    matcher._split_to_graph_and_name_node_map = split
    registry.deepcopy = lambda value: (
        copy_once(value) if isinstance(value, GraphModule) else copy.deepcopy(value)
    )


def _kept(trace: Callable[..., Any]) -> Callable[..., Any]:
    traces: dict[Any, Any] = {}

    @functools.wraps(trace)
    def kept(pattern: Any, example_inputs: tuple[Any, ...], is_cuda: bool = False, **kwargs: Any) -> Any:
        key = (_identity(pattern), _identity(example_inputs), is_cuda, _identity(tuple(kwargs.items())))
        if key not in traces:
            traces[key] = trace(pattern, example_inputs, is_cuda, **kwargs)
        # Callers change what they get.
        return copy.deepcopy(traces[key])

    return kept


def _identity(value: Any) -> Any:
    """What a trace depends on, as something that can be compared."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        return value.__code__, _identity(cells), _identity(value.__defaults__)
    if isinstance(value, torch.nn.Module):
        # torchao's wrapper of a function.
        return type(value), value.training, _identity(value.fn)
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return value
