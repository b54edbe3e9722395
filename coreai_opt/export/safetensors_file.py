"""Quantized weights in one ``.safetensors`` file, in the formats of compressed-tensors."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from coreai_opt.common import ExportBackend
from coreai_opt.export.checkpoint_loading import read_dense
from coreai_opt.export.checkpoints import CONFIG_KEY, Content
from coreai_opt.export.files import Job, flat_outputs
from coreai_opt.export.lowering import finalized_for
from coreai_opt.export.tensor_stream import write_tensors

__all__ = ["check", "run", "write"]

_OPTIONS = ("ignore",)


def check(job: Job) -> None:
    """Raise for unknown options, and for what checkpoints do not hold, as :class:`.Content` does."""
    unknown = sorted(set(job.options) - set(_OPTIONS)) + ["half"] * job.half
    unknown += ["dynamic_shapes"] * (job.dynamic_shapes is not None)
    if unknown:
        raise ValueError(f"there are no options {unknown} for .safetensors; there is 'ignore'")
    Content(job.model, job.options.get("ignore", ()))  # which raises for what cannot be stored


def write(job: Job, path: Path) -> None:
    """Write the prepared model's tensors, and in the header the configuration."""
    content = Content(job.model, job.options.get("ignore", ()))
    metadata = {"format": "pt"}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from content.tensors()
        metadata[CONFIG_KEY] = json.dumps(content.configuration())

    write_tensors(path, tensors(), metadata, content.header_size(with_configuration=True))


@torch.no_grad()
def run(job: Job, path: Path) -> list[Tensor]:
    """What the model computes with the weights in the file."""
    model = finalized_for(copy.deepcopy(job.model), ExportBackend.Torch)
    for name, weight in read_dense(model, path).items():
        model.get_parameter(name).copy_(weight)
    return flat_outputs(model.eval()(*job.args))
