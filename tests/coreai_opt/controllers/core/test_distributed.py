"""Several gloo processes train as one does on the same global batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coreai_opt.controllers import create_compressed_model

from ..support import configured, make_model
from .distributed_training import ALGORITHMS, FROZEN, OBSERVED, train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)

SCRIPT = Path(__file__).with_name("distributed_training.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_process(ranks: int, tmp_path: Path) -> None:
    path = tmp_path / "results.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*command, SCRIPT, path], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    together = torch.load(path, weights_only=True)
    for algorithms, of_ranks in zip((ALGORITHMS, OBSERVED, FROZEN), together, strict=True):
        alone = train(algorithms, 0, 1)
        # Sums over the batch are grouped otherwise: float32 rounding, which quantization steps may amplify.
        for name, value in alone["model"].items():
            torch.testing.assert_close(of_ranks["model"][name], value, rtol=1e-3, atol=1e-3, msg=name)
            if name.endswith(("draw", "mask")):
                assert torch.equal(of_ranks["model"][name], value)


def test_it_needs_a_process_group() -> None:
    controller, _ = create_compressed_model(make_model(), configured({"algorithm": "magnitude_sparsity"}))
    with pytest.raises(RuntimeError, match="init_process_group"):
        controller.distributed()
