"""What a search returns, that it goes on where it was ended, and what it refuses."""

import csv
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from coreai_opt.export import save
from coreai_opt.inspection import bits_per_weight
from coreai_opt.palettization import PalettizationSpec
from coreai_opt.pruning import PruningSpec
from coreai_opt.quantization import QuantizationSpec
from coreai_opt.quantization.spec import PerBlockGranularity
from coreai_opt.search import Candidate, search, searching
from coreai_opt.search.assigning import Option, greedy, optimal, pareto_front
from coreai_opt.search.candidates import configurations, prepared

INT8 = Candidate("int8", QuantizationSpec(dtype="int8"))
INT4 = Candidate("int4", QuantizationSpec(dtype="int4"))
TWO = Candidate("palette 2", PalettizationSpec(n_bits=2))
HALF = Candidate("sparse", PruningSpec(target_sparsity=0.5))
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float(((found - expected).double() ** 2).mean() / (expected.double() ** 2).mean())


def test_the_choice_fits_and_does_what_the_result_says():
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = search(net, [X], bits_per_weight=6.0, candidates=[INT8, INT4, TWO, HALF], progress=False)
    assert result.bits_per_weight <= 6.0
    prepared = result.prepare(net, (X,)).eval()
    assert bits_per_weight(prepared).bpw == result.bits_per_weight
    assert relative_error(prepared(X), net(X)) == pytest.approx(result.damage, rel=1e-4)
    # Never worse than one candidate everywhere that fits.
    assert all(result.damage <= damage for bits, damage in result.uniform.values() if bits <= 6.0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(hasattr(module, "parametrizations") for module in net.modules())


def test_all_kinds_share_a_model(tmp_path: Path):
    choice = {"0": INT8, "2": TWO, "4": HALF}
    result = searching.search(
        model(), [X], bits_per_weight=31.0, candidates=[INT8, TWO, HALF], progress=False
    )
    mixed = type(result)(**{**vars(result), "choice": choice})
    assert list(mixed.configs()) == ["pruning", "palettization", "quantization"]
    net = model()
    prepared = mixed.prepare(net, (X,)).eval()
    assert prepared[2].weight.unique().numel() == 4
    assert (prepared[4].weight == 0).sum() == 256
    assert not torch.equal(prepared[0].weight, net[0].weight)
    expected = prepared(X)
    assert bits_per_weight(prepared).total_bits < bits_per_weight(net).total_bits
    saved = save(prepared, tmp_path / "net.pt2", (X,), progress=False)
    assert torch.allclose(torch.export.load(saved.path).module()(X), expected, atol=1e-6)


def test_a_weight_has_one_compression_in_a_model_with_palettes():
    configs = {**configurations({"0": TWO, "2": INT8}), **configurations({"2": HALF})}
    with pytest.raises(ValueError, match=r"'2\.weight' is configured for pruning and for another"):
        prepared(model(), configs, (X,))


def test_the_same_arguments_give_the_same_result():
    first, second = (
        search(model(), [X, X * 2], bits_per_weight=5.0, metric="kl", progress=False).as_dict()
        for _ in range(2)
    )
    assert first == second


def test_a_metric_of_ones_own_and_batches_of_several_arguments():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"out": self.a(x) + 100 * self.b(y)}

    seen = []

    def metric(found: Any, expected: Any) -> float:
        seen.append(found["out"].shape)
        return float((found["out"] - expected["out"]).abs().max())

    torch.manual_seed(0)
    samples = [(torch.randn(4, 8), torch.randn(4, 8))] * 2
    result = search(
        Two(), samples, bits_per_weight=9.5, candidates=[INT8, TWO], metric=metric, progress=False
    )
    assert set(seen) == {torch.Size([4, 8])}
    # What matters a hundred times as much keeps more bits.
    bits = {row["layer"]: row["bits"] for row in result.rows() if row["chosen"]}
    assert bits["a"] < bits["b"]


def test_a_search_goes_on_where_it_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = str(tmp_path / "state.json")
    arguments: dict[str, Any] = {"bits_per_weight": 6.0, "candidates": [INT8, INT4], "progress": False}
    expected = search(model(), [X], **arguments)
    calls = []
    damage = searching.Prober.damage

    def ends_at_the_fourth(self: Any, weights: Any) -> float:
        calls.append(list(weights))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return damage(self, weights)

    monkeypatch.setattr(searching.Prober, "damage", ends_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        search(model(), [X], state_path=state, **arguments)
    assert len(json.loads(Path(state).read_text())["measurements"]) == 3
    resumed = search(model(), [X], state_path=state, **arguments)
    assert resumed.as_dict() == expected.as_dict()
    # One is repeated, three were left, then the choice, and each candidate everywhere.
    assert [len(each) for each in calls[4:]] == [1, 1, 1, 1, 3, 3, 3]
    with pytest.raises(ValueError, match="belongs to a search with another"):
        search(model(), [X * 2], state_path=state, **arguments)
    Path(state).write_text("{}")
    with pytest.raises(ValueError, match="holds no state"):
        search(model(), [X], state_path=state, **arguments)


def test_a_state_of_another_function_is_refused(tmp_path: Path):
    def distance(found: Tensor, expected: Tensor, power: int) -> float:
        return float((found - expected).abs().pow(power).mean())

    state = str(tmp_path / "state.json")
    arguments: dict[str, Any] = {"bits_per_weight": 9.0, "candidates": [INT8], "progress": False}
    metric = functools.partial(distance, power=1)
    first = search(model(), [X], metric=metric, state_path=state, **arguments)
    again = search(model(), [X], metric=functools.partial(distance, power=1), state_path=state, **arguments)
    assert again.as_dict() == first.as_dict()
    with pytest.raises(ValueError, match=r"another metric or forward: 'int8' in layer '\d' does a damage"):
        search(model(), [X], metric=functools.partial(distance, power=2), state_path=state, **arguments)


@pytest.mark.parametrize("damaged", [{"layers": []}, {"measurements": [["0"]]}, {"layers": {"int8": None}}])
def test_a_damaged_state_is_told(tmp_path: Path, damaged: dict[str, Any]):
    state = tmp_path / "state.json"
    arguments: dict[str, Any] = {"bits_per_weight": 9.0, "candidates": [INT8], "progress": False}
    search(model(), [X], state_path=str(state), **arguments)
    state.write_text(json.dumps({**json.loads(state.read_text()), **damaged}))
    with pytest.raises(ValueError, match="holds no state of a search"):
        search(model(), [X], state_path=str(state), **arguments)


def test_without_progress_nothing_is_written(capfd: pytest.CaptureFixture[str]):
    result = search(model(), [X], bits_per_weight=6.0, candidates=[INT8, TWO], progress=False)
    assert capfd.readouterr() == ("", "")
    result.table()
    search(model(), [X], bits_per_weight=6.0, candidates=[INT8, TWO])
    written = capfd.readouterr().err
    assert "palette 2 (2 of 2)" in written
    assert "Palettizing layers" not in written


def test_samples_by_keyword_and_as_a_loader_gives_them():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 8)

        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            return self.layer(x) * scale

    torch.manual_seed(0)
    arguments: dict[str, Any] = {"bits_per_weight": 9.5, "progress": False}
    for number in (1, 2):
        options = {"candidates": [INT8, INT4], "candidates_per_forward": number, **arguments}
        result = search(Scaled(), [{"x": X, "scale": 2.0}], **options)
        assert result.choice == {"layer": INT8}
    prepared = result.prepare(Scaled(), {"x": X, "scale": 2.0})
    assert prepared(X, scale=1.0).shape == (16, 8)
    loader = DataLoader(TensorDataset(X, torch.zeros(16)), batch_size=8)
    assert next(iter(loader))[1].shape == (8,)
    by_loader = search(model(), loader, candidates=[INT8], **arguments)
    by_hand = search(model(), [X[:8], X[8:]], candidates=[INT8], **arguments)
    assert by_loader.as_dict() == by_hand.as_dict()
    with pytest.raises(TypeError, match=r"a sample does not fit Scaled\.forward"):
        search(Scaled(), [{"y": X}], candidates=[INT8], **arguments)


def test_the_metrics_are_what_their_names_say():
    net, generator = model(), torch.Generator().manual_seed(0)
    expected = net(X)
    result = search(net, [X], bits_per_weight=9.0, candidates=[INT8], metric="psnr", progress=False)
    found = result.prepare(net, (X,)).eval()(X)
    error = (found - expected).detach().square().mean()
    assert -10 * math.log10(result.damage) == pytest.approx(
        float(10 * torch.log10(expected.detach().abs().max() ** 2 / error)), rel=1e-4
    )
    # A class that the model rules out is no reason to fail.
    ruled_out = torch.zeros(8).masked_fill(torch.arange(8) == 3, -math.inf)

    class RuledOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + ruled_out

    with torch.no_grad():
        net = RuledOut().eval()
        net.layer.weight.copy_(torch.randn(8, 32, generator=generator))
    result = search(net, [X], bits_per_weight=9.5, candidates=[INT8], metric="kl", progress=False)
    found = result.prepare(net, (X,)).eval()(X).detach().log_softmax(-1)
    target = net(X).detach().log_softmax(-1)
    terms = (target.exp() * (target - found))[:, ruled_out == 0]
    assert result.damage == pytest.approx(float(terms.sum(-1).mean()), rel=1e-3)


class Scored(nn.Module):
    """A model with a tied weight, an output that is no tensor, and one that no weight changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(16, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> dict[str, Any]:
        hidden = self.inner(self.embedding(ids)).relu()
        return {"scores": self.head(hidden), "length": ids.shape[1], "mask": ids > 3}


@pytest.mark.parametrize("metric", ["mse", lambda a, b: float((a["scores"] - b["scores"]).abs().max())])
def test_candidates_that_share_a_forward_do_what_they_do_alone(metric: Any):
    torch.manual_seed(0)
    net, ids = Scored().eval(), torch.randint(16, (3, 5))
    arguments: dict[str, Any] = {"bits_per_weight": 9.5, "candidates": [INT8, INT4, TWO, HALF]}
    arguments |= {"metric": metric, "progress": False}
    alone = search(net, [ids, ids.flip(0)], **arguments)
    for number in (2, 3, 9):
        shared = search(net, [ids, ids.flip(0)], candidates_per_forward=number, **arguments)
        assert [(each.layer, each.candidate, each.bits) for each in shared.measurements] == [
            (each.layer, each.candidate, each.bits) for each in alone.measurements
        ]
        assert [each.damage for each in shared.measurements] == pytest.approx(
            [each.damage for each in alone.measurements], rel=1e-4
        )
        assert shared.choice == alone.choice


def test_a_search_with_shared_forwards_goes_on_where_it_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state = str(tmp_path / "state.json")
    arguments: dict[str, Any] = {"bits_per_weight": 6.0, "candidates": [INT8, INT4, TWO], "progress": False}
    expected = search(model(), [X], candidates_per_forward=2, **arguments)
    calls = []
    damages = searching.Prober.damages

    def ends_at_the_third(self: Any, layer: str, weights: Any) -> list[float]:
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return damages(self, layer, weights)

    monkeypatch.setattr(searching.Prober, "damages", ends_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        search(model(), [X], candidates_per_forward=2, state_path=state, **arguments)
    # A state that lacks one candidate of a pair: both are measured again.
    kept = json.loads(Path(state).read_text())
    kept["measurements"].pop()
    Path(state).write_text(json.dumps(kept))
    resumed = search(model(), [X], candidates_per_forward=2, state_path=state, **arguments)
    assert resumed.as_dict() == expected.as_dict()
    assert calls[3:] == ["2", "4", "0", "2", "4"]
    with pytest.raises(ValueError, match="belongs to a search with another"):
        search(model(), [X], state_path=state, **arguments)


def test_a_model_that_cannot_share_forwards_is_told():
    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if out.sum().item() > 0 else -out

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand_like(x))

    arguments: dict[str, Any] = {"bits_per_weight": 9.5, "candidates": [INT8, INT4], "progress": False}
    for kind in (Branching, Noisy):
        net = nn.Sequential(kind(32, 8))
        search(net, [X], **arguments)
        with pytest.raises(RuntimeError) as caught:
            search(net, [X], candidates_per_forward=2, **arguments)
        assert "layer '0', as candidates_per_forward asks" in caught.value.__notes__[0]


def test_layers_that_a_candidate_does_not_fit_stay(caplog: pytest.LogCaptureFixture):
    blocks = Candidate(
        "blocks", QuantizationSpec(dtype="int4", granularity=PerBlockGranularity(axis=1, block_size=64))
    )
    result = search(model(), [X], bits_per_weight=16.0, candidates=[blocks], progress=False)
    assert {row["layer"] for row in result.rows()} == {"2", "4"}
    assert result.prepare(model(), (X,))[0].weight.shape == (64, 32)


def test_only_named_layers_are_searched():
    result = search(model(), [X], bits_per_weight=31.0, candidates=[INT8], layers=["[24]"], progress=False)
    assert list(result.choice) == ["2", "4"]


def test_reports(tmp_path: Path):
    result = search(model(), [X], bits_per_weight=6.0, candidates=[INT8, INT4, TWO], progress=False)
    result.to_csv(tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(rows) == 9
    assert {row["layer"] for row in rows if row["chosen"] == "True"} == {
        layer for layer, candidate in result.choice.items() if candidate
    }
    result.plot(tmp_path / "front.svg")
    drawing = (tmp_path / "front.svg").read_text()
    assert drawing.startswith("<svg")
    assert drawing.count("<circle") == 4
    assert "whole model" in result.table()
    json.dumps(result.as_dict())
    damages = [damage for _, damage in result.front]
    assert damages == sorted(damages, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "one of bits_per_weight and size_bytes"),
        ({"bits_per_weight": 4, "size_bytes": 4}, ValueError, "one of bits_per_weight and size_bytes"),
        ({"bits_per_weight": -1}, ValueError, "the budget must be a positive number"),
        (
            {"bits_per_weight": 4, "candidates_per_forward": 0},
            ValueError,
            "candidates_per_forward must be a positive number",
        ),
        ({"bits_per_weight": 1.5}, ValueError, "nothing fits the budget: the smallest choice takes 4"),
        ({"size_bytes": 100}, ValueError, "nothing fits the budget"),
        ({"bits_per_weight": 4, "metric": "ssim"}, ValueError, "metric must be"),
        ({"bits_per_weight": 4, "method": "best"}, ValueError, "method must be"),
        ({"bits_per_weight": 4, "candidates": []}, ValueError, "at least one"),
        ({"bits_per_weight": 4, "candidates": [INT8, INT8]}, ValueError, "a name of its own"),
        ({"bits_per_weight": 4, "candidates": ["int8"]}, TypeError, "must be Candidate objects; got str"),
        ({"bits_per_weight": 9, "layers": ["nothing"]}, ValueError, r"among those that layers=\['nothing'\]"),
        ({"bits_per_weight": 9, "layers": "0"}, TypeError, "layers must be a list of regular expressions"),
        ({"bits_per_weight": 9, "layers": ["("]}, ValueError, r"layers: '\(' is no regular expression"),
        ({"bits_per_weight": 9, "metric": lambda a, b: float("nan")}, ValueError, "finite.* for layer '0'"),
        ({"bits_per_weight": 9, "metric": lambda a, b: None}, TypeError, "metric must return a number"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        search(model(), [X], **{"candidates": [INT8, INT4], "progress": False, **arguments})


class Largest(nn.Module):
    """The index of the largest."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


def test_an_error_in_a_metric_says_where():
    def fails(found: Tensor, expected: Tensor) -> float:
        raise KeyError("missing")

    with pytest.raises(KeyError) as caught:
        search(model(), [X], bits_per_weight=9, candidates=[INT8], metric=fails, progress=False)
    assert caught.value.__notes__ == ["while trying int8 in layer '0'"]


def test_names_that_look_like_markup():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("[/red]", nn.Linear(32, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("[/red]")(x)

    candidate = Candidate("[bold]", INT8.spec)
    result = search(Named(), [X], bits_per_weight=9.5, candidates=[candidate], progress=False)
    assert "[/red]" in result.table()
    assert "[bold]" in result.table()


def test_bad_candidates_and_samples():
    with pytest.raises(TypeError, match="spec must be a QuantizationSpec"):
        Candidate("x", 8)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"'0\.weight' is on the meta device"):
        search(model().to("meta"), [X], bits_per_weight=8)
    with pytest.raises(
        ValueError, match="metric='kl' compares floating-point outputs, and the model has none"
    ):
        search(nn.Sequential(model(), Largest()), [X], bits_per_weight=9, metric="kl", progress=False)
    with pytest.raises(ValueError, match="at least one sample"):
        search(model(), [], bits_per_weight=8)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        search("model", [X], bits_per_weight=8)  # type: ignore[arg-type]


def random_options(seed: int) -> dict[str, list[Option]]:
    generator = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(1, high, (1,), generator=generator))

    return {
        f"layer{i}": [
            Option(None, 0.0, 100 + number(50)),
            *(Option(f"c{j}", float(number(90)), number(100)) for j in range(3)),
        ]
        for i in range(5)
    }


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_is_that_of_all_assignments(seed: int):
    options = random_options(seed)
    every = [
        (sum(option.bits for option in each), sum(option.damage for option in each))
        for each in itertools.product(*options.values())
    ]
    for budget in (120, 200, 300, 500):
        fitting = [damage for bits, damage in every if bits <= budget]
        found = optimal(options, budget)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        picked = [next(o for o in options[layer] if o.candidate == name) for layer, name in found.items()]
        assert sum(option.bits for option in picked) <= budget
        assert sum(option.damage for option in picked) == min(fitting)
    front = pareto_front(options)
    assert front[-1][1] == 0.0
    assert all(min(d for b, d in every if b <= bits) == damage for bits, damage in front)


def test_greedy_takes_the_least_harmful_first():
    options = {
        "a": [Option(None, 0, 320), Option("8", 1, 80), Option("4", 5, 40)],
        "b": [Option(None, 0, 320), Option("8", 2, 80), Option("4", 3, 40)],
    }
    assert greedy(options, 640) == {"a": None, "b": None}
    assert greedy(options, 400) == {"a": "8", "b": None}
    assert greedy(options, 160) == {"a": "8", "b": "8"}
    assert greedy(options, 120) == {"a": "8", "b": "4"}
    assert greedy(options, 80) == {"a": "4", "b": "4"}
    assert greedy(options, 79) is None


def test_many_layers_keep_to_the_budget():
    generator = torch.Generator().manual_seed(0)
    options = {
        str(i): [Option(None, 0.0, 32000)]
        + [
            Option(
                str(j),
                float(torch.rand(1, generator=generator)),
                4000 + int(torch.randint(0, 3000, (1,), generator=generator)),
            )
            for j in range(6)
        ]
        for i in range(120)
    }
    found = optimal(options, 120 * 6000)
    assert found is not None
    picked = [next(o for o in options[layer] if o.candidate == name) for layer, name in found.items()]
    assert sum(option.bits for option in picked) <= 120 * 6000
    least = sum(
        min(option.damage for option in choices[1:] if option.bits <= 6000 or option.damage)
        for choices in options.values()
    )
    assert sum(option.damage for option in picked) <= least * 1.5
