"""Caches of keys and values in finalized models hold quantized values."""

import pytest
import torch
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.quantization import Quantizer, QuantizerConfig
from coreai_opt.quantization.config import KVCacheQuantConfig, OpQuantizerConfig
from coreai_opt.quantization.spec import QuantizationSpec

pytest.importorskip("coreai_torch", reason="needs the extra coreai")


@torch.library.custom_op("export_tests::write_cache", mutates_args=())
def write_cache(cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    result = cache.clone()
    result[:, 0] = new
    return result


@write_cache.register_fake
def _(cache, new):
    return torch.empty_like(cache)


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.key = nn.Linear(4, 4)

    def forward(self, x, cache):
        return torch.ops.export_tests.write_cache(cache, self.key(x)) * 2.0


class NoInput(Cached):
    def forward(self, x, cache):
        return torch.ops.export_tests.write_cache(cache * 2, self.key(x))


def prepared(model, inputs):
    spec = QuantizationSpec(dtype="int8", qscheme="asymmetric")
    operation = OpQuantizerConfig(op_input_spec={1: spec}, op_output_spec=None, op_state_spec=None)
    config = QuantizerConfig(
        global_config=None,
        kv_cache_quant_configs={"write_cache": KVCacheQuantConfig(op_quantizer_config=operation)},
    )
    quantizer = Quantizer(model.eval(), config)
    return quantizer, quantizer.prepare(inputs).eval()


@torch.no_grad()
def test_the_cache_is_an_input_of_the_quantized_dtype():
    inputs = (torch.randn(2, 4), torch.zeros(2, 3, 4))
    quantizer, graph = prepared(Cached(), inputs)
    expected = graph(*inputs)
    finalized = quantizer.finalize()
    placeholders = {
        node.name: node.meta["val"].dtype for node in finalized.graph.nodes if node.op == "placeholder"
    }
    assert list(placeholders.values()) == [torch.float32, torch.int8]
    order = [str(node.target) for node in finalized.graph.nodes if node.op == "call_function"]
    chain = [name for name in order if "quantize" in name or "write_cache" in name]
    assert chain == [
        "coreai.quantize.default",
        "export_tests.write_cache.default",
        "coreai.dequantize.default",
    ]
    zero_point = next(value for name, value in finalized.named_buffers() if name.endswith("_zero_point"))
    quantized_cache = torch.full((2, 3, 4), int(zero_point), dtype=torch.int8)
    assert torch.equal(finalized(inputs[0], quantized_cache), expected)
    assert torch.equal(graph(*inputs), expected)


def test_core_ml_and_torch():
    inputs = (torch.randn(2, 4), torch.zeros(2, 3, 4))
    quantizer, graph = prepared(Cached(), inputs)
    with pytest.raises(NotImplementedError, match="kv_cache_quant_configs"):
        quantizer.finalize(backend=ExportBackend.CoreML)
    finalized = quantizer.finalize(backend=ExportBackend.Torch)
    with torch.no_grad():
        assert torch.equal(finalized(*inputs), graph(*inputs))


def test_a_cache_must_be_an_input_of_the_model():
    inputs = (torch.randn(2, 4), torch.zeros(2, 3, 4))
    quantizer, _ = prepared(NoInput(), inputs)
    with pytest.raises(NotImplementedError, match="exactly one input"):
        quantizer.finalize()
