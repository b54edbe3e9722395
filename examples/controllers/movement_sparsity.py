"""Weights that training moves towards zero are masked: here dimensions of the hidden layer, as a whole."""

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
        "sparse_structure_by_scopes": [
            {"mode": "per_dim", "axis": 0, "target_scopes": "hidden"},
            {"mode": "per_dim", "axis": 1, "target_scopes": "classify"},
        ],
    },
]

if __name__ == "__main__":
    run(*ALGORITHMS)
