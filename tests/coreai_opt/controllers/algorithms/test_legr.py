"""Learned global ranking: the search itself, and in filter pruning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coreai_opt.controllers import create_compressed_model, register_default_init_args
from coreai_opt.controllers.algorithms.legr import Evolution, LegrParams

from ..support import assert_same_state, loader, make_model


def test_evolution_finds_what_is_judged_best() -> None:
    wanted = [(2.0, 0.5), (0.5, -0.5), (1.0, 1.0)]

    def judge(coefficients: list[tuple[float, float]]) -> float:
        pairs = zip(coefficients, wanted, strict=True)
        return sum((a - c) ** 2 + (b - d) ** 2 for (a, b), (c, d) in pairs)

    torch.manual_seed(0)
    importances = [torch.rand(16) for _ in wanted]
    params = LegrParams(generations=400, population_size=32, num_samples=8, mutate_percent=0.4)
    search = Evolution(importances, params)
    found = search.run(judge)
    assert judge(found) == search.history[-1]
    assert search.history == sorted(search.history, reverse=True)
    assert search.history[-1] < 0.2 * judge([(1.0, 0.0)] * 3)  # the first candidate changes nothing
    assert Evolution(importances, params).run(judge) == found  # seeded


def test_candidates_without_a_finite_loss_lose() -> None:
    params = LegrParams(generations=20, population_size=4, num_samples=2)
    losses = iter([1.0, *[float("nan")] * 19])
    assert Evolution([torch.rand(4)], params).run(lambda _: next(losses)) == [(1.0, 0.0)]


def test_a_search_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    importances = [torch.linspace(0, 1, 16), torch.linspace(0, 3, 8)]
    path = tmp_path / "search.json"
    sizes = {"generations": 40, "population_size": 8, "num_samples": 3}

    def judge(coefficients: list[tuple[float, float]]) -> float:
        noise = float(torch.rand(()))  # as of a shuffled loader
        return sum((a - 2) ** 2 + b**2 for a, b in coefficients) + 0.1 * noise

    whole = Evolution(importances, LegrParams(**sizes))
    found = whole.run(judge)
    judged = 0

    def ended(coefficients: list[tuple[float, float]]) -> float:
        nonlocal judged
        judged += 1
        if judged in (5, 23):
            raise KeyboardInterrupt
        return judge(coefficients)

    params = LegrParams(**sizes, state_path=str(path))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Evolution(importances, params).run(ended)
    resumed = Evolution(importances, params)
    assert resumed.run(ended) == found
    assert resumed.history == whole.history
    assert judged == 42  # two of them in vain
    # A finished search is not repeated.
    assert Evolution(importances, params).run(ended) == found
    assert judged == 42
    with pytest.raises(ValueError, match="belongs to a search of other filters or parameters"):
        Evolution(importances[:1], params).run(judge)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no state of a search"):
        Evolution(importances, params).run(judge)


def pruning(**more: Any) -> Any:
    params = {
        "interlayer_ranking_type": "learned_ranking",
        "prune_first_conv": True,
        "legr_params": {"generations": 6, "train_steps": 1, "population_size": 3, "num_samples": 2},
        **more,
    }
    return {
        "input_info": {"sample_size": [2, 1, 8, 8]},
        "compression": {"algorithm": "filter_pruning", "pruning_init": 0.4, "params": params},
    }


def test_the_model_is_ranked_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ranking.json"
    config = register_default_init_args(
        pruning(save_ranking_coeffs_path=str(path)), loader(), criterion=nn.CrossEntropyLoss()
    )
    model = make_model(width=24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    controller, model = create_compressed_model(model, config)
    assert len(controller.coefficients) == len(controller.clusters)
    for name, value in before.items():
        module, _, attribute = name.rpartition(".")
        layer = model.get_submodule(module)
        chains = getattr(layer, "parametrizations", {})
        own = chains[attribute].original if attribute in chains else getattr(layer, attribute)
        assert torch.equal(own, value), name  # the search has trained a copy of these values
    assert len(json.loads(path.read_text())) == len(controller.clusters)
    # The file serves the next run, which needs neither data nor a search.
    loaded, _ = create_compressed_model(make_model(width=24), pruning(load_ranking_coeffs_path=str(path)))
    assert loaded.coefficients == controller.coefficients
    assert_same_state(dict(loaded.masks()), dict(controller.masks()), "masks")
    # So does the saved state.
    state = controller.get_compression_state()
    resumed, _ = create_compressed_model(make_model(width=24), config, state)
    assert resumed.coefficients == controller.coefficients


def test_it_needs_a_criterion() -> None:
    with pytest.raises(ValueError, match="criterion"):
        create_compressed_model(make_model(width=24), register_default_init_args(pruning(), loader()))
