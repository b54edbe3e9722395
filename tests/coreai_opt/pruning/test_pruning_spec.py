"""Specifications and schemes: their masks, what they refuse, and how they are written down."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from coreai_opt.common import CompressionType
from coreai_opt.pruning import PruningSpec
from coreai_opt.pruning.spec import (
    BlockStructured,
    ChannelStructured,
    NMStructured,
    PruneImplBase,
    PruningScheme,
    Unstructured,
    default_weight_pruning_spec,
)

compute_mask = PruneImplBase.get_class("default").compute_mask
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_default():
    spec = PruningSpec()
    assert spec == default_weight_pruning_spec()
    assert spec.target_sparsity == 0.5
    assert spec.pruning_scheme == Unstructured()
    assert spec.pruning_algo is PruneImplBase.get_class("default")
    assert spec.get_compression_type() is CompressionType.PRUNING


def test_registries():
    assert PruningScheme.list_registry_keys() == {
        "block_structured",
        "channel_structured",
        "n_m_structured",
        "unstructured",
    }
    assert PruneImplBase.list_registry_keys() == {"default"}


@pytest.mark.parametrize(
    "scheme",
    [Unstructured(), ChannelStructured(axis=-1), NMStructured(n=1, m=2), BlockStructured(block_size=(2, -1))],
)
def test_a_dump_gives_the_same_specification(scheme):
    spec = PruningSpec(target_sparsity=0.5, pruning_scheme=scheme)
    assert PruningSpec(**spec.model_dump()) == spec


def test_a_user_class_by_its_key(registration):
    @registration(PruneImplBase, "everything")
    class Everything(PruneImplBase):
        @staticmethod
        def compute_mask(weight, sparsity, pruning_scheme):
            return torch.zeros_like(weight, dtype=torch.bool)

    simulator = PruningSpec(pruning_algo="everything").pruning_algo(0.5, Unstructured())
    assert simulator(randn(3, 3)).eq(0).all()
    assert simulator.mask.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_sparsity": 1.5}, "less than or equal to 1"),
        ({"target_sparsity": -0.1}, "greater than or equal to 0"),
        ({"target_sparsity": math.nan}, "less than or equal to 1"),
        ({"target_sparsity": None}, "valid number"),
        ({"pruning_algo": "defualt"}, "Did you mean 'default'"),
        ({"pruning_algo": torch.nn.Linear}, "Linear is not among the classes"),
        ({"pruning_scheme": "unstructured"}, r"such as Unstructured\(\)"),
        ({"pruning_scheme": {"axis": 1}}, "Missing type key"),
        ({"pruning_scheme": {"type": "unstructured", "axis": 1}}, "should be None"),
        ({"pruning_scheme": {"type": "channel_structured", "axis": None}}, "valid integer"),
        ({"pruning_scheme": {"type": "n_m_structured", "n": 4, "m": 4}}, "n must be less than m"),
        ({"pruning_scheme": {"type": "n_m_structured", "n": 0, "m": 4}}, "greater than or equal to 1"),
        ({"pruning_scheme": {"type": "n_m_structured", "n": 2, "m": 33}}, "less than or equal to 32"),
        ({"pruning_scheme": {"type": "block_structured", "block_size": []}}, "must hold positive sizes"),
        ({"pruning_scheme": {"type": "block_structured", "block_size": [0, 4]}}, "must hold positive sizes"),
        (
            {"pruning_scheme": NMStructured(n=1, m=4), "target_sparsity": 0.5},
            "must be 0.75 where 1 of",
        ),
        ({"sparsity": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_invalid_specifications(fields, message):
    with pytest.raises(ValidationError, match=message):
        PruningSpec(**fields)


def test_an_unknown_scheme():
    with pytest.raises(KeyError, match="Did you mean 'unstructured'"):
        PruningSpec(pruning_scheme={"type": "unstructurd"})


def test_a_specification_is_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        PruningSpec().target_sparsity = 0.1


def test_a_pattern_has_a_sparsity_of_its_own():
    assert PruningSpec(pruning_scheme=NMStructured(n=1, m=4)).target_sparsity == 0.75
    assert PruningSpec(pruning_scheme={"type": "n_m_structured", "n": 1, "m": 3}).target_sparsity == 2 / 3
    assert PruningSpec(pruning_scheme=NMStructured(n=1, m=3), target_sparsity=0.67).target_sparsity == 0.67


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sparsity", [0, 0.01, 0.25, 0.5, 0.77, 0.99, 1])
@pytest.mark.parametrize("shape", [(10,), (7, 9), (2, 3, 4, 5), (1,), ()])
def test_unstructured(dtype, sparsity, shape):
    weight = randn(*shape, dtype=dtype)
    mask = compute_mask(weight, sparsity, Unstructured())
    pruned = int(weight.numel() * sparsity)
    expected = torch.ones(weight.numel(), dtype=dtype)
    order = weight.reshape(-1).abs().sort(descending=True, stable=True).indices
    expected[order[weight.numel() - pruned :]] = 0
    assert torch.equal(mask, expected.reshape(shape))
    assert mask.dtype == dtype


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9, 1])
def test_channels(axis, sparsity):
    weight = randn(5, 4, 3)
    mask = compute_mask(weight, sparsity, ChannelStructured(axis=axis))
    norms = weight.double().abs().sum([each for each in range(3) if each != axis % 3])
    kept = norms.argsort(descending=True)[: len(norms) - int(len(norms) * sparsity)]
    expected = torch.zeros(5, 4, 3).index_fill_(axis, kept, 1)
    assert torch.equal(mask, expected)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(n + 1, 12))),
    st.sampled_from([0, 1, -1]),
    st.floats(0, 1),
    st.integers(0, 100),
)
def test_patterns(pattern, axis, sparsity, seed):
    n, m = pattern
    weight = randn(3 * m, 2 * m, seed=seed)
    mask = compute_mask(weight, sparsity, NMStructured(n=n, m=m, axis=axis))
    kept = max(n, m - round(m * sparsity))
    groups = mask.movedim(axis, -1).unflatten(-1, (-1, m))
    assert (groups.sum(-1) == kept).all()
    values = weight.abs().movedim(axis, -1).unflatten(-1, (-1, m))
    smallest_kept = values.masked_fill(groups == 0, math.inf).amin(-1)
    assert (values.masked_fill(groups == 1, 0).amax(-1) <= smallest_kept).all()


def test_blocks():
    weight = torch.tensor([[1.0, -1, 3, 0], [1, 1, 0, 0], [0, 0, 9, -9], [5, 0, 0, 0]])
    mask = compute_mask(weight, 0.5, BlockStructured(block_size=(2, 2)))
    assert mask.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    rows = compute_mask(weight, 0.5, BlockStructured(block_size=(1, -1)))
    assert rows[:, 0].tolist() == [1, 0, 1, 0] or rows[:, 0].tolist() == [0, 0, 1, 1]
    assert torch.equal(rows, rows[:, :1].expand(4, 4))


SCHEMES = [
    Unstructured(),
    ChannelStructured(axis=1),
    NMStructured(axis=1),
    BlockStructured(block_size=(1, 2, -1, -1)),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_memory_format_is_kept(scheme):
    weight = randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
    simulator = PruneImplBase.get_class("default")(0.5, scheme)
    simulator(weight)
    assert simulator.mask.stride() == weight.stride()
    assert torch.equal(simulator.mask, compute_mask(weight.contiguous(), 0.5, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_no_gradient_flows_into_a_mask(scheme):
    weight = randn(4, 8, 3, 3).requires_grad_()
    assert not compute_mask(weight, 0.5, scheme).requires_grad


@pytest.mark.parametrize("scheme", [*SCHEMES[:3], BlockStructured(block_size=(1, 1))], ids=repr)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_must_be_floating_point(scheme, dtype):
    with pytest.raises(TypeError):
        compute_mask(torch.ones(4, 4, dtype=dtype), 0.5, scheme)


@pytest.mark.parametrize(
    ("shape", "scheme", "message"),
    [
        ((4, 4), ChannelStructured(axis=2), r"axis must be in \[-2, 2\) for a tensor of 2 dimensions; got 2"),
        ((), ChannelStructured(), r"axis must be in \[0, 0\)"),
        ((4, 4), NMStructured(axis=-3), r"axis must be in \[-2, 2\)"),
        ((4, 6), NMStructured(), "6"),
        ((4, 6), BlockStructured(block_size=(2, 4)), "4"),
        ((4, 6), BlockStructured(block_size=(2,)), "one entry per axis, 2 for shape"),
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_schemes_that_do_not_fit(shape, scheme, message, sparsity):
    with pytest.raises(ValueError, match=message):
        compute_mask(torch.ones(shape), sparsity, scheme)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan, math.inf])
def test_sparsities_that_are_none(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got"):
        compute_mask(torch.ones(4), sparsity, Unstructured())


def test_a_scheme_is_needed():
    with pytest.raises(TypeError, match="pruning_scheme must be a PruningScheme, got 3"):
        compute_mask(torch.ones(4), 0.5, 3)


@pytest.mark.parametrize("scheme", [Unstructured(), ChannelStructured(), NMStructured()], ids=repr)
def test_empty_weights(scheme):
    assert compute_mask(torch.ones(0, 4), 0.5, scheme).shape == (0, 4)


def test_special_values():
    weight = torch.tensor([1.0, math.nan, 3, math.inf, -5, -math.inf, 0.0, -0.0])
    assert compute_mask(weight, 0.5, Unstructured()).tolist() == [0, 1, 0, 1, 1, 1, 0, 0]
    assert compute_mask(weight, 0.125, Unstructured()).tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
