"""Exported torch programs: ``.pt2`` files."""

from pathlib import Path

import torch
from torch import Tensor

from coreai_opt.export.files import Job, flat_outputs, require_space

__all__ = ["check", "run", "write"]


def check(job: Job) -> None:
    """ValueError for options: there are none."""
    if job.options or job.half:
        named = sorted(job.options) + ["half"] * job.half
        raise ValueError(f"there are no options {named} for .pt2")


def write(job: Job, path: Path) -> None:
    """Export the model, finalized for torch, and write it.

    Raises:
        OSError: there is no space for it. torch would end the process.
    """
    require_space(path.parent, job.model)
    program = torch.export.export(job.model, job.args, dynamic_shapes=job.dynamic_shapes, strict=False)
    torch.export.save(program, path)


def run(job: Job, path: Path) -> list[Tensor]:
    """What the written program computes for the example."""
    with torch.no_grad():
        return flat_outputs(torch.export.load(path).module()(*job.args))
