"""The uncompressed model teaches a 90 % sparse one."""

from common import run

ALGORITHMS = [
    {
        "algorithm": "magnitude_sparsity",
        "params": {"sparsity_target": 0.9, "sparsity_target_epoch": 5},
    },
    {"algorithm": "knowledge_distillation", "type": "softmax", "temperature": 2.0},
]

if __name__ == "__main__":
    run(*ALGORITHMS)
