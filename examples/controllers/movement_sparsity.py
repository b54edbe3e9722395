"""Weights that training moves towards zero are masked."""

from common import run

ALGORITHMS = [
    {
        "algorithm": "movement_sparsity",
        "params": {
            "warmup_start_epoch": 1,
            "warmup_end_epoch": 5,
            "importance_regularization_factor": 0.2,
            "init_importance_threshold": -0.1,
        },
    },
]

if __name__ == "__main__":
    run(*ALGORITHMS)
