"""Weights that have few values already keep them."""

import logging

import pytest
import torch

from coreai_opt.palettization.kmeans._existing import existing_palettes
from coreai_opt.palettization.spec import PerGroupedChannelGranularity

ROWS = PerGroupedChannelGranularity(axis=0, group_size=1)
FEW = torch.tensor([[0.11111111, 0.22222222] * 8])
MANY = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fast(simulator):
    def build(**fields):
        return simulator(enable_fast_kmeans_mode=fields.get("cluster_dim", 1) == 1, **fields)

    return build


@pytest.mark.parametrize(
    ("row", "palette"),
    [
        ([1e-5, 2e-5, 3e-5, -1e-5], [-1e-5, 1e-5, 2e-5, 3e-5]),
        ([0.123456, 0.654321] * 2, [0.123456, 0.654321, 0.654321, 0.654321]),
    ],
)
def test_fast_mode_does_not_round_them(fast, row, palette):
    weight = torch.tensor([row] * 4)
    module = fast(n_bits=2)
    assert torch.equal(module(weight), weight)
    assert torch.equal(module.centroids.flatten(), torch.tensor(palette))


def test_more_values_than_entries_are_clustered(fast):
    module = fast(n_bits=2)
    module(torch.tensor([[0.123456, 0.654321, -1.0, 2.0, 5.0] * 4] * 4))
    assert torch.allclose(module.centroids.flatten(), torch.tensor([-1, 0.3889, 2, 5]), atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "exact"), [([FEW, MANY, FEW], [True, False, False]), ([MANY, FEW], [False, False])]
)
def test_leading_blocks_keep_them(fast, rows, exact):
    weight = torch.cat(rows)
    values = fast(n_bits=1, granularity=ROWS)(weight)
    assert [torch.equal(*pair) for pair in zip(values, weight, strict=True)] == exact


def test_a_value_that_comes_late_counts(fast):
    """The first values of a block, at which the search looks first, are two; the others are 64."""
    weight = torch.cat([torch.arange(2.0).repeat(32), torch.arange(64.0)]).reshape(8, 16)
    module = fast(n_bits=1)
    module(weight)
    assert module.centroids.flatten().tolist() == [3.5, 43.5]


def test_sensitivities_do_not_matter(fast):
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    module = fast(n_bits=2, sensitivities=torch.tensor([[0.0, 0, 0, 1]]))
    assert torch.equal(module(weight), weight)


def test_vectors(simulator):
    weight = torch.tensor([[1.0, 2, 1, 2], [3, 4, 3, 4]])
    module = simulator(n_bits=1, cluster_dim=2)
    assert torch.equal(module(weight), weight)
    assert module.centroids.tolist() == [[[1, 3], [2, 4]]]
    assert module.indices.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("weight", "dtype", "palette"),
    [
        # 8 bytes, then 4, then 8: as integers, the last entry counts most.
        ([[-1, 2], [3, -4]], torch.float32, [[2, -4], [-1, 3]]),
        ([[-1, 2], [3, -4]], torch.float16, [[2, -4], [-1, 3]]),
        ([[2, 1]] * 3 + [[1, 2]], torch.float16, [[2, 2, 2, 1], [1, 1, 1, 2]]),
        # 16 bytes: entry by entry.
        ([[2, 1]] * 3 + [[1, 2]], torch.float32, [[1, 1, 1, 2], [2, 2, 2, 1]]),
        ([[-1, 2], [3, -4]], torch.float64, [[-1, 3], [2, -4]]),
    ],
)
def test_order_of_vectors(simulator, weight, dtype, palette):
    weight = torch.tensor(weight, dtype=dtype)
    module = simulator(n_bits=1, cluster_dim=len(weight))
    assert torch.equal(module(weight), weight)
    assert module.centroids.tolist() == [palette]


def test_signs_of_zeros_in_vectors(simulator):
    weight = torch.tensor([[-0.0, 0.0]] * 4)
    module = simulator(n_bits=1, cluster_dim=2)
    module(weight)
    assert torch.signbit(module.centroids[0]).tolist() == [[True, True], [False, False]]
    assert module.indices.tolist() == [[0, 1], [0, 1]]


def test_tiny_vectors_keep_their_own(simulator):
    """Squared distances between them are zero in float32."""
    weight = torch.tensor([[1e-25, 2e-25, 3e-25]] * 2)
    assert torch.equal(simulator(n_bits=2, cluster_dim=2)(weight), weight)


def test_values_that_only_float64_tells_apart(simulator):
    weight = torch.tensor([[1, 1 + 1e-12, 1 + 2e-12, 1]], dtype=torch.float64)
    assert torch.equal(simulator(n_bits=2)(weight), weight)


def test_scaled_values_count(fast):
    weight = torch.tensor([[1.0, -1], [2, -2]])
    module = fast(n_bits=1, enable_per_channel_scale=True)
    assert torch.equal(module(weight), weight)
    assert module.centroids.flatten().tolist() == [-1, 1]


def test_zeros_of_pruned_blocks_count(fast):
    weight = torch.tensor([[-0.5, 0, 0.3, -0.5], [0, 0, 0.3, 0], [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    pairs = PerGroupedChannelGranularity(axis=0, group_size=2)
    module = fast(n_bits=2, granularity=pairs, sparsity_detection_threshold=0.0)
    assert torch.equal(module(weight)[:2], weight[:2])
    assert torch.equal(module.centroids[0, :, 0], torch.tensor([-0.5, 0, 0.3, 0.3]))
    assert module.indices[:2].tolist() == [[0, 1, 2, 0], [1, 1, 2, 1]]
    behind = fast(n_bits=2, granularity=pairs, sparsity_detection_threshold=0.0)
    behind(weight.flip(0))
    assert torch.allclose(behind.centroids[1, :, 0], torch.tensor([0, -0.5, 0.3, 0.3]), atol=1e-4)
    assert behind.indices[2:].tolist() == [[0, 0, 2, 0], [1, 0, 2, 1]]


def test_the_log_counts_them(fast, caplog):
    with caplog.at_level(logging.INFO, "coreai_opt"):
        fast(n_bits=1, granularity=ROWS)(torch.cat([FEW, FEW, MANY]))
    assert "2 of 3 blocks have no more values than their palette has entries" in caplog.text


def test_a_palette_that_is_not_finite_is_not_kept():
    assert existing_palettes(torch.tensor([[[1.0], [torch.inf]]]), 2) == []
    assert existing_palettes(torch.tensor([[[torch.nan], [torch.nan]]]), 4) == []
