"""A run of several algorithms continues in another process as if it had never stopped."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from .support import Run, assert_same_model, check_resume, configured

ALGORITHMS = (
    {"algorithm": "knowledge_distillation", "type": "softmax"},
    {"algorithm": "rb_sparsity", "params": {"sparsity_target_epoch": 2, "sparsity_freeze_epoch": 2}},
    {"algorithm": "quantization", "preset": "mixed", "params": {"activations_quant_start_epoch": 1}},
)
ROOT = Path(__file__).resolve().parents[3]
CODE = """
import sys
from pathlib import Path

import torch
from controllers.support import Run, configured
from controllers.test_resume import ALGORITHMS

torch.set_num_threads(1)  # as the first process: threads group the sums of a convolution's gradient
saved, result = map(Path, sys.argv[1:])
run = Run.resumed(configured(*ALGORITHMS), saved.read_bytes())
run.train()
torch.save({"run": run.save(), "losses": run.losses}, result)
"""


def test_in_a_new_process(tmp_path: Path) -> None:
    run = Run(configured(*ALGORITHMS))
    run.train(5)
    (tmp_path / "saved").write_bytes(run.save())
    run.train()

    folders = [ROOT, ROOT / "kernels", ROOT / "tests" / "coreai_opt", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", CODE, tmp_path / "saved", tmp_path / "result"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result")
    assert torch.equal(torch.stack(result["losses"]), torch.stack(run.losses[5:]))
    again = Run.resumed(configured(*ALGORITHMS), result["run"])
    assert_same_model(again.model, run.model)


def test_at_any_step() -> None:
    check_resume(configured(*ALGORITHMS))
