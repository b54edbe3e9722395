"""Small trained models for the tests of post-training algorithms."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, QuantizationSpec

VOCABULARY, WIDTH = 31, 64


class Block(nn.Module):
    """Attention and a gated feed-forward layer, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (each(h).unflatten(-1, (4, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """Two blocks that predict the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens(count: int, seed: int) -> Tensor:
    """Sequences of 24 that go on by one of two rules, which the first tokens tell."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randint(VOCABULARY, (count, 1), generator=generator) for _ in range(2)]
    rule = torch.randint(2, (count, 1), generator=generator)
    for _ in range(22):
        noise = (torch.rand(count, 1, generator=generator) < 0.05).long()
        follow = torch.where(rule == 0, found[-1] * 3 + found[-2], found[-1] + 2 * found[-2] + 5)
        found.append((follow + noise) % VOCABULARY)
    return torch.cat(found, 1)


def loss_of(model: nn.Module, data: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens from the fourth on."""
    return F.cross_entropy(model(data[:, :-1])[:, 2:].flatten(0, 1), data[:, 3:].flatten())


@functools.cache
def _trained_state() -> dict[str, Tensor]:
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        model = Transformer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(350):
            loss = loss_of(model, tokens(64, seed=step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def trained() -> Transformer:
    """A new copy of the trained model, in evaluation mode."""
    model = Transformer()
    model.load_state_dict(_trained_state())
    return model.eval()


def prepared(
    model: nn.Module, example: Tensor, dtype: str = "int4", block: int | None = 32, **spec: object
) -> tuple[nn.Module, Quantizer]:
    """The model with quantized linear layers and convolutions; activations stay."""
    granularity = (
        PerChannelGranularity(axis=None)
        if block is None
        else PerBlockGranularity(axis=None, block_size=block)
    )
    state = QuantizationSpec(dtype=dtype, granularity=granularity, **spec)
    layers = ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None, op_state_spec={"weight": state})
    config = QuantizerConfig(
        execution_mode="eager",
        global_config=layers,
        module_type_configs={nn.Embedding: None, nn.LayerNorm: None, nn.RMSNorm: None},
    )
    quantizer = Quantizer(model, config)
    return quantizer.prepare((example,)), quantizer


def batches(count: int = 8) -> list[Tensor]:
    """Calibration data."""
    return list(tokens(32 * count, seed=10_000)[:, :-1].split(32))
