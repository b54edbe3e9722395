"""Single calls of palettization's specifications, configurations and compressor, valid and not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from coreai_opt.common import ExportBackend
from coreai_opt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from coreai_opt.palettization.config import OpKMeansPalettizerConfig, PATSchedule, VectorKMeansConfig
from coreai_opt.palettization.spec import (
    DefaultTrainingSpec,
    PalettizationGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    TrainingStrategy,
    TrainingStrategySpec,
)
from coreai_opt.quantization.spec import PerChannelGranularity, QuantizationSpec

__all__ = ["CALLS"]

INPUTS = (torch.zeros(1, 6),)
WEIGHT = torch.arange(24.0).reshape(4, 6)
GROUPS = {"type": "per_grouped_channel", "group_size": 2}


def palettizer(prepared: bool = True) -> KMeansPalettizer:
    made = KMeansPalettizer(nn.Sequential(nn.Linear(6, 8)))
    if prepared:
        made.prepare(INPUTS)
    return made


def blocks(**fields: Any) -> tuple[int, list[torch.Tensor]]:
    granularity = PerGroupedChannelGranularity(**fields)
    return granularity.num_blocks_to_cluster(WEIGHT), granularity.get_blocks_to_cluster(WEIGHT)


VECTORS = {"weight": PalettizationSpec(cluster_dim=2)}


def vector_config(**fields: Any) -> dict[str, Any]:
    config = ModuleKMeansPalettizerConfig(
        enable_fast_kmeans_mode=False, vector_kmeans_config={"n_init": 2, "max_iter": 7}, **fields
    )
    return config.model_dump()


def prepare_pruned(**fields: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the state of a layer with zeros in half of its weight."""
    model = nn.Sequential(nn.Linear(6, 8))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(-24.0, 24).reshape(8, 6).clamp(min=0))
    spec = PalettizationSpec(n_bits=2, sparsity_detection_threshold=0.1, **fields)
    config = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec}, enable_fast_kmeans_mode=False)
    KMeansPalettizer(model, KMeansPalettizerConfig(global_config=config)).prepare(INPUTS)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def disabled() -> dict[str, Any]:
    return KMeansPalettizerConfig(global_config=None).to_dict()


CALLS: dict[str, Callable[[], Any]] = {
    **{
        f"{n!r} bits": lambda n=n: PalettizationSpec(n_bits=n).n_bits
        for n in (0, 1, 3, 5, 7, 8, 9, "4", None)
    },
    **{
        f"cluster_dim {n!r}": lambda n=n: PalettizationSpec(cluster_dim=n).cluster_dim
        for n in (0, -1, 3, "2")
    },
    "unknown field": lambda: PalettizationSpec(bits=4),
    "granularity from a dict": lambda: PalettizationSpec(granularity=GROUPS).model_dump(),
    "granularity without a type": lambda: PalettizationSpec(granularity={"group_size": 2}),
    "unknown granularity": lambda: PalettizationSpec(granularity={"type": "per_row"}),
    "granularity by name": lambda: PalettizationSpec(granularity="per_tensor"),
    "no granularity": lambda: PalettizationSpec(granularity=None),
    "strategy from a dict": lambda: PalettizationSpec(
        training_strategy_spec={"type": "default"}
    ).model_dump(),
    "strategy by name": lambda: PalettizationSpec(training_strategy_spec="default"),
    "no strategy": lambda: PalettizationSpec(training_strategy_spec=None),
    "default strategy": lambda: DefaultTrainingSpec().model_dump(),
    "base strategy": lambda: TrainingStrategySpec().build_strategy(),
    "abstract strategy": lambda: TrainingStrategy(),
    "abstract granularity": lambda: PalettizationGranularity(),
    "LUT in int8": lambda: PalettizationSpec(lut_qspec={"dtype": "int8"}).lut_qspec.quant_max,
    "LUT in int4": lambda: PalettizationSpec(lut_qspec=QuantizationSpec(dtype="int4")),
    "LUT per channel": lambda: PalettizationSpec(
        lut_qspec=QuantizationSpec(granularity=PerChannelGranularity(axis=0))
    ),
    "LUT with minval": lambda: PalettizationSpec(lut_qspec=QuantizationSpec(qformulation="minval")),
    "frozen": lambda: setattr(PalettizationSpec(), "n_bits", 2),
    "kind": lambda: PalettizationSpec().get_compression_type(),
    "groups along 0": lambda: blocks(axis=0, group_size=2),
    "groups along 1": lambda: blocks(axis=1, group_size=3),
    "groups of a wrong size": lambda: blocks(axis=0, group_size=3),
    "groups along no axis": lambda: blocks(group_size=2),
    "groups along axis 2": lambda: blocks(axis=2, group_size=2),
    "groups of nothing": lambda: blocks(axis=0, group_size=0),
    "groups without a size": lambda: blocks(axis=0),
    "per tensor with an axis": lambda: PerTensorGranularity(axis=0),
    "config": lambda: KMeansPalettizerConfig().to_dict(),
    "disabled config": disabled,
    "config from another dict": lambda: KMeansPalettizerConfig.from_dict({"global_config": {}}),
    "config for inputs": lambda: ModuleKMeansPalettizerConfig(op_input_spec={"*": PalettizationSpec()}),
    "config for outputs of an operation": lambda: OpKMeansPalettizerConfig(
        op_output_spec={0: PalettizationSpec()}
    ),
    "fast vectors": lambda: ModuleKMeansPalettizerConfig(
        op_state_spec={"weight": PalettizationSpec(cluster_dim=2)}
    ),
    **{
        f"threshold {t!r}": lambda t=t: (
            PalettizationSpec(sparsity_detection_threshold=t).sparsity_detection_threshold
        )
        for t in (-0.1, 0, 0.5, 1, 1.1, True, None, "half")
    },
    "LUT in int6": lambda: PalettizationSpec(lut_qspec=QuantizationSpec(dtype="int6")),
    "LUT in int8 with powers of two": lambda: PalettizationSpec(
        lut_qspec=QuantizationSpec(dtype="int8", scale_dtype=torch.float8_e8m0fnu)
    ),
    "LUT in float8 with powers of two": lambda: PalettizationSpec(
        lut_qspec=QuantizationSpec(dtype="float8_e4m3fn", scale_dtype=torch.float8_e8m0fnu)
    ).model_dump(),
    "effort": lambda: VectorKMeansConfig().model_dump(),
    "effort is immutable": lambda: setattr(VectorKMeansConfig(), "n_init", 3),
    **{
        f"effort {fields}": lambda fields=fields: VectorKMeansConfig(**fields).model_dump()
        for fields in (
            {"n_init": 0},
            {"n_init": "3"},
            {"n_init": True},
            {"n_local_trials": 0},
            {"n_local_trials": 1.5},
            {"max_iter": 0},
            {"tol": -1},
            {"tol": float("nan")},
            {"tol": 0},
            {"foo": 1},
        )
    },
    "effort for scalars": lambda: ModuleKMeansPalettizerConfig(vector_kmeans_config=VectorKMeansConfig()),
    "effort for no vectors": lambda: ModuleKMeansPalettizerConfig(
        op_state_spec=None, vector_kmeans_config={"n_init": 2}
    ),
    **{
        f"effort for {where}": lambda fields=fields: vector_config(**fields)
        for where, fields in {
            "state": {"op_state_spec": VECTORS},
            "module": {"op_state_spec": None, "module_state_spec": VECTORS},
            "types": {"op_state_spec": None, "op_type_config": {"linear": {"op_state_spec": VECTORS}}},
            "names": {"op_state_spec": None, "op_name_config": {".*": {"op_state_spec": VECTORS}}},
        }.items()
    },
    "pruned vectors in columns": lambda: prepare_pruned(
        cluster_dim=2, granularity={"type": "per_grouped_channel", "axis": 1, "group_size": 2}
    ),
    "pruned vectors that a group cannot store": lambda: prepare_pruned(
        cluster_dim=4, granularity={"type": "per_grouped_channel", "axis": 0, "group_size": 1}
    ),
    "pruned vectors of odd channels": lambda: prepare_pruned(cluster_dim=5),
    "no decimals": lambda: ModuleKMeansPalettizerConfig(rounding_precision=0),
    "negative step": lambda: PATSchedule(enable_fake_palettize=-1),
    "presets": lambda: [
        getattr(KMeansPalettizerConfig.presets, name)().to_dict() for name in ("w4", "w6", "w8")
    ],
    "preset's arguments": lambda: ModuleKMeansPalettizerConfig.presets.w6(axis=1, group_size=4).model_dump(),
    "no model": lambda: KMeansPalettizer(3),
    "step before prepare": lambda: palettizer(prepared=False).step(),
    "step outside of training": lambda: palettizer().step(),
    "training before prepare": lambda: palettizer(prepared=False).training_mode().__enter__(),
    "calibration before prepare": lambda: palettizer(False).calibration_mode(loss_fn=sum).__enter__(),
    "calibration without a loss": lambda: palettizer().calibration_mode(),
    "saving before prepare": lambda: palettizer(prepared=False).save_sensitivities("unused"),
    "saving without sensitivities": lambda: palettizer().save_sensitivities("unused"),
    "finalize before prepare": lambda: palettizer(prepared=False).finalize(backend=ExportBackend.Torch),
    "finalize something else": lambda: palettizer().finalize(3, backend=ExportBackend.Torch),
    "mmap for torch": lambda: palettizer().finalize(backend=ExportBackend.Torch, mmap_dir="unused"),
    "prepare twice": lambda: palettizer().prepare(INPUTS),
    "no workers": lambda: palettizer(prepared=False).prepare(INPUTS, num_workers=0),
    "workers as text": lambda: palettizer(prepared=False).prepare(INPUTS, num_workers="2"),
    "no such file": lambda: palettizer(prepared=False).prepare(INPUTS, "/no/such/file.pt"),
    "no inputs": lambda: palettizer(prepared=False).prepare(None),
}
