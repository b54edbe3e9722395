"""int8 weights and activations, with ranges from data and batch norm adapted to them."""

from common import run

ALGORITHMS = [
    {"algorithm": "quantization", "preset": "mixed"},
]

if __name__ == "__main__":
    run(*ALGORITHMS)
