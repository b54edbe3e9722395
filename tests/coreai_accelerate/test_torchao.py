"""The engine under models that torchao has prepared: the same bits in training, conversion, copies."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import (
    Float8FakeQuantizeConfig,
    Int8DynActInt4WeightQATQuantizer,
    IntxFakeQuantizeConfig,
    IntxFakeQuantizer,
    QATConfig,
)
from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

import coreai_accelerate
from benchmarks import torchao as benchmark
from coreai_accelerate.torchao_qat import FusedIntxFakeQuantizer
from coreai_kernels import native

pytestmark = pytest.mark.skipif(
    native.extension is None, reason="without a compiled library torchao's methods run"
)
BASES = {
    "linear": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
    "embedding": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.embed(tokens))


def apply(model: nn.Module, step: str) -> None:
    quantize_(model.mlp, QATConfig(BASES["linear"], step=step))
    quantize_(
        model, QATConfig(BASES["embedding"], step=step), filter_fn=lambda m, _: isinstance(m, nn.Embedding)
    )


def prepared() -> nn.Module:
    torch.manual_seed(0)
    model = Tokens()
    apply(model, "prepare")
    return model


def train(model: nn.Module, steps: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(steps):
        output = model(torch.randint(11, (4, 5), generator=generator))
        optimizer.zero_grad()
        output.square().mean().backward()
        seen += [output.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        optimizer.step()
    return seen


def bits(x: torch.Tensor) -> torch.Tensor:
    """Bytes, which tell signs of zeros. All NaN are alike: their bits depend on the split of loops."""
    x = x.contiguous()
    return (torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x).view(torch.uint8)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs) and all(
        torch.equal(bits(a), bits(b)) for a, b in pairs
    )


def test_models_train_the_same_and_convert() -> None:
    alone, model = prepared(), prepared()
    report = coreai_accelerate.torchao(model)
    names = ["activation_fake_quantizer", "weight_fake_quantizer"]
    layers = [f"mlp.{layer}.{name}" for layer in (0, 2) for name in names]
    assert sorted(report.replaced) == sorted(["embed.weight_fake_quantizer", *layers])
    assert not report.left
    fallbacks = dict(coreai_accelerate.status().fallbacks)
    assert same(train(alone), train(model))
    assert coreai_accelerate.status().fallbacks == fallbacks
    assert list(model.state_dict()) == list(alone.state_dict())
    for each in (alone, model):
        apply(each, "convert")
    tokens = torch.arange(11)[None]
    assert same([alone(tokens)], [model(tokens)])
    assert [type(each) for each in model.modules()] == [type(each) for each in alone.modules()]


SPECIALS = ("plain", "ties", "zeros", "not finite", "tiny")


def draw(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(kind))) * 3
    if kind == "ties":
        return (x * 4).round() / 8
    if kind == "zeros":
        x[0], x[1], x[2] = 0, -0.0, x[2].abs()
    if kind == "not finite":
        x[0, ..., 0], x[1, ..., 3], x[2, ..., 4] = float("nan"), float("inf"), -float("inf")
    return x * 1e-38 if kind == "tiny" else x


CONFIGS = {
    "tokens": {"dtype": torch.int8, "granularity": "per_token", "is_symmetric": False},
    "tokens, int4": {"dtype": torch.int4, "granularity": "per_token", "is_symmetric": False, "eps": 1e-6},
    "channels": {"dtype": torch.int8, "granularity": "per_channel"},
    "groups": {"dtype": torch.int4, "group_size": 16},
    "groups, int2": {"dtype": torch.int2, "group_size": 32, "eps": 1e-6},
    "groups, int8": {"dtype": torch.int8, "group_size": 8},
    "static": {"dtype": torch.int4, "group_size": 32, "is_dynamic": False},
}


@pytest.mark.parametrize("kind", SPECIALS)
@pytest.mark.parametrize("name", CONFIGS)
def test_values_gradients_and_parameters(name: str, kind: str) -> None:
    found = []
    for module in (IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS[name])) for _ in range(2)):
        if found:
            assert coreai_accelerate.torchao(module).replaced == [""]
        seen = []
        shapes = [(6, 64), (6, 64), (3, 2, 64)] if "tokens" in name else [(6, 64), (6, 64)]
        for shape in shapes:
            x = draw(kind, shape).requires_grad_()
            output = module(x)
            gradient = draw(kind if kind == "not finite" else "plain", shape)
            output.backward(gradient)
            assert x.grad is not None
            seen += [output.detach(), x.grad, module.scale, module.zero_point]
            with torch.no_grad():
                seen.append(module(x))
        found.append(seen)
    assert same(*found)


def test_gradients_of_gradients() -> None:
    found = []
    for module in (IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["groups"])) for _ in range(2)):
        if found:
            coreai_accelerate.torchao(module)
        x = draw("plain", (4, 32)).requires_grad_()
        weight = draw("ties", (4, 32)).requires_grad_()
        (first,) = torch.autograd.grad((module(x) * weight).square().sum(), x, create_graph=True)
        found.append([first.detach(), *torch.autograd.grad(first.square().sum(), (x, weight))])
    assert same(*found)


def test_what_is_left_and_why() -> None:
    class Mine(IntxFakeQuantizer):
        pass

    class NVFP4FakeQuantizedLinear(nn.Linear):
        pass

    group = {"dtype": torch.int4, "group_size": 32}
    configs: dict[str, Any] = {
        "learning": IntxFakeQuantizeConfig(**group, range_learning=True, is_dynamic=False),
        "asymmetric": IntxFakeQuantizeConfig(**group, is_symmetric=False),
        "half scales": IntxFakeQuantizeConfig(**group, scale_precision=torch.bfloat16),
        "no least scale": IntxFakeQuantizeConfig(**group, eps=0.0),
        "float8": Float8FakeQuantizeConfig(),
        "int4": Int4WeightFakeQuantizeConfig(),
    }
    modules = {name: FakeQuantizerBase.from_config(config) for name, config in configs.items()}
    modules |= {"mine": Mine(IntxFakeQuantizeConfig(**group)), "layer": NVFP4FakeQuantizedLinear(8, 8)}
    report = coreai_accelerate.torchao(nn.ModuleDict(modules))
    assert not report.replaced
    assert report.left == {
        "learning": "range learning",
        "asymmetric": "asymmetric groups",
        "half scales": "precision of the parameters",
        "no least scale": "scales of zero",
        "float8": "its scale has a gradient, too",
        "int4": "its scale has a gradient, too",
        "mine": "a subclass",
        "layer": "a layer that has no fake quantizers of its own",
    }


def test_other_dtypes_go_to_torchaos_method_and_are_counted() -> None:
    found = []
    for module in (IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["groups"])) for _ in range(2)):
        if found:
            coreai_accelerate.torchao(module)
        found.append([module(draw("plain", (4, 32)).bfloat16())])
    assert same(*found)
    assert coreai_accelerate.status().fallbacks["torchao: bfloat16"] > 0


@pytest.mark.parametrize("columns", [12, 20])
def test_blocks_that_do_not_fill_bytes_of_a_mask_go_to_torchaos_method(columns: int) -> None:
    before = coreai_accelerate.status().fallbacks.get("torchao: block size", 0)
    found = []
    for module in (IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["channels"])) for _ in range(2)):
        if found:
            coreai_accelerate.torchao(module)
        found.append([module(draw("plain", (4, columns)))])
    assert same(*found)
    assert coreai_accelerate.status().fallbacks["torchao: block size"] == before + 1


def test_parameters_that_were_replaced_are_used_or_left_to_torchao() -> None:
    found = []
    for module in (IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["static"])) for _ in range(2)):
        if found:
            coreai_accelerate.torchao(module)
        x = draw("plain", (4, 64))
        seen = [module(x)]
        module.scale, module.zero_point = module.scale * 2, module.zero_point + 1
        seen.append(module(x))
        module.scale = module.scale.t().contiguous().t()
        seen.append(module(x))
        module.zero_point = module.zero_point.to(torch.int64)
        seen.append(module(x))
        found.append(seen)
    assert same(*found)


def test_switched_off_simulators_pass_the_tensor() -> None:
    module = IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["groups"]))
    coreai_accelerate.torchao(module)
    module.enabled = False
    x = draw("plain", (4, 32))
    assert module(x) is x


def test_copies_pickles_and_compiled_programs() -> None:
    module = IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["groups"]))
    coreai_accelerate.torchao(module)
    x = draw("plain", (4, 32))
    expected = [module(x)]
    assert same(expected, [copy.deepcopy(module)(x)])
    assert same(expected, [pickle.loads(pickle.dumps(module))(x)])
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert same(expected, [compiled(x)])


def test_another_default_dtype() -> None:
    found = []
    for module in (IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["groups"])) for _ in range(2)):
        if found:
            coreai_accelerate.torchao(module)
        x = draw("plain", (4, 32))
        torch.set_default_dtype(torch.bfloat16)
        try:
            found.append([module(x), module.scale, module.zero_point])
        finally:
            torch.set_default_dtype(torch.float32)
    assert same(*found)


def test_copies_and_pickles_belong_to_who_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["groups"]))
    coreai_accelerate.torchao(module)
    copied, pickled = copy.deepcopy(module), pickle.dumps(module)
    again = pickle.loads(pickled)
    assert (type(copied), type(again)) == (FusedIntxFakeQuantizer, IntxFakeQuantizer)
    assert coreai_accelerate.status().torchao >= 2
    assert b"coreai_accelerate" not in pickled
    coreai_accelerate.disable()
    assert (type(module), type(copied)) == (IntxFakeQuantizer, IntxFakeQuantizer)
    assert coreai_accelerate.status().torchao == 0


@pytest.mark.parametrize("kind", SPECIALS)
def test_linear_layers_with_parameters_in_float32(kind: str) -> None:
    """What ``Int8DynActInt4WeightQATQuantizer`` prepares: zero points are numbers in float32."""
    found: list[list[torch.Tensor]] = []
    for _ in range(2):
        torch.manual_seed(0)
        quantizer = Int8DynActInt4WeightQATQuantizer(groupsize=32)
        model = quantizer.prepare(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)))
        if found:
            report = coreai_accelerate.torchao(model)
            assert len(report.replaced) == 4
            assert not report.left
        seen = []
        for seed in range(2):
            x = draw(kind, (4 + seed, 3, 64)).requires_grad_()
            output = model(x)
            output.backward(torch.ones_like(output))
            assert x.grad is not None
            seen += [output.detach(), x.grad]
        simulators = [each for each in model.modules() if isinstance(each, IntxFakeQuantizer)]
        seen += [each for one in simulators for each in (one.scale, one.zero_point)]
        found.append(seen + [each.grad for each in model.parameters() if each.grad is not None])
    assert same(*found)


def test_tangents_and_replaced_methods_are_torchaos() -> None:
    module = IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["groups"]))
    coreai_accelerate.torchao(module)
    x = draw("plain", (4, 32))
    with pytest.raises(RuntimeError, match="jvp"):  # as torchao alone does
        torch.func.jvp(module, (x,), (torch.ones_like(x),))
    module._per_channel_or_group_forward = lambda x: x + 1
    assert torch.equal(module(x), x + 1)
    assert coreai_accelerate.status().fallbacks["torchao: methods"] > 0


def test_a_model_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got NoneType"):
        coreai_accelerate.torchao(None)  # type: ignore[arg-type]


def test_disable_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    module = IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["groups"]))
    coreai_accelerate.torchao(module)
    assert type(module) is FusedIntxFakeQuantizer
    other = IntxFakeQuantizer(IntxFakeQuantizeConfig(**CONFIGS["groups"]))
    coreai_accelerate.torchao(other)
    other.__class__ = spy = type("Spy", (FusedIntxFakeQuantizer,), {})
    coreai_accelerate.disable()
    assert type(module) is IntxFakeQuantizer
    assert type(other) is spy
    assert not coreai_accelerate.status().torchao
    monkeypatch.setenv("COREAI_ACCELERATE", "0")
    assert not coreai_accelerate.torchao(module).replaced
    assert type(module) is IntxFakeQuantizer


def test_benchmark(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "torchao.json"
    try:
        assert benchmark.main(["--sizes", "32", "--rounds", "1", "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["results"]
    assert [row["case"] for row in rows] == list(benchmark.CASES)
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
