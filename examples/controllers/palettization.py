"""Weights of 8 distinct values in each group of 8 channels."""

from common import run

ALGORITHMS = [
    {
        "algorithm": "palettization",
        "bits": 3,
        "target_scopes": ["stem", "expand", "contract", "hidden"],
        "group_size": 8,
    },
]

if __name__ == "__main__":
    run(*ALGORITHMS)
