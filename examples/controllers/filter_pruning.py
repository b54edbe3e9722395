"""Half of the FLOPs are saved by removing filters; the stripped model is really smaller."""

from common import run

ALGORITHMS = [
    {
        "algorithm": "filter_pruning",
        "params": {"pruning_flops_target": 0.5, "pruning_steps": 5, "prune_first_conv": True},
    },
]

if __name__ == "__main__":
    run(*ALGORITHMS)
