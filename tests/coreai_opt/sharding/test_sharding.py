"""Several ranks, DTensors, FSDP2, tensor parallelism: the results of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

from . import restarted
from .cases import cases
from .training import alone, compare

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "OMP_NUM_THREADS": "1",
}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT,
    )


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    """All cases in one run: processes that train on two cores of the tests take turns anyway."""
    path = tmp_path / "passed.txt"
    done = _run("-m", "tests.coreai_opt.sharding.cases", str(path))
    passed = path.read_text().split() if path.exists() else []
    assert passed == list(cases()), done.stderr[-6000:]


@pytest.mark.slow
def test_a_restart_in_mid_schedule_goes_on(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    done = _run(*launcher, "-m", "tests.coreai_opt.sharding.restarted", str(tmp_path))
    assert done.returncode == 0, done.stderr[-6000:]
    trained = torch.load(tmp_path / "trained.pt", weights_only=True)
    compare(trained, alone(restarted.COMPRESSION), "after a restart")
