"""Specifications, granularities, training strategies and configurations of palettization."""

import pytest
import torch
from pydantic import ValidationError

from coreai_opt.common import CompressionType
from coreai_opt.palettization import (
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from coreai_opt.palettization.config import OpKMeansPalettizerConfig, PATSchedule, VectorKMeansConfig
from coreai_opt.palettization.spec import (
    DefaultTrainingSpec,
    DKMTrainingSpec,
    PalettizationGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    StraightThroughTrainingSpec,
    TrainingStrategySpec,
    default_weight_palettization_spec,
)
from coreai_opt.palettization.spec.errors import _IncompatibleGranularityError
from coreai_opt.quantization.spec import PerChannelGranularity, QuantizationSpec

WEIGHT = torch.arange(24.0).reshape(4, 6)


def test_defaults():
    spec = default_weight_palettization_spec()
    assert spec == PalettizationSpec()
    assert (spec.n_bits, spec.lut_qspec, spec.cluster_dim, spec.enable_per_channel_scale) == (
        4,
        None,
        1,
        False,
    )
    assert spec.granularity == PerTensorGranularity()
    assert spec.training_strategy_spec == DefaultTrainingSpec()
    assert spec.get_compression_type() == CompressionType.PALETTIZATION


@pytest.mark.parametrize("n_bits", [0, 5, 7, 9, -1, "4", None])
def test_bits_that_no_index_has(n_bits):
    with pytest.raises(ValidationError, match="n_bits"):
        PalettizationSpec(n_bits=n_bits)


@pytest.mark.parametrize("fields", [{"cluster_dim": 0}, {"n_bit": 4}, {"granularity": None}])
def test_bad_fields(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        PalettizationSpec(**fields)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"dtype": "int4"}, "dtype"),
        ({"granularity": PerChannelGranularity(axis=0)}, "granularity"),
        ({"qformulation": "minval"}, "qformulation"),
        ({"dtype": "int6"}, "dtype"),
        ({"dtype": "int8", "scale_dtype": torch.float8_e8m0fnu}, "scale_dtype"),
    ],
)
def test_palettes_that_cannot_be_quantized(quantization, named):
    with pytest.raises(ValidationError, match=rf"lut_qspec\b[^\[]*\b{named}\b"):
        PalettizationSpec(lut_qspec=quantization)


def test_floating_point_palettes_may_have_power_of_two_scales():
    quantization = QuantizationSpec(dtype="float8_e4m3fn", scale_dtype=torch.float8_e8m0fnu)
    assert PalettizationSpec(lut_qspec=quantization).lut_qspec == quantization


def test_threshold_of_sparsity():
    assert PalettizationSpec().sparsity_detection_threshold is None
    for threshold in (0, 1, 0.5, True):
        found = PalettizationSpec(sparsity_detection_threshold=threshold).sparsity_detection_threshold
        assert found == float(threshold)
        assert isinstance(found, float)
    for threshold in (-0.1, 1.1, "half"):
        with pytest.raises(ValidationError, match="sparsity_detection_threshold"):
            PalettizationSpec(sparsity_detection_threshold=threshold)


def test_effort_of_vector_clustering():
    config = VectorKMeansConfig()
    assert (config.n_local_trials, config.n_init, config.max_iter, config.tol) == (None, 5, 300, 1e-4)
    for bad in ({"n_init": 0}, {"n_local_trials": 0}, {"max_iter": 0}, {"tol": -1}, {"tol": float("nan")}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            VectorKMeansConfig(**bad)
    with pytest.raises(ValidationError, match="foo"):
        VectorKMeansConfig(foo=1)
    with pytest.raises(ValidationError, match="frozen"):
        config.n_init = 3


VECTORS = {"weight": PalettizationSpec(cluster_dim=2)}
SCALARS = {"weight": PalettizationSpec()}


@pytest.mark.parametrize(
    "fields",
    [
        {"op_state_spec": VECTORS},
        {"op_state_spec": SCALARS, "module_state_spec": VECTORS},
        {
            "op_state_spec": None,
            "op_type_config": {"linear": OpKMeansPalettizerConfig(op_state_spec=VECTORS)},
        },
        {"op_state_spec": None, "op_name_config": {".*": OpKMeansPalettizerConfig(op_state_spec=VECTORS)}},
    ],
)
def test_effort_where_there_are_vectors(fields):
    config = ModuleKMeansPalettizerConfig(
        enable_fast_kmeans_mode=False, vector_kmeans_config={"n_init": 2, "max_iter": 7}, **fields
    )
    assert config.vector_kmeans_config == VectorKMeansConfig(n_init=2, max_iter=7)
    assert config.validate_vector_kmeans_has_vector_spec() is config
    again = ModuleKMeansPalettizerConfig(**config.model_dump())
    assert again.vector_kmeans_config == config.vector_kmeans_config


def test_effort_without_vectors():
    with pytest.raises(
        ValidationError, match="no specification of this module configuration has a cluster_dim"
    ):
        ModuleKMeansPalettizerConfig(vector_kmeans_config=VectorKMeansConfig())
    config = ModuleKMeansPalettizerConfig()
    with pytest.raises(ValidationError, match="vector_kmeans_config"):
        config.vector_kmeans_config = VectorKMeansConfig()
    assert config.vector_kmeans_config is None
    config = ModuleKMeansPalettizerConfig(
        op_state_spec=VECTORS, enable_fast_kmeans_mode=False, vector_kmeans_config=VectorKMeansConfig()
    )
    with pytest.raises(ValidationError, match="cluster_dim above 1"):
        config.op_state_spec = SCALARS
    assert config.op_state_spec == VECTORS
    config.vector_kmeans_config = None
    config.op_state_spec = SCALARS


def test_granularity_and_strategy_from_dicts():
    spec = PalettizationSpec(
        granularity={"type": "per_grouped_channel", "axis": 1, "group_size": 2},
        training_strategy_spec={"type": "dkm", "temperature": 0.5},
    )
    assert spec.granularity == PerGroupedChannelGranularity(axis=1, group_size=2)
    assert spec.training_strategy_spec == DKMTrainingSpec(temperature=0.5)
    with pytest.raises(KeyError):
        PalettizationSpec(granularity={"type": "per_row"})


def test_dump_and_objects():
    spec = PalettizationSpec(
        lut_qspec=QuantizationSpec(), granularity=PerGroupedChannelGranularity(group_size=2)
    )
    dumped = spec.model_dump()
    assert dumped["granularity"] == {"axis": None, "group_size": 2, "type": "per_grouped_channel"}
    assert dumped["training_strategy_spec"] == {"type": "default"}
    assert PalettizationSpec(**dumped) == spec
    assert spec.model_dump_preserve_objects()["lut_qspec"] is spec.lut_qspec


def test_granularities():
    groups = PerGroupedChannelGranularity(axis=1, group_size=2)
    assert groups.num_blocks_to_cluster(WEIGHT) == 3
    blocks = groups.get_blocks_to_cluster(WEIGHT)
    assert torch.equal(torch.cat(blocks, 1), WEIGHT)
    assert {tuple(block.shape) for block in blocks} == {(4, 2)}
    assert PerTensorGranularity().num_blocks_to_cluster(WEIGHT) == 1
    assert PerTensorGranularity().get_blocks_to_cluster(WEIGHT)[0] is WEIGHT
    assert PalettizationGranularity.list_registry_keys() == {"per_tensor", "per_grouped_channel"}


@pytest.mark.parametrize(
    ("granularity", "weight", "message"),
    [
        (PerGroupedChannelGranularity(group_size=2), WEIGHT, "axis=None"),
        (PerGroupedChannelGranularity(axis=0, group_size=3), WEIGHT, "not divisible by group_size 3"),
        (PerGroupedChannelGranularity(axis=0, group_size=2), WEIGHT[0], "2 dimensions or more"),
    ],
)
def test_granularities_that_do_not_fit(granularity, weight, message):
    for method in (granularity.num_blocks_to_cluster, granularity.get_blocks_to_cluster):
        with pytest.raises(_IncompatibleGranularityError, match=message):
            method(weight)


@pytest.mark.parametrize("fields", [{"axis": 2, "group_size": 1}, {"group_size": 0}, {}])
def test_bad_granularities(fields):
    with pytest.raises(ValidationError):
        PerGroupedChannelGranularity(**fields)


def test_strategies():
    assert {"default", "straight_through", "dkm"} <= TrainingStrategySpec.list_registry_keys()
    strategy = StraightThroughTrainingSpec(refresh_interval=3).build_strategy()
    assert strategy.refresh_interval == 3
    with pytest.raises(ValidationError, match="refresh_interval"):
        StraightThroughTrainingSpec(refresh_interval=0)
    for temperature in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValidationError, match="temperature"):
            DKMTrainingSpec(temperature=temperature)
    with pytest.raises(AttributeError, match="_strategy_cls"):
        TrainingStrategySpec().build_strategy()


def test_config_defaults_and_dicts():
    config = KMeansPalettizerConfig()
    assert config.global_config.op_state_spec == {
        "weight": PalettizationSpec(),
        "in_proj_weight": PalettizationSpec(),
    }
    assert list(config.to_dict()) == ["kmeans_palettization_config"]
    assert KMeansPalettizerConfig.from_dict(config.to_dict()) == config
    strategies = PalettizationSpec(training_strategy_spec=DKMTrainingSpec())
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": strategies}),
        module_type_configs={torch.nn.Conv2d: None},
    )
    assert KMeansPalettizerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "field", ["op_input_spec", "op_output_spec", "module_input_spec", "module_output_spec"]
)
def test_only_weights_are_palettized(field):
    with pytest.raises(ValidationError, match=field):
        ModuleKMeansPalettizerConfig(**{field: {"*": PalettizationSpec()}})
    if field.startswith("op"):
        with pytest.raises(ValidationError, match=field):
            OpKMeansPalettizerConfig(**{field: {"*": PalettizationSpec()}})


def test_fast_mode_is_for_scalars():
    vectors = {"weight": PalettizationSpec(cluster_dim=2)}
    with pytest.raises(ValidationError, match=r"cluster_dim=2 for 'weight'"):
        ModuleKMeansPalettizerConfig(op_state_spec=vectors)
    config = ModuleKMeansPalettizerConfig(op_state_spec=vectors, enable_fast_kmeans_mode=False)
    assert config.validate_fast_kmeans_cluster_dim_constraint() is config
    with pytest.raises(ValidationError, match="enable_fast_kmeans_mode"):
        config.enable_fast_kmeans_mode = True
    assert config.enable_fast_kmeans_mode is False
    scalars = ModuleKMeansPalettizerConfig()
    with pytest.raises(ValidationError, match="enable_fast_kmeans_mode"):
        scalars.op_state_spec = vectors
    assert scalars == ModuleKMeansPalettizerConfig()


@pytest.mark.parametrize(
    "fields", [{"rounding_precision": 0}, {"pat_schedule": {"enable_fake_palettize": -1}}]
)
def test_bad_module_configs(fields):
    with pytest.raises(ValidationError):
        ModuleKMeansPalettizerConfig(**fields)


def test_schedules_are_frozen():
    schedule = PATSchedule(enable_fake_palettize=3)
    with pytest.raises(ValidationError):
        schedule.enable_fake_palettize = 4


@pytest.mark.parametrize(("preset", "n_bits"), [("w4", 4), ("w6", 6), ("w8", 8)])
def test_presets(preset, n_bits):
    module_config = getattr(ModuleKMeansPalettizerConfig.presets, preset)()
    assert getattr(KMeansPalettizerConfig.presets, preset)().global_config == module_config
    spec = module_config.op_state_spec["in_proj_weight"]
    assert spec.n_bits == n_bits
    grouped = PerGroupedChannelGranularity(axis=0, group_size=16)
    assert spec.granularity == (PerTensorGranularity() if n_bits == 8 else grouped)


def test_preset_arguments():
    spec = KMeansPalettizerConfig.presets.w4(axis=1, group_size=8).global_config.op_state_spec["weight"]
    assert spec.granularity == PerGroupedChannelGranularity(axis=1, group_size=8)
