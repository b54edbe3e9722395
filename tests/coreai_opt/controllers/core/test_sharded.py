"""Under FSDP2, with parameters sharded over two gloo processes, controllers train as in one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .sharded_training import ALGORITHMS, train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)

SCRIPT = Path(__file__).with_name("sharded_training.py")


def test_sharded_parameters_train_as_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "results.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, SCRIPT, path], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = torch.load(path, weights_only=True)
    for name, algorithm in ALGORITHMS.items():
        alone, sharded = train(algorithm, 0, 1), results[name]
        torch.testing.assert_close(sharded["losses"], alone["losses"], rtol=1e-5, atol=1e-5, msg=name)
        if name != "distillation":  # whose loss is that of the rank's own share of the batch
            assert sharded["statistics"] == alone["statistics"]
        assert sharded["stripped"].keys() == alone["stripped"].keys()
        for key, value in alone["stripped"].items():
            torch.testing.assert_close(sharded["stripped"][key], value, rtol=1e-4, atol=1e-4, msg=key)
            assert torch.equal(sharded["stripped"][key] == 0, value == 0)
