"""Attention masks, whose values are the ends of a dtype, are not quantized."""

import logging

import pytest
import torch
from torch import nn

from coreai_opt.quantization import Quantizer, QuantizerConfig


class Attention(nn.Module):
    def __init__(self, masked):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.masked = masked

    def forward(self, x, mask):
        bias = torch.where(mask[:, None, :], 0.0, self.masked).to(x.dtype)
        scores = torch.matmul(self.query(x), x.transpose(1, 2)) + bias
        return torch.matmul(torch.softmax(scores, -1), self.value(x))


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_padding_stays_padding(mode, masked, caplog):
    torch.manual_seed(0)
    model = Attention(masked)
    expected = model(X, MASK)
    quantizer = Quantizer(model, QuantizerConfig(execution_mode=mode))
    with caplog.at_level(logging.INFO, "coreai_opt"):
        prepared = quantizer.prepare((X, MASK))
    assert [each for each in caplog.messages if "hold masks" in each]
    with quantizer.training_mode():
        found = prepared(X, MASK)
        found.sum().backward()
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    # What padding holds has no effect.
    other = X.clone()
    other[1, 3:] += 0.5
    prepared.eval()
    assert torch.equal(prepared(X, MASK)[1, :3], prepared(other, MASK)[1, :3])
    assert all(each.grad.isfinite().all() for each in prepared.parameters() if each.grad is not None)


def test_other_activations_are_quantized_as_before():
    quantizer = Quantizer(Attention(-torch.inf), QuantizerConfig(execution_mode="eager"))
    model = quantizer.prepare((X, MASK))
    names = {name for name, _ in model.named_modules() if "_quantize_" in name and "." not in name}
    assert "add_quantize_input" in names
    assert not names & {"add_quantize_other", "add_quantize_output_0"}
