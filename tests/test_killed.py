"""kill -9 at random moments of exports and searches: whole files, and results as if nothing had been."""

import importlib.util
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import coreai_opt
from coreai_opt.controllers.algorithms.legr import Evolution, LegrParams
from coreai_opt.export import save
from coreai_opt.palettization import PalettizationSpec
from coreai_opt.quantization import QuantizationSpec, Quantizer
from coreai_opt.search import Candidate, progress, search

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what was imported"),
    pytest.mark.filterwarnings("ignore"),
]
INPUTS = (torch.randn(16, 32, generator=torch.Generator().manual_seed(1)),)
TRIES = 12


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 8)).eval()


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def killed(work: Callable[[], Any], longest: float, choose: random.Random) -> bool:
    """Do the work in a process that is ended at a random moment, unless it has done it by then."""
    process: Any = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(choose.uniform(0, longest))
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return True
    assert process.exitcode == 0, process.exitcode
    return False


def export(folder: Path, suffix: str, tries: int = 10) -> int:
    """Write one of two models over the other, again and again; the file is one of them each time."""
    path, models = folder / f"model{suffix}", [network(seed) for seed in (0, 1)]
    for each in models:
        Quantizer(each, coreai_opt.quantization.QuantizerConfig.presets.w8()).prepare(INPUTS)
    contents = []
    for each in models:
        longest = seconds_of(lambda each=each: save(each, path, INPUTS, progress=False))  # type: ignore[misc]
        contents.append(path.read_bytes())
    assert contents[0] != contents[1]
    choose, kills = random.Random(1), 0
    for number in range(tries):
        each = models[number % 2]
        kills += killed(lambda each=each: save(each, path, INPUTS, progress=False), 2 * longest, choose)  # type: ignore[misc]
        assert path.read_bytes() in contents
        shown = [found.name for found in folder.iterdir() if not found.name.startswith(".")]
        assert shown == [path.name]
    save(models[0], path, INPUTS, progress=False)
    assert path.read_bytes() == contents[0]
    return kills


def until_done(work: Callable[[Path], Any], folder: Path) -> tuple[Any, Any, int]:
    """What the work gives undisturbed, and what it gives after it was killed again and again."""
    start = time.perf_counter()
    expected = work(folder / "undisturbed")
    longest = time.perf_counter() - start
    choose, kills, state = random.Random(2), 0, folder / "killed"
    for _ in range(TRIES):
        kills += killed(lambda: work(state), 1.5 * longest, choose)
    return expected, work(state), kills


def search_for_bits(folder: Path) -> int:
    progress._SECONDS_BETWEEN = 0.0  # each measurement is written
    candidates = [
        Candidate("int8", QuantizationSpec(dtype="int8")),
        Candidate("int4", QuantizationSpec(dtype="int4")),
        Candidate("palette", PalettizationSpec(n_bits=2)),
    ]

    def work(state: Path) -> dict[str, Any]:
        found = search(
            network(),
            [INPUTS],
            bits_per_weight=5.0,
            candidates=candidates,
            state_path=str(state),
            progress=False,
        )
        return found.as_dict() | {"rows": found.rows()}

    expected, found, kills = until_done(work, folder)
    assert json.dumps(found) == json.dumps(expected)
    return kills


def rank_filters(folder: Path) -> int:
    def work(state: Path) -> Any:
        params = LegrParams(generations=40, population_size=8, num_samples=4, state_path=str(state))
        ranking = Evolution([torch.arange(1.0, 5.0), torch.arange(2.0, 9.0)], params)

        def judge(coefficients: Any) -> float:
            time.sleep(0.002)
            return float(sum(abs(a - 2) + abs(b - 1) for a, b in coefficients) + torch.rand(()))

        return ranking.run(judge)

    expected, found, kills = until_done(work, folder)
    assert found == expected
    return kills


def calibrate(folder: Path) -> int:
    """GPTQ, which keeps what it has done of a model."""

    def work(state: Path) -> dict[str, torch.Tensor]:
        model = network()
        config = coreai_opt.quantization.QuantizerConfig.presets.w4(execution_mode="eager")
        quantizer = Quantizer(model, config)
        quantizer.prepare(INPUTS)
        quantizer.calibrate([INPUTS], "gptq", state_path=state)
        return {name: value.clone() for name, value in model.state_dict().items()}

    expected, found, kills = until_done(work, folder)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    return kills


CASES: dict[str, Callable[[Path], int]] = {
    "checkpoint": lambda folder: export(folder, ".safetensors"),
    "program": lambda folder: export(folder, ".pt2"),
    "search": search_for_bits,
    "filters": rank_filters,
    "gptq": calibrate,
}
if all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
    CASES["onnx"] = lambda folder: export(folder, ".onnx", tries=5)  # seconds each


def main(folder: Path) -> None:
    for name, case in CASES.items():
        (folder / name).mkdir()
        start = time.perf_counter()
        print(name, case(folder / name), round(time.perf_counter() - start, 1), flush=True)


def test_killed_while_it_exports_or_searches(tmp_path: Path) -> None:
    # In a process of its own: one that has computed gradients or used threads cannot be forked and go on.
    program = f"import sys, pathlib; from {__name__} import main; main(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    kills = dict(line.split()[:2] for line in done.stdout.splitlines())
    assert list(kills) == list(CASES)
    # Which of them a kill meets is up to the machine's load.
    assert sum(map(int, kills.values())) > len(CASES), kills
