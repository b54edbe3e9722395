"""Prepared models through one file: the same outputs, the same steps, and errors that leave all as it was."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

import coreai_opt
from coreai_opt import checkpoint
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization.config import PATSchedule
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from coreai_opt.pruning.config import PolynomialDecaySchedule
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.config import QATSchedule


class Network(nn.Module):
    """Two layers that share a weight, a convolution with a batch norm, and an output."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm1d(2)
        self.first = nn.Linear(2 * width, 2 * width)
        self.second = nn.Linear(2 * width, 2 * width)
        self.second.weight = self.first.weight
        self.out = nn.Linear(2 * width, 4)

    def forward(self, x):
        x = self.norm(self.conv(x[:, None])).flatten(1)
        return self.out(self.second(torch.relu(self.first(x))))


def network(seed=0, width=8):
    torch.manual_seed(seed)
    return Network(width)


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def quantizer(model, mode="eager"):
    schedule = QATSchedule(enable_fake_quant=1, disable_observer=3)
    config = ModuleQuantizerConfig(qat_schedule=schedule)
    return Quantizer(model, QuantizerConfig(global_config=config, execution_mode=mode))


def graph_quantizer(model):
    return quantizer(model, "graph")


def pruner(model):
    schedule = PolynomialDecaySchedule(begin_step=0, total_iters=6)
    config = ModuleMagnitudePrunerConfig(sparsity_schedule=schedule)
    return MagnitudePruner(model, MagnitudePrunerConfig(global_config=config))


def palettizer(model):
    config = ModuleKMeansPalettizerConfig(pat_schedule=PATSchedule(enable_fake_palettize=1))
    return KMeansPalettizer(model, KMeansPalettizerConfig(global_config=config))


def train(model, compressors, steps, seed):
    """As a user does: every compressor is told of every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    modes = [each.training_mode() for each in compressors if not isinstance(each, MagnitudePruner)]
    for mode in modes:
        mode.__enter__()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        for each in compressors:
            each.step()
    for mode in modes:
        mode.__exit__(None, None, None)
    return model.eval()(X).detach().clone()


COMBINATIONS = [
    (quantizer,),
    (graph_quantizer,),
    (pruner,),
    (palettizer,),
    (pruner, quantizer),
    (palettizer, quantizer),
]


def prepared(combination, seed=0):
    model = network(seed)
    compressors = []
    for each in combination:
        compressors.append(each(model))
        model = compressors[-1].prepare((X,))
    return model, compressors


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_fresh_model_becomes_the_saved_one_and_trains_on(combination, tmp_path):
    model, compressors = prepared(combination)
    train(model, compressors, 2, seed=0)
    path = coreai_opt.save_checkpoint(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == [path]
    fresh = network(seed=7)
    restored = coreai_opt.load_checkpoint(fresh, path)
    assert [type(each) for each in restored.compressors] == [type(each) for each in compressors]
    assert [each.state_dict() for each in restored.compressors] == [each.state_dict() for each in compressors]
    states = [each.state_dict() for each in (model, restored.model)]
    assert list(states[0]) == list(states[1])
    # torch says nothing of switches outside of modes: prepared models have them on.
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not different
    assert torch.equal(restored.model.eval()(X), model.eval()(X))
    further = [train(*each, 4, seed=1) for each in ((model, compressors), restored)]
    assert torch.equal(*further)


def test_shared_weights_are_one_afterwards(tmp_path):
    model, _ = prepared((pruner, quantizer))
    path = coreai_opt.save_checkpoint(model, tmp_path / "model.safetensors")
    assert "second.parametrizations.weight.original" not in load_file(path)
    fresh = network(seed=7)
    coreai_opt.load_checkpoint(fresh, path)
    chains = [each.parametrizations.weight for each in (fresh.first, fresh.second)]
    assert chains[0].original is chains[1].original
    assert torch.equal(fresh.first.weight, model.first.weight)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_weights_that_torch_computes_from_others(norm, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))

    x = torch.randn(5, 8)
    model, _ = coreai_opt.prune(build(0), x, 0.5)
    model.eval()
    coreai_opt.save_checkpoint(model, tmp_path / "model.safetensors")
    restored, _ = coreai_opt.load_checkpoint(build(1), tmp_path / "model.safetensors")
    assert torch.equal(restored.eval()(x), model(x))


class KeywordOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, *, value, options=None):
        assert options is None or options == {"scale": [2.0]}
        return self.fc(value) * (options["scale"][0] if options else 1.0)


def test_keyword_inputs_are_known_at_loading(tmp_path):
    torch.manual_seed(0)
    model = KeywordOnly()
    quantizer(model).prepare({"value": X, "options": {"scale": [2.0]}})
    path = coreai_opt.save_checkpoint(model, tmp_path / "model.safetensors")
    fresh = KeywordOnly()
    coreai_opt.load_checkpoint(fresh, path)
    assert torch.equal(fresh(value=X), model(value=X))


def test_keyword_inputs_in_graph_mode(tmp_path):
    torch.manual_seed(0)
    given = {"value": X, "options": {"scale": [torch.tensor(2.0)]}}

    class Network(KeywordOnly):
        def forward(self, *, value, options):
            return self.fc(value) * options["scale"][0]

    prepared = Quantizer(Network(), QuantizerConfig()).prepare(given)
    result = prepared(**given)
    assert not torch.equal(result, prepared.fc.bias + X @ prepared.fc.weight.T)
    path = coreai_opt.save_checkpoint(prepared, tmp_path / "model.safetensors")
    again, _ = coreai_opt.load_checkpoint(Network(), path)
    assert torch.equal(again(**given), result)
    # By position first, as far as they can be: as forward is called in training.
    both, _ = coreai_opt.quantize(Mixed(), [{"x": X, "bias": torch.ones(4)}], QuantizerConfig())
    assert both(X, bias=torch.ones(4)).shape == (len(X), 4)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x, *, bias):
        return self.fc(x) + bias


def test_inputs_that_are_no_plain_data_are_asked_for(tmp_path):
    class Box:
        x = X

    class Unboxing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, box):
            return self.fc(box.x)

    model, fresh = Unboxing(), Unboxing()
    quantizer(model).prepare((Box(),))
    path = coreai_opt.save_checkpoint(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"give example_inputs: .*Box"):
        coreai_opt.load_checkpoint(fresh, path)
    coreai_opt.load_checkpoint(fresh, path, (Box(),))
    assert torch.equal(fresh(Box()), model(Box()))


def test_dynamic_shapes_are_those_of_the_first_time(tmp_path):
    made = graph_quantizer(network())
    batch = torch.export.Dim("batch", min=2, max=64)
    model = made.prepare((X,), dynamic_shapes={"x": {0: batch}})
    path = coreai_opt.save_checkpoint(model, tmp_path / "model.safetensors")
    restored = coreai_opt.load_checkpoint(network(seed=7), path).model
    longer = torch.cat([X, X, X])
    assert torch.equal(restored.eval()(longer), model.eval()(longer))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model, _ = prepared((quantizer,))
    path = coreai_opt.save_checkpoint(model, tmp_path / "model.safetensors")
    before = path.read_bytes()
    with torch.no_grad():
        model.out.bias += 1

    def fail(tensors, file, metadata):
        file.write_bytes(b"half a fi")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        coreai_opt.save_checkpoint(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def header(path):
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]


@pytest.fixture
def saved(tmp_path):
    return coreai_opt.save_checkpoint(prepared((pruner, quantizer))[0], tmp_path / "model.safetensors")


def _later(path):
    description = json.loads(header(path)["coreai_opt"])
    description["versions"] |= {"state": 2, "coreai_opt_fused": "9.9"}
    save_file(load_file(path), path, {"coreai_opt": json.dumps(description)})


def _without_a_tensor(path):
    state = load_file(path)
    del state["first.parametrizations.weight.1.qparams_calculator.scale"]
    save_file(state, path, header(path))


def _cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_cut_off, ValueError, "damaged"),
        (lambda path: path.write_bytes(b""), ValueError, "damaged"),
        (lambda path: save_file({"a": torch.ones(1)}, path), ValueError, "not of save_checkpoint"),
        (lambda path: path.unlink(), FileNotFoundError, "no file"),
        (_later, ValueError, r"form 2, made by version 9\.9"),
        (_without_a_tensor, RuntimeError, r"first\.parametrizations\.weight\.1\.qparams_calculator\.scale"),
    ],
)
def test_a_bad_file_leaves_the_model_as_it_was(saved, spoil, error, message):
    spoil(saved)
    fresh = network(seed=7)
    before = copy.deepcopy(fresh)
    with pytest.raises(error, match=message):
        coreai_opt.load_checkpoint(fresh, saved)
    _same(fresh, before)


def _same(model, before):
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.state_dict().items())
    assert not hasattr(model, "_coreai_opt_steps")
    assert type(model.first) is nn.Linear


def test_another_model_is_refused_by_name(saved):
    wider = network(width=4)
    before = copy.deepcopy(wider)
    with pytest.raises(RuntimeError, match=r"another model, .*Network.*'first\.weight' has shape \(8, 8\)"):
        coreai_opt.load_checkpoint(wider, saved)
    _same(wider, before)
    with pytest.raises(RuntimeError, match=r"In this Linear, 'conv\.weight' is missing; .*; and \d+ more"):
        coreai_opt.load_checkpoint(nn.Linear(2, 2), saved)
    with pytest.raises(RuntimeError, match="prepared already"):
        coreai_opt.load_checkpoint(prepared((pruner,))[0], saved)


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(RuntimeError, match="Call prepare first"):
        coreai_opt.save_checkpoint(network(), path)
    with pytest.raises(RuntimeError, match="part '0' is"):
        coreai_opt.save_checkpoint(nn.Sequential(prepared((pruner,))[0]), path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        coreai_opt.save_checkpoint(prepared((pruner,))[0], tmp_path / "none" / "model.safetensors")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        coreai_opt.save_checkpoint("model", path)
    model, (made,) = prepared((quantizer,))
    made.finalize(backend="torch")
    with pytest.raises(RuntimeError, match="not prepared"):
        coreai_opt.save_checkpoint(model, path)
    assert not path.exists()


def test_graph_mode_refuses_a_model_that_is_prepared_otherwise():
    model, _ = prepared((pruner,))
    with pytest.raises(RuntimeError, match="prepared for pruning already"):
        graph_quantizer(model).prepare((X,))


def test_a_compressors_state_says_what_made_it():
    _, (made,) = prepared((pruner,))
    state = made.state_dict()
    assert state["versions"]["torch"] == torch.__version__
    later = {**state, "versions": {"state": 2, "coreai_opt_fused": "9.9"}}
    with pytest.raises(ValueError, match=r"version 9\.9"):
        made.load_state_dict({**later, "step_count": 3})
    assert made.state_dict() == state
