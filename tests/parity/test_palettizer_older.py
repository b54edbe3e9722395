"""Checkpoints of 0.3.0 in this package."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import oracle
from .palettizer_older import CASES, INPUTS, new, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

VERSION = "0.3.0"
FOLDER = Path(os.environ.get("COREAI_ORACLE_0_3_0", oracle.ROOT / f".oracle-{VERSION}"))
INSTALL = (
    f"these tests need Apple's coreai-opt {VERSION} in {FOLDER} (COREAI_ORACLE_0_3_0 names another folder): "
    f"pip install --no-deps --target .oracle-{VERSION} coreai-opt=={VERSION}"
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not list(FOLDER.glob(f"coreai_opt-{VERSION}.dist-info")):
        pytest.skip(INSTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "FOLDER", FOLDER)
        return oracle.ask(
            {"module": "palettizer_older", "keep_traces": False}, tmp_path_factory.mktemp("older")
        )


def state_of(answer: Any) -> dict[str, Tensor]:
    return {name: value.tensor() for name, value in answer["state"].items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("in_prepare", [True, False])
def test_its_checkpoints_load(name: str, in_prepare: bool, answers: Any) -> None:
    palettizer, model = new(name, seed=1)
    state = state_of(answers[name])
    if in_prepare:
        palettizer.prepare((INPUTS,), state_dict=state)
    else:
        palettizer.prepare((INPUTS,)).load_state_dict(state)
    for found, expected in zip(weights_of(model), answers[name]["weights"], strict=True):
        assert torch.equal(found, expected.tensor())
    assert torch.allclose(model(INPUTS), answers[name]["output"].tensor(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "vectors"])
def test_scalars_are_clustered_as_it_does(name: str, answers: Any) -> None:
    palettizer, model = new(name, seed=0)
    palettizer.prepare((INPUTS,))
    for found, expected in zip(weights_of(model), answers[name]["weights"], strict=True):
        assert torch.allclose(found, expected.tensor(), rtol=1e-6, atol=1e-7)
