"""Runs saved at any step go on in another process as if they had never stopped."""

import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from ..support import EPOCHS, STEPS, assert_same_state
from .resume_cases import CASES, make_run, resume_all, train_on


@pytest.fixture(scope="module")
def another_process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("case", CASES)
def test_at_any_step_in_another_process(
    case: str, tmp_path: Path, another_process: ProcessPoolExecutor
) -> None:
    run = make_run(case)
    seen = []
    for step in range(EPOCHS * STEPS):
        (tmp_path / f"{step}.pt").write_bytes(run.save())
        seen += train_on(run, step + 1)
    end = run.snapshot()

    results = torch.load(io.BytesIO(another_process.submit(resume_all, case, tmp_path).result()))
    assert list(results) == [f"{step}.pt" for step in range(EPOCHS * STEPS)]
    for step, result in enumerate(results.values()):
        assert len(result["seen"]) == EPOCHS * STEPS - step
        assert_same_state(result["seen"], seen[step:], f"{case} from step {step}, at step + ")
        assert_same_state(result["end"], end, f"{case} from step {step}")
