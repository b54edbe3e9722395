"""k-means as the configuration asks for it."""

import pytest
import torch
from pydantic import ValidationError

from coreai_opt.palettization.config import VectorKMeansConfig
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize
from coreai_opt.palettization.spec import PerGroupedChannelGranularity, PerTensorGranularity

WEIGHT = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))


def clustered(config, n_bits=4):
    module = _KMeansFakePalettize(
        n_bits=n_bits,
        lut_qspec=None,
        granularity=PerTensorGranularity(),
        cluster_dim=2,
        enable_per_channel_scale=False,
        enable_fast_kmeans_mode=False,
        vector_kmeans_config=config,
    )
    return (module(WEIGHT) - WEIGHT).square().sum().item(), module


def test_settings_count():
    least, _ = clustered({"n_init": 1, "n_local_trials": 1, "max_iter": 1})
    some, module = clustered(VectorKMeansConfig())
    most, _ = clustered({"n_init": 20, "tol": 0})
    default, without = clustered(None)
    assert least > 1.05 * some
    assert some >= most > default
    assert module.vector_kmeans_config == VectorKMeansConfig()
    assert without.vector_kmeans_config is None


def test_the_default_search_leaves_less_than_apples(simulator):
    """The squared errors that Apple's 0.4.0 leaves on the same weights."""
    torch.manual_seed(0)
    weight = torch.randn(16, 16)
    module = simulator(n_bits=2, cluster_dim=2)
    assert (module(weight) - weight).square().sum() <= 79.7715
    torch.manual_seed(0)
    blocks = [torch.randn(256, 2) for _ in range(2)]
    masses = [torch.rand(256) + 0.01 for _ in range(2)]
    weight = torch.cat([block.T for block in blocks])
    each_row = PerGroupedChannelGranularity(axis=0, group_size=2)
    module = simulator(n_bits=4, cluster_dim=2, granularity=each_row)
    errors = (module(weight) - weight).square().reshape(2, 2, 256).sum((1, 2))
    assert (errors <= torch.tensor([47.3945, 47.2117])).all()
    weights = torch.cat([mass.expand(2, -1) / 2 for mass in masses])
    module = simulator(n_bits=4, cluster_dim=2, granularity=each_row, sensitivities=weights)
    errors = ((module(weight) - weight).square() * 2 * weights).reshape(2, 2, 256).sum((1, 2))
    assert (errors <= torch.tensor([22.3637, 24.0481])).all()


def test_results_repeat():
    torch.manual_seed(1)
    one, first = clustered({"n_init": 2})
    torch.manual_seed(2)
    two, second = clustered({"n_init": 2})
    assert one == two
    assert torch.equal(first.centroids, second.centroids)


@pytest.mark.parametrize(("n_bits", "trials"), [(4, 4), (8, 7)])
def test_local_trials_follow_the_number_of_clusters(n_bits, trials):
    by_default, _ = clustered({"n_init": 1}, n_bits)
    asked, _ = clustered({"n_init": 1, "n_local_trials": trials}, n_bits)
    other, _ = clustered({"n_init": 1, "n_local_trials": 1}, n_bits)
    assert by_default == asked != other


@pytest.mark.parametrize("config", [{"n_init": 0}, {"foo": 1}, 3])
def test_bad_settings(config):
    with pytest.raises(ValidationError):
        clustered(config)
