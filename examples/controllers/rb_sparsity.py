"""Random masks whose probabilities are learned, until 60 % of the weights are masked."""

from common import run

ALGORITHMS = [
    {
        "algorithm": "rb_sparsity",
        "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 5, "sparsity_freeze_epoch": 7},
        "compression_lr_multiplier": 1.0,
    },
]

if __name__ == "__main__":
    run(*ALGORITHMS)
