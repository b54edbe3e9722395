"""The simulator: what it computes, its state, and what it refuses."""

import copy
import logging
import pickle

import pytest
import torch

from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize
from coreai_opt.palettization.spec import PerGroupedChannelGranularity, PerTensorGranularity
from coreai_opt.quantization.spec import QuantizationSpec

BLOCKS = PerGroupedChannelGranularity(axis=0, group_size=4)
COLUMNS = PerGroupedChannelGranularity(axis=1, group_size=3)
SPECS = {
    "scalars": {"n_bits": 2},
    "groups": {"n_bits": 2, "granularity": BLOCKS},
    "columns": {"n_bits": 1, "granularity": COLUMNS},
    "vectors": {"n_bits": 2, "cluster_dim": 2},
    "vectors in groups": {"n_bits": 2, "cluster_dim": 4, "granularity": BLOCKS},
    "vectors in columns": {"n_bits": 1, "cluster_dim": 2, "granularity": COLUMNS},
    "scaled": {"n_bits": 3, "enable_per_channel_scale": True},
    "quantized": {"n_bits": 3, "lut_qspec": QuantizationSpec(), "granularity": COLUMNS},
    "all": {
        "n_bits": 2,
        "cluster_dim": 2,
        "granularity": BLOCKS,
        "enable_per_channel_scale": True,
        "lut_qspec": QuantizationSpec(dtype="float8_e4m3fn"),
    },
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_values_are_those_of_the_palettes(simulator, weight, fields, dtype):
    weight = weight.to(dtype)
    module = simulator(**fields)
    values = module(weight)
    assert (values.dtype, values.shape) == (dtype, weight.shape)
    assert module.centroids.dtype == dtype
    vectors, palettes = (
        module.blocks(values).vectors(module.scaled(values)).float(),
        module.palettes().float(),
    )
    differences = (vectors.unsqueeze(2) - palettes.unsqueeze(1)).abs().amax(-1).amin(-1)
    assert differences.max() < (1e-6 if dtype in (torch.float32, torch.float64) else 0.01)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_vectors_and_back(simulator, weight, fields):
    module = simulator(**fields)
    vectors, context = module.vectorize(weight)
    assert vectors.shape[-1] == module.cluster_dim
    assert torch.allclose(module.devectorize(vectors, context), weight)


def test_vectors_are_consecutive_output_channels(simulator):
    weight = torch.arange(48.0).reshape(8, 6)
    vectors, _ = simulator(cluster_dim=2, granularity=BLOCKS).vectorize(weight)
    assert vectors[0, :3].tolist() == [[0, 6], [12, 18], [1, 7]]
    assert vectors[1, 0].tolist() == [24, 30]


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_every_value_has_its_nearest_entry(simulator, weight, fields):
    module = simulator(**fields)
    values, blocks = module.scaled(module(weight)), module.blocks(weight)
    vectors, _ = module.vectorize(weight)
    errors = (blocks.vectors(values) - vectors).square().sum(-1)
    best = (vectors.unsqueeze(2) - module.palettes().unsqueeze(1)).square().sum(-1).amin(-1)
    # Indices are for the palettes before their quantization.
    assert torch.allclose(errors, best, atol=1e-6 if fields.get("lut_qspec") is None else 0.1)


def test_palettes_are_optimal(simulator):
    weight = torch.tensor([[0.0, 0.1, 0.2, 5.0], [5.1, 5.2, -3.0, -3.2]])
    module = simulator(n_bits=2)
    values = module(weight)
    assert torch.allclose(module.centroids.flatten(), torch.tensor([-3.2, -3.0, 0.1, 5.1]))
    assert torch.allclose(values[0], torch.tensor([0.1, 0.1, 0.1, 5.1]))


def test_fewer_values_than_entries(simulator):
    weight = torch.tensor([[3.0, 1.0], [2.0, 5.0]])
    for fast in (True, False):
        module = simulator(n_bits=3, enable_fast_kmeans_mode=fast)
        assert torch.equal(module(weight), weight)
        assert module.centroids.flatten().tolist() == [1, 2, 3, 5, 5, 5, 5, 5]

    vectors = simulator(n_bits=3, cluster_dim=2)
    assert torch.equal(vectors(weight), weight)
    assert vectors.centroids.shape == (1, 8, 2)
    assert vectors.centroids.unique(dim=1).shape == (1, 2, 2)
    assert torch.equal(vectors.centroids[:, 2:], vectors.centroids[:, 1:2].expand(-1, 6, -1))


def test_fewer_values_than_entries_in_each_group(simulator):
    rows = PerGroupedChannelGranularity(axis=0, group_size=1)
    weight = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    module = simulator(n_bits=2, granularity=rows, enable_per_channel_scale=True)
    assert torch.equal(module(weight), weight)
    third = torch.tensor(1 / 3).item()
    assert module.centroids.flatten(1).tolist() == [[third, 1, 1, 1], [1, 1, 1, 1]]


def test_fast_mode_clusters_rounded_values(simulator, weight):
    weight = torch.cat([weight, weight + 1e-3])
    module = simulator(n_bits=8, enable_fast_kmeans_mode=True, rounding_precision=2)
    rounded = torch.round(weight.half().float(), decimals=2)
    assert len(rounded.unique()) <= 256 < len(weight.unique())
    module(weight)
    assert set(module.centroids.flatten().tolist()) == set(rounded.unique().tolist())


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_fast_mode_leaves_alone_what_rounding_would_ruin(simulator, weight, scale):
    fast, exact = simulator(enable_fast_kmeans_mode=True), simulator()
    assert torch.equal(fast(weight * scale), exact(weight * scale))


def test_sensitivities_draw_the_palette(simulator):
    weight = torch.tensor([[0.0, 1.0, 10.0, 11.0]])
    module = simulator(n_bits=1, sensitivities=torch.tensor([[1.0, 3.0, 1.0, 0.0]]))
    module(weight)
    assert torch.allclose(module.centroids.flatten(), torch.tensor([0.75, 10.0]))
    assert module.indices.tolist() == [[0, 0, 1, 1]]
    module.sensitivities = None
    module(weight)
    assert torch.allclose(module.centroids.flatten(), torch.tensor([0.5, 10.5]))


def test_scale_of_a_zero_channel(simulator, weight):
    weight[3] = 0
    module = simulator(n_bits=4, enable_per_channel_scale=True)
    assert module(weight).isfinite().all()
    assert module.per_channel_scale[3] == 1


def test_look_up_tables(simulator, weight):
    module = simulator(**SPECS["quantized"])
    module(weight)
    lut, quantized = module.lut, module.quantized_lut
    assert lut.shape == quantized.shape == (1, 4, 8, 1)
    assert quantized.dtype == torch.int8
    assert module.lut_quantization_scale.shape == module.lut_quantization_zero_point.shape == (1, 4, 1, 1)
    zero_point, scale = module.lut_quantization_zero_point, module.lut_quantization_scale
    assert torch.equal((quantized - zero_point) * scale, lut)
    plain = simulator(**SPECS["groups"])
    plain(weight)
    assert plain.lut.shape == (4, 1, 4, 1)
    assert (plain.quantized_lut, plain.lut_quantization_scale, plain.lut_quantization_zero_point) == (
        None,
    ) * 3
    with pytest.raises(RuntimeError, match="lut_qspec"):
        plain.quantize_lut(plain.centroids)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_state_goes_into_a_fresh_simulator(simulator, weight, fields):
    module, other = simulator(**fields), simulator(**fields)
    values = module(weight)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.eval()(weight), values)
    assert torch.equal(other.lut, module.lut)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(weight), values)


def test_state_before_the_first_forward(simulator):
    module = simulator()
    assert list(module.state_dict()) == ["fake_palett_enabled"]
    simulator().load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="no palettes yet"):
        module.lut  # noqa: B018 - the property raises


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("centroids", torch.zeros(1, 8, 1), r"centroids has shape \(1, 8, 1\); n_bits=2"),
        ("indices", torch.zeros(16, 12), "indices has dtype torch.float32"),
        ("per_channel_scale", torch.ones(16, 1), "enable_per_channel_scale is off"),
    ],
)
def test_state_of_another_specification(simulator, weight, key, value, message):
    module = simulator(n_bits=2)
    values = module(weight)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(before | {key: value})
    assert torch.equal(module(weight), values)


def test_state_for_another_weight(simulator, weight):
    module = simulator(n_bits=2)
    module(weight)
    with pytest.raises(RuntimeError, match="palettes are for another"):
        module(weight[:8])
    module.enable_fake_palett(reinitialize=True)
    assert module(weight[:8]).shape == (8, 12)


def test_switches(simulator, weight):
    module = simulator(n_bits=1)
    values = module(weight)
    module.disable_fake_palett()
    assert module(weight) is weight
    assert module.fake_palett_enabled.item() == 0
    module.fake_palett_enabled.fill_(1)
    assert torch.equal(module(weight), values)
    module.load_state_dict(module.state_dict() | {"fake_palett_enabled": torch.zeros(1, dtype=torch.uint8)})
    assert module(weight) is weight
    assert not module.is_disabled()


def test_palettes_stay_until_reinitialized(simulator, weight):
    module = simulator(n_bits=1)
    values = module(weight)
    assert torch.equal(module(weight * 2), values)
    module.enable_fake_palett(reinitialize=True)
    assert torch.equal(module(weight * 2), values * 2)


@pytest.mark.parametrize(
    "fields", [{"cluster_dim": 3}, {"granularity": PerGroupedChannelGranularity(axis=0, group_size=5)}]
)
def test_weights_that_do_not_fit_pass_unchanged(simulator, weight, fields, caplog):
    module = simulator(**fields)
    module.tensor_fqn = "layer.weight"
    with caplog.at_level(logging.WARNING):
        assert module(weight) is weight
        assert module(weight) is weight
    assert module.is_disabled()
    (record,) = caplog.records
    assert "'layer.weight' (shape: (16, 12))" in record.getMessage()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("cluster_dim", [1, 2])
def test_values_that_are_not_finite(simulator, weight, bad, fast, cluster_dim):
    module = simulator(cluster_dim=cluster_dim, enable_fast_kmeans_mode=fast and cluster_dim == 1)
    module.tensor_fqn = "layer.weight"
    weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"'layer\.weight' cannot be clustered"):
        module(weight)
    assert module.centroids is None
    assert list(module.state_dict()) == ["fake_palett_enabled"]


def test_bad_arguments(simulator, weight):
    with pytest.raises(ValueError, match=r"must have values to be palettized; got shape \(0, 3\)"):
        simulator()(torch.empty(0, 3))
    with pytest.raises(TypeError, match="floating point"):
        simulator()(torch.arange(16).reshape(4, 4))
    with pytest.raises(ValueError, match="negative"):
        simulator(sensitivities=-torch.ones(16, 12))
    with pytest.raises(ValueError, match="finite"):
        simulator(sensitivities=torch.full((16, 12), torch.nan))
    with pytest.raises(TypeError, match="list"):
        simulator(sensitivities=[1.0])
    with pytest.raises(ValueError, match=r"\(16, 12\), but its sensitivities have \(12, 16\)"):
        simulator(sensitivities=torch.ones(12, 16))(weight)
    arguments = {"lut_qspec": None, "granularity": PerTensorGranularity(), "enable_per_channel_scale": False}
    for bad in (
        {"n_bits": 9, "cluster_dim": 1},
        {"n_bits": 0, "cluster_dim": 1},
        {"n_bits": 2, "cluster_dim": 0},
    ):
        with pytest.raises(ValueError, match=r"n_bits|cluster_dim"):
            _KMeansFakePalettize(**arguments, **bad)


def test_other_memory_layouts(simulator):
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    for fields in SPECS.values():
        if fields.get("granularity") is COLUMNS:
            continue
        values = simulator(**fields)(weight)
        last = simulator(**fields)(weight.contiguous(memory_format=torch.channels_last))
        assert torch.equal(values, last)
        assert torch.equal(values, simulator(**fields)(weight.repeat(1, 2, 1, 1)[:, :4]))


def test_zero_size_and_rank(simulator):
    assert simulator(n_bits=1)(torch.tensor([1.0, 2.0, 3.0])).shape == (3,)
    scalar = torch.tensor(1.0)
    assert simulator(n_bits=1)(scalar) is scalar


def test_conversion_keeps_the_palettes(simulator, weight):
    module = simulator(n_bits=2)
    values = module(weight)
    half = copy.deepcopy(module).half()
    assert torch.equal(half(weight.half()), values.half())
    assert half.indices.dtype == torch.uint8


@pytest.mark.parametrize("name", ["groups", "vectors", "all"])
def test_evaluation_compiles(simulator, weight, name):
    torch._dynamo.reset()
    module = simulator(**SPECS[name]).eval()
    values = module(weight)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), values)
    assert torch.equal(compiled(weight), values)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_forward_reads_nothing_on_the_host(simulator, weight, fields, host_reads):
    for training in (True, False):
        module = simulator(**fields).train(training)
        module(weight)
        with host_reads:
            module(weight)
    assert not host_reads.seen
