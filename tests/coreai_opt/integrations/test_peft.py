"""Adapters before and after prepare: they train, and are merged into the weights behind simulators."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

import coreai_opt  # noqa: E402
from coreai_opt.integrations.peft import merge_and_unload  # noqa: E402

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)) * 2)


def network():
    torch.manual_seed(0)
    return Network()


def adapted(model):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["first", "second"]))


def train(model):
    """The losses of some steps; the weights behind simulators must not move."""
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        loss = (model(X) - X.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scheme", ["w4", "w8a8"])
def test_adapters_over_a_compressed_model_train_and_merge(scheme):
    base, quantizer = coreai_opt.quantize(network(), X, scheme)
    originals = [each.parametrizations.weight.original.detach().clone() for each in (base.first, base.second)]
    model = adapted(base)
    with quantizer.training_mode():
        losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    layers = (base.first, base.second)
    behind = [each.base_layer.parametrizations.weight.original for each in layers]
    assert all(torch.equal(*pair) for pair in zip(behind, originals, strict=True))
    deltas = [each.get_delta_weight("default").detach() for each in layers]
    merged = merge_and_unload(model)
    for layer, original, delta in zip((merged.first, merged.second), originals, deltas, strict=True):
        torch.testing.assert_close(layer.parametrizations.weight.original, original + delta)
    # What is prepared anew from the merged weights has the same scales.
    again = network()
    again.load_state_dict(
        {
            name.replace("parametrizations.weight.original", "weight"): value
            for name, value in merged.state_dict().items()
            if name.endswith(("original", "bias"))
        }
    )
    again, _ = coreai_opt.quantize(again, X, scheme)
    assert torch.equal(again.first.weight, merged.first.weight)
    final = quantizer.finalize(merged, backend="torch")
    assert torch.equal(final.second.weight, again.second.weight)
    assert type(final.first) is nn.Linear


@pytest.mark.parametrize("scheme", ["w8", "w8a8"])
def test_a_model_in_adapters_is_prepared(scheme):
    model = adapted(network())
    with model.disable_adapter():
        model(X)
    model, quantizer = coreai_opt.quantize(
        model, X, scheme, filter_fn=lambda name, module: "lora_" not in name
    )
    assert len(quantizer.summary().compressed) == 2
    with quantizer.training_mode():
        losses = train(model)
    # Ranges of what adapters add begin at 0, and follow slowly: activations are to be prepared first.
    assert losses[-1] < (0.9 if scheme == "w8" else 1.1) * losses[0]
    with model.disable_adapter():
        model(X)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="must be a PeftModel; got Network"):
        merge_and_unload(network())
