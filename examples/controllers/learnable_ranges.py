"""int4 weights and int8 activations whose ranges are trained with the weights."""

from common import run

ALGORITHMS = [
    {"algorithm": "quantization", "learnable_ranges": True, "weights": {"bits": 4}},
]

if __name__ == "__main__":
    run(*ALGORITHMS)
