"""Filter pruning, int8 quantization and distillation together."""

from common import Outcome, compress, run

ALGORITHMS = [
    {
        "algorithm": "filter_pruning",
        "params": {"pruning_target": 0.5, "pruning_steps": 5, "prune_first_conv": True},
    },
    {"algorithm": "quantization"},
    {"algorithm": "knowledge_distillation", "type": "softmax", "temperature": 2.0},
]


def demonstrate(epochs: int = 6, images: int | None = None) -> Outcome:
    """The composed run: prints its statistics table, and returns that with the accuracies."""
    return compress(ALGORITHMS, epochs, images)


if __name__ == "__main__":
    run(*ALGORITHMS)
