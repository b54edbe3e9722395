"""Safetensors files that are written tensor by tensor, and read by the package."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from coreai_opt.export.checkpoints import Content
from coreai_opt.export.tensor_stream import write_tensors
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity, QuantizationSpec

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e8m0fnu, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip


def test_the_package_reads_what_was_written(tmp_path):
    torch.manual_seed(0)
    # Odd numbers of bytes in front of wide types: the package wants those aligned.
    tensors = {
        f"layer.{index}": torch.randint(0, 2, shape).to(dtype)
        for index, (dtype, shape) in enumerate((dtype, (3, size)) for size in (5, 8) for dtype in DTYPES)
    }
    tensors |= {"none": torch.zeros(0, 4), "one": torch.tensor(3.0), "columns": torch.randn(6, 4).T}
    path = tmp_path / "file.safetensors"
    metadata = {"format": "pt"}

    def lazily():
        yield from tensors.items()
        metadata["late"] = "known after the last tensor"

    write_tensors(path, lazily(), metadata, 8000)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata


def test_what_does_not_fit_is_told(tmp_path):
    path = tmp_path / "file.safetensors"
    with pytest.raises(ValueError, match="header_size: the header has"):
        write_tensors(path, [("name", torch.zeros(1))], {}, 16)
    with pytest.raises(ValueError, match=r"'name' has the dtype torch\.complex128"):
        write_tensors(path, [("name", torch.zeros(1, dtype=torch.complex128))], {}, 100)


def memory(kind):
    """Bytes of memory that the process has, or had at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int4", "float4_e2m1fn"])
def test_a_checkpoint_takes_memory_for_one_layer(dtype, tmp_path):
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("the most memory of a process is known on Linux")
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))
    of_layer = model[0].weight.nbytes
    spec = QuantizationSpec(dtype=dtype, granularity=PerBlockGranularity(axis=1, block_size=32))
    weights = ModuleQuantizerConfig(op_state_spec={"weight": spec}, op_input_spec=None, op_output_spec=None)
    config = QuantizerConfig(global_config=weights, execution_mode="eager")
    content = Content(Quantizer(model, config).prepare((torch.zeros(1, 2048),)))
    gc.collect()
    reset.write_text("5")
    before = memory("VmRSS")
    path = tmp_path / "file.safetensors"
    write_tensors(path, content.tensors(), {"format": "pt"}, content.header_size(with_configuration=False))
    assert memory("VmHWM") - before < of_layer
    assert path.stat().st_size > 1.2 * of_layer  # more than what all layers at once would need
