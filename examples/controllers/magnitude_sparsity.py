"""80 % of the weights are masked, the smallest first, along a polynomial schedule."""

from common import run

ALGORITHMS = [
    {
        "algorithm": "magnitude_sparsity",
        "params": {"sparsity_target": 0.8, "sparsity_target_epoch": 5, "update_per_optimizer_step": True},
    },
]

if __name__ == "__main__":
    run(*ALGORITHMS)
