"""Checkpoints that coreai-opt 0.3.0 wrote load strictly, and give the same outputs."""

import logging
from typing import Any

import pytest
import torch

from .checkpoints import COMPRESSORS, FILE, INPUTS, prepared


@pytest.fixture(scope="module")
def written() -> Any:
    return torch.load(FILE, weights_only=True)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_checkpoint_loads(name: str, written: Any) -> None:
    model, _ = prepared(name, seed=1)
    model.load_state_dict(written[name]["state"], strict=True)
    with torch.no_grad():
        outputs = model.eval()(INPUTS)
    # The order of a product's sums depends on the machine.
    torch.testing.assert_close(outputs, written[name]["outputs"], rtol=0, atol=2e-7)


def test_pruning_goes_on_from_the_step_that_is_given(written: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, pruner = prepared("pruner", seed=1)
    with caplog.at_level(logging.INFO):
        model.load_state_dict(written["pruner"]["state"])
    assert "has no step_count" in caplog.text
    assert pruner._step_count == 0
    pruner.load_state_dict({"step_count": 3})
    masks = [module.mask for module in model.modules() if hasattr(module, "mask")]
    assert [round(float(1 - mask.mean()), 4) for mask in masks] == [0.4375, 0.4375]
    pruner.step()
    assert {round(m.sparsity, 5) for m in model.modules() if hasattr(m, "mask")} == {0.49219}
