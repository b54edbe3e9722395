"""A language model of one layer, and text that it can learn, for the examples beside this file."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["VOCABULARY", "model", "sequences"]

VOCABULARY = 32


def model() -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )


def sequences(count: int = 64, length: int = 16) -> Tensor:
    """Numbers that go on by 1, 2 or 3, ``[count, length]``."""
    generator = torch.Generator().manual_seed(1)
    starts, steps = (torch.randint(1, high, (count, 1), generator=generator) for high in (VOCABULARY, 4))
    return (starts + steps * torch.arange(length)) % (VOCABULARY - 1) + 1
