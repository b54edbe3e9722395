"""Configs of one small model, one question each: what applies to which operation, and at which edges."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.quantization import ModuleQuantizerConfig, QuantizerConfig
from coreai_opt.quantization.config import OpQuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity

from .quantizer_configs import ASYMMETRIC, GLOBAL, INT4, eager, module, spec
from .quantizer_places import MATRIX, PLACES, Function, ask, place

__all__ = ["PLACES", "place"]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1, self.act, self.l2 = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.l2(self.act(self.l1(x)))
        return (y + y) * (y + 1)


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b1, self.b2, self.head = Pair(), Pair(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b2(self.b1(x)))


def configured(name: str, config: Callable[[], QuantizerConfig]) -> None:
    ask(f"config {name}", lambda: (Tree(), (MATRIX,), config()))


def weights(dtype: torch.dtype) -> ModuleQuantizerConfig:
    return module(op_state_spec={"weight": spec(dtype, PerChannelGranularity(axis=0))})


W2, W4, W8 = (weights(dtype) for dtype in (torch.int2, torch.int4, torch.int8))
ALL, ON, NONE = ModuleQuantizerConfig(), OpQuantizerConfig(), None

for config_name, config_fields in {
    "global None": {"global_config": None},
    "type, global left out": {"module_type_configs": {nn.Linear: W4}},
    "type by public name": {"global_config": None, "module_type_configs": {"torch.nn.Linear": W4}},
    "type by full name": {
        "global_config": None,
        "module_type_configs": {"torch.nn.modules.linear.Linear": W4},
    },
    "type of a base class": {"global_config": None, "module_type_configs": {nn.Module: W4}},
    "type of a block": {"global_config": None, "module_type_configs": {Pair: W4}},
    "type None": {"module_type_configs": {nn.Linear: None}},
    "types, outer first": {"global_config": None, "module_type_configs": {Pair: W4, nn.Linear: W8}},
    "types, inner first": {"global_config": None, "module_type_configs": {nn.Linear: W8, Pair: W4}},
    "name": {"global_config": None, "module_name_configs": {"b1.l1": W4}},
    "name of a block": {"global_config": None, "module_name_configs": {"b1": W4}},
    "name, only its end": {"global_config": None, "module_name_configs": {"l1": W4}},
    "name, only its start": {"global_config": None, "module_name_configs": {"b": W4}},
    "name, empty": {"global_config": None, "module_name_configs": {"": W4}},
    "name pattern": {"global_config": None, "module_name_configs": {r".*\.l[12]": W4}},
    "names, outer first": {"global_config": None, "module_name_configs": {"b1": W4, "b1.l1": W8}},
    "names, inner first": {"global_config": None, "module_name_configs": {"b1.l1": W8, "b1": W4}},
    "names, last None": {"module_name_configs": {"b1.l1": W8, "b1.*": None}},
    "name over type": {
        "global_config": None,
        "module_type_configs": {nn.Linear: W8},
        "module_name_configs": {"b1": W4, "b2.l1": None},
    },
    "name over type None": {"module_type_configs": {Pair: None}, "module_name_configs": {"b1.l1": W4}},
    "name that matches nothing": {"global_config": W8, "module_name_configs": {"zzz": W4}},
}.items():
    configured(config_name, lambda fields=config_fields: eager(**fields))

for config_name, module_fields in {
    "operation type": {"op_type_config": {"add": ON}},
    "operation type unknown": {"op_type_config": {"relu": ON, "zzz": ON, "lin.*": ON, "*": ON}},
    "operation type None": {"op_input_spec": {"*": GLOBAL}, "op_type_config": {"linear": None}},
    "operation name": {"op_name_config": {"b1.add_1": ON}},
    "operation name, only its end": {"op_name_config": {"add_1": ON}},
    "operation name pattern": {"op_name_config": {r"b1\.add.*": ON, r".*\.l1\.linear": ON}},
    "operation names, last None": {"op_name_config": {"b1.add_1": ON, r"b1\..*": None, "b2.mul": ON}},
    "operation name over type": {"op_type_config": {"add": ON}, "op_name_config": {".*add_1": None}},
    "input 0": {"op_input_spec": {0: ASYMMETRIC}},
    "input 1": {"op_input_spec": {"1": ASYMMETRIC}},
    "inputs but 0": {"op_input_spec": {"*": ASYMMETRIC, 0: None}},
    "inputs, 1 in another way": {"op_input_spec": {"*": ASYMMETRIC, 1: GLOBAL}},
    "input out of range": {"op_input_spec": {9: ASYMMETRIC, -1: ASYMMETRIC}},
    "input by name": {"op_input_spec": {"other": ASYMMETRIC}},
    "output 0": {"op_output_spec": {0: ASYMMETRIC}},
    "output 1": {"op_output_spec": {1: ASYMMETRIC}},
    "output by name": {"op_output_spec": {"output": ASYMMETRIC}},
    "state of any name": {"op_state_spec": {"*": INT4}},
    "state but the bias": {"op_state_spec": {"*": INT4, "bias": None}},
    "state by number": {"op_state_spec": {"0": INT4}},
    "bias without axis": {"op_state_spec": {"bias": spec(torch.int4, PerChannelGranularity(axis=None))}},
    "activations without axis": {"op_input_spec": {"*": spec(torch.int8, PerChannelGranularity(axis=None))}},
    "blocks that do not fit": {
        "op_input_spec": {"*": spec(torch.int8, PerBlockGranularity(axis=1, block_size=3))},
        "op_state_spec": {"weight": spec(torch.int8, PerBlockGranularity(axis=1, block_size=3))},
    },
}.items():
    configured(config_name, lambda fields=module_fields: eager(global_config=module(**fields)))

EDGES: dict[str, Any] = {"module_input_spec": {"*": ASYMMETRIC}, "module_output_spec": {"*": GLOBAL}}
for config_name, type_configs in {
    "edges of a block": {Pair: module(**EDGES)},
    "edges of layers": {nn.Linear: module(**EDGES), nn.ReLU: module(**EDGES)},
    "edges over operations": {Pair: ModuleQuantizerConfig(**EDGES)},
    "edges None over operations": {Pair: ModuleQuantizerConfig(module_input_spec={"*": None})},
    "edges by number": {Pair: module(module_input_spec={0: GLOBAL}, module_output_spec={1: GLOBAL})},
    "edges by name": {Pair: module(module_input_spec={"x": GLOBAL}, module_output_spec={"y": GLOBAL})},
    "edges around a layer that is off": {Pair: module(**EDGES), nn.Linear: None},
    "edges around a layer of its own": {Pair: module(**EDGES), nn.Linear: ModuleQuantizerConfig()},
    "state of modules": {nn.Linear: module(module_state_spec={"weight": INT4, "bias": spec()})},
    "state of modules, any name": {nn.Linear: module(module_state_spec={"*": INT4})},
    "state of modules over operations": {nn.Linear: ModuleQuantizerConfig(module_state_spec={"*": None})},
}.items():
    configured(config_name, lambda types=type_configs: eager(module_type_configs=types))


class Inner(Function):
    """The module whose edges the config names."""


def within(s: Any, x: Tensor) -> Any:
    return s.inner(x)


def edges(name: str, function: Callable[..., Any], call: Callable[..., Any] = within, **fields: Any) -> None:
    def question() -> Any:
        model = Function(call, inner=Inner(function, layer=nn.Linear(4, 4)))
        inner = module(**(fields or EDGES))
        return model, (MATRIX,), eager(global_config=None, module_type_configs={Inner: inner})

    ask(f"edge {name}", question)


def two_inputs(s: Any, x: Tensor) -> Any:
    return s.inner(x, x * 3)


def same(x: Tensor) -> Tensor:
    """The very tensor, out of an operation."""
    return nn.functional.dropout(x, 0.5, training=False)


edges("two consumers", lambda s, x: s.layer(x) + torch.relu(x))
edges("shapes", lambda s, x: s.layer(x.view(-1, 4)).reshape(3, 4))
edges("sizes", lambda s, x: s.layer(x) * x.size(0) * x.shape[1])
edges("identity", lambda s, x: x, lambda s, x: s.inner(x) * 2)
edges("index", lambda s, x: s.layer(x[0:2])[0])
edges("two inputs", lambda s, x, y: s.layer(x) + y, two_inputs)
edges("input 1", lambda s, x, y: s.layer(x) + y, two_inputs, module_input_spec={1: GLOBAL})
edges("a list", lambda s, x: s.layer(x[0]) + x[1], lambda s, x: s.inner([x, x * 3]))
edges("two outputs", lambda s, x: (s.layer(x), {"b": x - 1}))
edges("output 1", lambda s, x: (s.layer(x), x - 1), module_output_spec={1: GLOBAL})
edges("pieces", lambda s, x: s.layer(x).chunk(2, -1))
edges("called twice", lambda s, x: s.layer(x), lambda s, x: s.inner(s.inner(x)))
edges("the same tensor twice", lambda s, x: x + x)
edges("in a list only", lambda s, x: torch.cat([x, x]))
edges("constants", lambda s, x: torch.ones(3, 4))
edges("a result that passes through", lambda s, x: x, lambda s, x: s.inner(x * 2) + 1)
edges("written to", lambda s, x: s.layer(x.add_(1)), lambda s, x: s.inner(x.clone()))
edges("other functions outside", lambda s, x: s.layer(x), lambda s, x: s.inner(x.relu()) + x.relu())
edges("the same tensor again", lambda s, x: same(s.layer(same(x))))
edges("the same tensor again outside", lambda s, x: s.layer(x), lambda s, x: same(s.inner(same(x))) * 2)
