"""Every algorithm with every schedule, and what resumes their saved runs in a process of its own."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..support import EPOCHS, STEPS, Run, configured, make_model, make_transformer

BY_STEP = {"update_per_optimizer_step": True}
SPARSITY = {
    "polynomial": {},
    "polynomial-by-step": BY_STEP,
    "convex": {"concave": False, "power": 3},
    "exponential": {"schedule": "exponential"},
    "exponential-by-step": {"schedule": "exponential", **BY_STEP},
    "exponential-with-bias": {"schedule": "exponential_with_bias"},
    "exponential-with-bias-by-step": {"schedule": "exponential_with_bias", **BY_STEP},
    "multistep": {"schedule": "multistep", "multistep_steps": [1], "multistep_sparsity_levels": [0.2, 0.6]},
    "adaptive": {"schedule": "adaptive"},
    "adaptive-patient": {"schedule": "adaptive", "patience": 2},
    "baseline": {"schedule": "baseline"},
    "frozen": {"sparsity_freeze_epoch": 2},
    "local": {"sparsity_level_setting_mode": "local", **BY_STEP},
}
PRUNING = {
    "exponential": {},
    "exponential-by-step": BY_STEP,
    "exponential-with-bias": {"schedule": "exponential_with_bias"},
    "exponential-with-bias-by-step": {"schedule": "exponential_with_bias", **BY_STEP},
    "baseline": {"schedule": "baseline", "num_init_steps": 1},
    "over-all-layers": {"all_weights": True, "filter_importance": "geometric_median"},
}
STAGES = {
    "at-once": {},
    "activations-first": {"weights_quant_start_epoch": 1},
    "weights-first": {"activations_quant_start_epoch": 2, "weights_quant_start_epoch": 1},
}
MOVEMENT = {"warmup_start_epoch": 1, "warmup_end_epoch": 2, "importance_regularization_factor": 0.5}


def _cases() -> dict[str, Any]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for name, params in SPARSITY.items():
        for algorithm in ("magnitude_sparsity", "rb_sparsity"):
            settings = {
                "schedule": "polynomial",
                "sparsity_target": 0.6,
                "sparsity_target_epoch": 2,
                **params,
            }
            cases[f"{algorithm}-{name}"] = [{"algorithm": algorithm, "params": settings}]
    for name, params in PRUNING.items():
        settings = {"prune_first_conv": True, "pruning_target": 0.6, "pruning_steps": 3, **params}
        cases[f"filter_pruning-{name}"] = [{"algorithm": "filter_pruning", "params": settings}]
    flops = {"prune_first_conv": True, "pruning_flops_target": 0.6, "pruning_steps": 3}
    cases["filter_pruning-flops"] = [{"algorithm": "filter_pruning", "params": flops}]
    for name, params in STAGES.items():
        for kind, more in (
            ("performance", {}),
            ("mixed", {"preset": "mixed", "initializer": {"range": {"type": "percentile"}}}),
            ("observed", {"initializer": {"range": {"num_init_samples": 0}}}),
            ("learned", {"learnable_ranges": True, "preset": "mixed"}),
        ):
            cases[f"quantization-{kind}-{name}"] = [{"algorithm": "quantization", "params": params, **more}]
    cases["movement_sparsity"] = [{"algorithm": "movement_sparsity", "params": MOVEMENT}]
    shared = [
        {"mode": "block", "sparse_factors": [4, 2], "target_scopes": "{re}query|key|value"},
        {"mode": "per_dim", "axis": 1, "target_scopes": ["attention.output", "down"]},
        {"mode": "per_dim", "axis": 0, "target_scopes": ["gate", "up"]},
    ]
    cases["movement_sparsity-structured"] = [
        {
            "algorithm": "movement_sparsity",
            "params": {**MOVEMENT, "enable_structured_masking": True},
            "sparse_structure_by_scopes": shared,
        }
    ]
    cases["const_sparsity"] = [{"algorithm": "const_sparsity"}]
    for name, params in {
        "at-once": {},
        "later": {"palettization_start_epoch": 1, "refresh_interval": 2},
    }.items():
        cases[f"palettization-{name}"] = [{"algorithm": "palettization", "bits": 2, "params": params}]
    for kind in ("softmax", "mse"):
        cases[f"knowledge_distillation-{kind}"] = [{"algorithm": "knowledge_distillation", "type": kind}]
    cases["composed"] = [
        {"algorithm": "knowledge_distillation", "type": "softmax"},
        {"algorithm": "rb_sparsity", "params": {"sparsity_target_epoch": 2, "sparsity_freeze_epoch": 2}},
        {"algorithm": "quantization", "preset": "mixed", "params": {"activations_quant_start_epoch": 1}},
    ]
    cases["pruned-and-quantized"] = [
        cases["filter_pruning-exponential-by-step"][0],
        {"algorithm": "quantization", "learnable_ranges": True},
    ]
    return cases


CASES = _cases()


def make_run(case: str, saved: bytes | None = None) -> Run:
    """A new run of a case, or the one that was saved."""
    make: Any = make_model
    if "filter_pruning" in case or "pruned" in case:
        make = partial(make_model, width=24)  # kept filters are multiples of 8
    elif "structured" in case:
        make = make_transformer
    config = configured(*CASES[case])
    return Run(config, make=make) if saved is None else Run.resumed(config, saved, make=make)


def masks_of(run: Run) -> dict[str, Any]:
    """Copies of the masks that inference has now, by algorithm and layer."""
    children = getattr(run.controller, "child_ctrls", [run.controller])
    return {
        child.name: {name: mask.detach().clone() for name, mask in child.masks().items()}
        for child in children
        if hasattr(child, "masks")
    }


def train_on(run: Run, until: int = EPOCHS * STEPS) -> list[dict[str, Any]]:
    """Train up to a step; what was seen at each."""
    seen = []
    for step in range(run.step, until):
        run.train(step + 1)
        seen.append(
            {
                "loss": run.losses[-1],
                "masks": masks_of(run),
                "stage": int(run.controller.compression_stage()),
                "rate": run.controller.compression_rate,
            }
        )
    return seen


def resume_all(case: str, folder: Path) -> bytes:
    """From each file of the case on, train to the end. Runs in a process that has not seen the saved run.

    Returns:
        What ``torch.save`` writes: by name of the file, what was seen at each step, and the state in the end.
    """
    # As the first process: threads group the sums of a convolution's gradient.
    torch.set_num_threads(1)
    results = {}
    for path in sorted(folder.iterdir()):
        run = make_run(case, path.read_bytes())
        seen = train_on(run)
        results[path.name] = {"seen": seen, "end": run.snapshot()}
    stream = io.BytesIO()
    torch.save(results, stream)
    return stream.getvalue()
