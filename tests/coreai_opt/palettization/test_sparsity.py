"""Joint sparsity: pruned weights keep their zeros, and palettes are for the other values."""

import copy

import pytest
import torch

from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.quantization.spec import QuantizationSpec

KEPT = torch.tensor([[0.0, 1, 2, 3], [0, 4, 5, 6], [0, 0, 0, 7], [0, 0, 0, 0]])
# 9 of 16 are zero.
WEIGHT = KEPT * 0.1 + (KEPT != 0) * torch.linspace(0, 0.05, 16).reshape(4, 4)
STRATEGIES = {
    "default": {"type": "default"},
    "straight_through": {"type": "straight_through"},
    "dkm": {"type": "dkm"},
    "dkm, iterated": {"type": "dkm", "iterations": 2},
}
SPECS = {
    "scalars": {"n_bits": 2},
    "groups": {"n_bits": 2, "granularity": PerGroupedChannelGranularity(axis=0, group_size=4)},
    "columns": {"n_bits": 1, "granularity": PerGroupedChannelGranularity(axis=1, group_size=3)},
    "scaled": {"n_bits": 2, "enable_per_channel_scale": True},
    "quantized": {"n_bits": 2, "lut_qspec": QuantizationSpec()},
    "vectors": {"n_bits": 2, "cluster_dim": 2},
    "scaled vectors in groups": {
        "n_bits": 2,
        "cluster_dim": 3,
        "enable_per_channel_scale": True,
        "granularity": PerGroupedChannelGranularity(axis=0, group_size=4),
    },
}


def groups(size, axis=0):
    return PerGroupedChannelGranularity(axis=axis, group_size=size)


@pytest.fixture
def sparse(simulator):
    """Builds a simulator in evaluation, with fast mode for scalars, as Apple's default is."""

    def build(threshold=0.0, **fields):
        fast = fields.get("cluster_dim", 1) == 1
        module = simulator(
            sparsity_detection_threshold=threshold, enable_fast_kmeans_mode=fast, **({"n_bits": 2} | fields)
        )
        return module.eval()

    return build


@pytest.fixture
def pruned(weight):
    return weight.masked_fill(weight.abs() < 0.5, 0)


def palettes(module):
    return [[round(value, 4) for value in palette] for palette in module.centroids.flatten(1).tolist()]


@pytest.mark.parametrize(("threshold", "found"), [(None, False), (0.5, True), (0.5625, True), (0.6, False)])
def test_the_share_of_zeros_decides(sparse, threshold, found):
    module = sparse(threshold)
    values = module(WEIGHT)
    assert torch.equal(values == 0, WEIGHT == 0) == found
    expected = [0.155, 0.3634, 0.5717, 0.7368] if found else [0.0103, 0.2584, 0.4683, 0.6802]
    assert palettes(module) == [expected]


def test_a_threshold_of_zero_asks_for_a_zero(sparse):
    module = sparse(n_bits=1)
    assert module(torch.tensor([[0.0, 1, 2, 5]])).tolist() == [[0, 1.5, 1.5, 5]]
    assert palettes(module) == [[1.5, 5.0]]
    assert module.indices.tolist() == [[0, 0, 0, 1]]
    without = sparse()
    without(WEIGHT + 1)
    assert without.sparsity.mask is None


def test_negative_zeros_are_zeros(sparse):
    assert sparse(n_bits=1)(torch.tensor([[-0.0, 1, 2, 5]])).tolist() == [[0, 1.5, 1.5, 5]]


def test_a_weight_of_zeros(sparse):
    module = sparse()
    assert torch.equal(module(0 * WEIGHT), 0 * WEIGHT)
    assert palettes(module) == [[0, 0, 0, 0]]
    assert not module.sparsity.mask.any()


def test_groups_that_keep_less_reserve_an_entry_for_zero(sparse):
    module = sparse(n_bits=1, granularity=groups(2))
    values = module(WEIGHT)
    assert palettes(module) == [[0.2067, 0.5201], [0, 0.7368]]
    assert module.indices.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert torch.equal(values == 0, WEIGHT == 0)


def test_a_group_of_zeros_has_a_palette_of_zeros(sparse):
    weight = torch.tensor(
        [
            [0.1, 0.2, 0.3, 0.4, 0.5],
            [0.11, 0.21, 0.31, 0.41, 0.55],
            [0, 0, 0, 0, 0],
            [0.7, 0.6, 0, 0, 0],
            [0.7, 0.6, 0.5, 0.4, 0],
        ]
    )
    module = sparse(granularity=groups(1))
    module(weight)
    # What is reserved is not padded with: the two values of the fourth group repeat the last of them.
    assert palettes(module)[2:] == [[0, 0, 0, 0], [0, 0.6001, 0.7002, 0.7002], [0, 0.3999, 0.5501, 0.7002]]
    assert module.indices[2:].tolist() == [[0, 0, 0, 0, 0], [2, 1, 0, 0, 0], [3, 2, 2, 1, 0]]


def test_groups_of_columns_reserve_nothing(sparse):
    module = sparse(n_bits=1, granularity=groups(1, axis=1))
    module(WEIGHT)
    assert palettes(module) == [[0, 0], [0.1033, 0.4167], [0.2067, 0.52], [0.3101, 0.6802]]


def test_scale_is_that_of_the_kept_values(sparse):
    module = sparse(n_bits=1, enable_per_channel_scale=True)
    module(WEIGHT)
    assert palettes(module) == [[0.5561, 0.9585]]
    assert module.per_channel_scale.flatten().tolist() == [*WEIGHT.amax(1)[:3].tolist(), 1]


def test_sensitivities_of_the_kept_values_count(sparse, simulator):
    weight, weights = torch.tensor([[0.0, 1, 2, 9]]), torch.tensor([[50.0, 3, 1, 1]])
    module = simulator(n_bits=1, sparsity_detection_threshold=0.0, sensitivities=weights)
    assert module(weight).tolist() == [[0, 1.25, 1.25, 9]]


def test_vectors_are_stored_values(sparse):
    module = sparse(n_bits=1, cluster_dim=2)
    values = module(WEIGHT)
    # 7 values are kept: the smallest is left out, and the other six make three vectors.
    assert module.sparsity.mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert module.indices.shape == (3,)
    assert module.centroids.shape == (1, 2, 2)
    expected = torch.tensor(
        [[0, 0, 0.31167, 0.415], [0, 0.31167, 0.415, 0.62333], [0, 0, 0, 0.73667], [0] * 4]
    )
    assert torch.allclose(values, expected, atol=1e-5)


def test_groups_of_vectors_store_equally_many(sparse):
    module = sparse(n_bits=1, cluster_dim=2, granularity=groups(2))
    values = module(WEIGHT)
    # The second group leaves out its one value, and stores its first six zeros.
    assert module.sparsity.mask.int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert module.indices.shape == (6,)
    assert not values[2:].any()
    assert not module.centroids[1].any()


def test_stored_vectors_need_not_divide_the_channels(sparse):
    weight = torch.tensor([[0, 0.1, 0.2, 0.4], [0, 0.8, -1.6, 0.6], [0, 0, 0, 0]])
    module = sparse(n_bits=1, cluster_dim=2)
    module(weight)
    assert sorted(palettes(module)[0]) == [-1.6, 0.25, 0.5, 0.6]
    assert module.check_compatible(weight)
    assert not sparse(cluster_dim=2).check_compatible(weight)


def test_of_equal_magnitudes_the_first_is_left_out(sparse):
    for row, mask in (
        ([1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]),
        ([5, 1, 1, 1, 1, 4, 0, 0], [1, 0, 0, 1, 1, 1, 0, 0]),
        ([-1, 5, 1, -1, 6, 1, 2, 0], [0, 1, 0, 0, 1, 1, 1, 0]),
    ):
        module = sparse(n_bits=1, cluster_dim=4)
        module(torch.tensor([row], dtype=torch.float32))
        assert module.sparsity.mask.int().tolist() == [mask]


def test_a_weight_without_a_stored_vector_is_dense(sparse):
    module = sparse(n_bits=1, cluster_dim=2)
    weight = torch.tensor([[0.0, 0], [0, 5]])
    assert torch.equal(module(weight), weight)
    assert module.sparsity.mask is None
    assert module.indices.shape == (1, 2)


def test_vectors_that_cannot_be_stored(sparse):
    columns = sparse(n_bits=1, cluster_dim=2, granularity=groups(2, axis=1))
    with pytest.raises(
        ValueError, match=r"lie in the whole weight or in groups along axis 0; got blocks \(4, 2\)"
    ):
        columns(WEIGHT)
    # Without zeros it is dense.
    assert sparse(n_bits=1, cluster_dim=2, granularity=groups(2, axis=1))(WEIGHT + 1).shape == (4, 4)
    short = sparse(n_bits=1, cluster_dim=2, granularity=groups(2))
    with pytest.raises(ValueError, match=r"group 1 must store 4 values, .* keeps 0 and has 3 zeros"):
        short(torch.tensor([[1.0, 2], [3, 4], [0, 0], [5, 0]]))
    assert short.centroids is None
    assert list(short.state_dict()) == ["fake_palett_enabled"]


@pytest.mark.parametrize("dim", [1, 2])
def test_values_that_are_not_finite(sparse, dim):
    with pytest.raises(ValueError, match="finite"):
        sparse(cluster_dim=dim)(torch.tensor([[0, torch.nan, 1, 2]]))


def test_the_threshold_is_a_share(sparse):
    for threshold in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"sparsity_detection_threshold"):
            sparse(threshold)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_zeros_stay_zero_and_get_no_gradient(simulator, pruned, fields, strategy):
    module = simulator(**fields, sparsity_detection_threshold=0.1, training_strategy_spec=strategy)
    module(pruned)
    mask = module.sparsity.mask
    moved = (pruned + 0.01).requires_grad_()
    values = module.train()(moved)
    assert not values[~mask].any()
    assert values[mask].any()
    if values.requires_grad:
        values.square().sum().backward()
        assert not moved.grad[~mask].any()
        assert moved.grad[mask].any()
    module.step(moved.detach(), 1)
    assert not module.eval()(moved.detach())[~mask].any()


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_reserved_entries_stay_zero_in_training(simulator, pruned, strategy):
    pruned[:4] = 0
    pruned[0, 0] = 1
    module = simulator(
        n_bits=2, granularity=groups(4), sparsity_detection_threshold=0.1, training_strategy_spec=strategy
    )
    module(pruned)
    reserving = module.sparsity.reserving
    assert reserving[0]
    parameters = [*module.parameters()]
    trained = pruned.clone().requires_grad_()
    optimizer = torch.optim.Adam([trained, *parameters], lr=0.1)
    for step in range(3):
        values = module.train()(trained)
        if values.requires_grad:
            optimizer.zero_grad()
            (values - 1).square().sum().backward()
            optimizer.step()
        module.step(trained.detach(), step)
    assert not module.centroids[reserving, 0].any()


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_state_goes_into_a_fresh_simulator(simulator, pruned, fields):
    """The mask is not among it, but found again."""
    module, other = (simulator(**fields, sparsity_detection_threshold=0.1).eval() for _ in range(2))
    values = module(pruned)
    assert not any("mask" in name or "positions" in name for name in module.state_dict())
    other.load_state_dict(module.state_dict())
    assert other.sparsity.mask is None
    assert torch.equal(other(pruned), values)
    without = {name: value for name, value in module.state_dict().items() if name != "indices"}
    again = simulator(**fields, sparsity_detection_threshold=0.1).eval()
    again.load_state_dict(without)
    # Values near zero may have the entry that a group reserves for it.
    same = again(pruned) == values
    assert torch.equal(again(pruned)[~same], torch.zeros_like(values[~same]))
    assert same.all() or module.sparsity.reserving is not None
    assert torch.equal(copy.deepcopy(module)(pruned), values)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_vectors_and_back(simulator, pruned, fields):
    module = simulator(**fields, sparsity_detection_threshold=0.1)
    vectors, context = module.vectorize(pruned)
    assert vectors.shape[-1] == module.cluster_dim
    kept = pruned * module.sparsity.mask
    assert torch.allclose(module.devectorize(vectors, context), kept)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_training_compiles(simulator, pruned, fields, strategy):
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        module = simulator(**fields, sparsity_detection_threshold=0.1, training_strategy_spec=strategy)
        module(pruned)
        forward = torch.compile(module, fullgraph=True, backend="aot_eager") if compiles else module
        trained = pruned.clone().requires_grad_()
        values = forward(trained)
        if values.requires_grad:
            values.square().sum().backward()
        results.append((values, trained.grad))
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None) == (compiled is None)
        assert eager is None or torch.allclose(eager, compiled, atol=1e-6)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_nothing_is_read_on_the_host(simulator, pruned, fields, strategy, host_reads):
    module = simulator(**fields, sparsity_detection_threshold=0.1, training_strategy_spec=strategy)
    module(pruned)
    pruned.requires_grad_()
    with host_reads:
        values = module(pruned)
        if values.requires_grad:
            values.sum().backward()
        module.step(pruned, 1)
    assert not host_reads.seen


def test_masks_stay_when_palettes_are_computed_anew(sparse):
    module = sparse(n_bits=1)
    module(torch.tensor([[0.0, 1, 2, 5]]))
    module.enable_fake_palett(reinitialize=True)
    assert module(torch.tensor([[3.0, 0, 2, 5]])).tolist()[0][0] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [1, 2])
def test_other_dtypes(simulator, pruned, dtype, dim):
    module = simulator(n_bits=2, cluster_dim=dim, sparsity_detection_threshold=0.1)
    pruned = pruned.to(dtype)
    values = module(pruned)
    assert values.dtype == dtype
    assert torch.equal(values == 0, pruned == 0) or dim == 2
    assert len(values.unique()) <= 4 * dim + 1
