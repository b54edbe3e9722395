"""Prepared graphs through torch's compiler, inductor."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_fw_bw_and_get_code

from coreai_opt.quantization import Quantizer

from .support import Function, prepared, x

pytestmark = pytest.mark.slow  # inductor's C++ compiler


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def activations() -> nn.Module:
    """Activations whose gradients are masks, each of which is simulated."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU6(), nn.Linear(16, 4))


def test_masks_of_activations_are_not_kept_as_bools() -> None:
    quantizer, found = prepared(activations().train(), x(8, 16))
    quantizer.enable_observer()
    twin = copy.deepcopy(found)
    compiled = torch.compile(found, fullgraph=True)
    inputs = 4 * torch.randn(8, 16)
    with torch._inductor.config.patch(force_disable_caches=True):  # programs of earlier runs
        output, code = run_fw_bw_and_get_code(lambda: compiled(inputs))
    assert len(code) == 2  # forward and backward
    assert not any("torch.bool" in each for each in code)
    expected = twin(inputs)
    expected.sum().backward()
    torch.testing.assert_close(output, expected)
    for parameter, other in zip(found.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def tagger() -> nn.Module:
    torch.manual_seed(0)
    layers = {"embedding": nn.Embedding(16, 8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}
    return Function(lambda m, tokens: m.down(torch.relu(m.up(m.embedding(tokens)))), **layers)


def test_batches_and_sequences_of_any_size_run_one_program_a_mode() -> None:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}
    quantizer = Quantizer(tagger())
    found: Any = quantizer.prepare((torch.ones(2, 5, dtype=torch.int64),), dynamic_shapes=((sizes,),))
    twin = copy.deepcopy(found)
    compiled = torch.compile(found, fullgraph=True, dynamic=True)
    for step, shape in enumerate(((3, 7), (4, 9), (2, 5), (6, 40))):
        tokens = torch.randint(16, shape)
        for model in (found, twin):
            model.zero_grad()
        with quantizer.training_mode(found):
            compiled(tokens).square().mean().backward()
        with quantizer.training_mode(twin):
            twin(tokens).square().mean().backward()
        for parameter, other in zip(found.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens), twin(tokens))
        if step == 0:
            after_first = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == after_first == 2  # training and evaluation
    state = twin.state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, state[name])
