"""The state of palettes: what a checkpoint may lack, and what it may be in old ones."""

import pytest
import torch

from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.quantization.spec import QuantizationSpec

GROUPS = PerGroupedChannelGranularity(axis=0, group_size=4)
SPECS = {
    "scalars": {"n_bits": 2},
    "scaled": {"n_bits": 2, "enable_per_channel_scale": True},
    "vectors": {"n_bits": 2, "cluster_dim": 2, "granularity": GROUPS},
    "quantized": {"n_bits": 3, "lut_qspec": QuantizationSpec(), "granularity": GROUPS},
}


def without(module, *names):
    return {name: value for name, value in module.state_dict().items() if name not in names}


def test_loaded_indices_are_taken_as_they_are(simulator, weight):
    module = simulator(n_bits=2)
    module(weight)
    module.load_state_dict(module.state_dict() | {"indices": torch.zeros_like(module.indices)})
    assert module(weight).unique().numel() == 1


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "missing", [("indices",), ("per_channel_scale",), ("indices", "per_channel_scale")], ids=str
)
def test_absent_indices_and_scales_are_found_again(simulator, weight, fields, fresh, missing):
    module, other = simulator(**fields).eval(), simulator(**fields).eval()
    values = module(weight)
    # Indices as they are after loading: those of the palettes before their quantization may differ.
    module._indices_stale = True
    values = module(weight)
    if not fresh:
        other(2 * weight.roll(1))
    other.load_state_dict(without(module, *missing))
    assert torch.equal(other(weight), values)
    assert other.state_dict().keys() == module.state_dict().keys()


def test_indices_without_their_scale_are_found_again(simulator, weight):
    module = simulator(n_bits=4, enable_per_channel_scale=True)
    module(weight)
    state = without(module, "per_channel_scale") | {"indices": torch.zeros_like(module.indices)}
    module.load_state_dict(state)
    assert module(weight).unique().numel() > 16


def test_stale_indices_are_left_out(simulator, weight):
    module = simulator(n_bits=2, training_strategy_spec={"type": "straight_through"})
    module(weight)
    assert "indices" in module.state_dict()
    module.step(weight, 1)
    assert list(module.state_dict()) == ["fake_palett_enabled", "centroids"]
    module(weight)
    module.eval()(weight)
    assert "indices" in module.state_dict()


def test_absent_palettes(simulator, weight):
    """Of a simulator that has some they are missing; a fresh one leaves what belongs to them."""
    module, fresh = simulator(n_bits=2), simulator(n_bits=2)
    values = module(weight)
    for names in (("centroids",), ("centroids", "indices")):
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "centroids"\. *$'):
            module.load_state_dict(without(module, *names))
        assert torch.equal(module(weight), values)
    fresh.load_state_dict(without(module, "centroids"))
    assert torch.equal(fresh(weight), values)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_tables_of_old_checkpoints(simulator, weight, fields):
    module, other = simulator(**fields), simulator(**fields)
    values = module(weight)
    leading = module.lut.shape[:2]
    lut = module.centroids.reshape(*leading, *module.centroids.shape[1:])
    other.load_state_dict(without(module, "centroids") | {"lut": lut})
    assert torch.equal(other(weight), values)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_quantizers_start_with_the_loaded_palettes(simulator, weight, dtype):
    """A checkpoint that has no parameters for them yet: palettes alone."""
    fields = {"n_bits": 2, "lut_qspec": QuantizationSpec(dtype=dtype)}
    module, other = simulator(**fields), simulator(**fields)
    module(weight)
    found = {name: value for name, value in module.state_dict().items() if "quantizer" not in name}
    other.load_state_dict(found, strict=False)
    scales = [each.lut_quantization_scale for each in (module, other)]
    assert torch.equal(*scales)
    assert other._lut_fake_quantizer.qparams_calculator.scale.numel() == 1


def test_compatible_shapes(simulator):
    groups = simulator(granularity=PerGroupedChannelGranularity(axis=0, group_size=3))
    assert groups.check_compatible(torch.empty(6, 4))
    assert not groups.check_compatible(torch.empty(8, 4, device="meta"))
    vectors = simulator(cluster_dim=4)
    assert not vectors.check_compatible(torch.empty(6, 4))
    assert vectors.check_compatible(torch.empty(8, 4))
    assert not any(module.is_disabled() or module.centroids is not None for module in (groups, vectors))
