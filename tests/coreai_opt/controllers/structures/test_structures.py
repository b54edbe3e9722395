"""Attention heads and feed-forward dimensions: found, masked whole, removed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.controllers import create_compressed_model
from coreai_opt.controllers.algorithms.movement_masks import kept_units, resolve
from coreai_opt.controllers.structures.units import Structure, find_structures

from ..support import (
    RefuseWaits,
    Run,
    Transformer,
    batch,
    check_compiles,
    check_no_waits,
    configured,
    make_transformer,
)

HEADS = Structure(4, ("attention.query", "attention.key", "attention.value"), ("attention.output",), True)
FORWARD = Structure(12, ("gate", "up"), ("down",), True)
SHARED = [
    {"mode": "block", "sparse_factors": [2, 4], "target_scopes": "{re}query|key|value"},
    {"mode": "per_dim", "axis": 1, "target_scopes": ["attention.output", "down"]},
    {"mode": "per_dim", "axis": 0, "target_scopes": ["gate", "up"]},
]
PARAMS = {"warmup_start_epoch": 0, "warmup_end_epoch": 2, "importance_regularization_factor": 0.5}


def movement(structure: Any = (), **params: Any) -> dict[str, Any]:
    return {
        "algorithm": "movement_sparsity",
        "params": {**PARAMS, **params},
        "sparse_structure_by_scopes": list(structure),
    }


def linears(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def found_in(model: nn.Module, *args: Tensor) -> list[Structure]:
    return find_structures(model, args, {}, linears(model))


def test_heads_and_feed_forward_dimensions_are_found() -> None:
    assert found_in(Transformer(), torch.randn(2, 1, 8, 8)) == [HEADS, FORWARD]


def test_a_number_of_heads_that_is_written_down_stays() -> None:
    heads, forward = found_in(Transformer(heads=4), torch.randn(2, 1, 8, 8))
    assert (heads.units, heads.removable, forward.removable) == (4, False, True)


def test_a_layer_that_is_left_out_leaves_its_structure_out() -> None:
    model = Transformer()
    found = find_structures(model, (torch.randn(2, 1, 8, 8),), {}, linears(model) - {"attention.key"})
    assert found == [FORWARD]


class Mixing(nn.Module):
    """Features that something else looks at."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(8, 8), nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.how == "softmax":
            return self.second(y.softmax(-1))
        if self.how == "output":
            return self.second(y.relu()), y
        if self.how == "twice":
            return self.second(self.first(y))
        if self.how == "tied":
            return self.second(y.relu()) @ self.first.weight
        if self.how == "sum":
            return self.second(y + x)
        if self.how == "tokens":
            return self.second(y.transpose(1, 2))
        if self.how == "halves":
            a, b = y.chunk(2, -1)
            return self.second(torch.cat([b, a], -1))
        if self.how == "split":
            return self.second(y.view(*y.shape[:2], 2, 4).transpose(2, 3).flatten(2))
        return self.second(y.tanh())


@pytest.mark.parametrize("how", ["softmax", "output", "twice", "tied", "tokens", "halves", "split"])
def test_features_that_are_not_treated_alike_are_no_units(how: str) -> None:
    assert found_in(Mixing(how), torch.randn(2, 8, 8)) == []


def test_features_that_are_added_to_something_fixed_are_masked_and_stay() -> None:
    (structure,) = found_in(Mixing("sum"), torch.randn(2, 8, 8))
    assert structure == Structure(8, ("first",), ("second",), removable=False)
    (structure,) = found_in(Mixing("tanh"), torch.randn(2, 8, 8))
    assert structure.removable


def test_layers_in_a_row_share_rows_and_columns() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    assert found_in(model, torch.randn(3, 4)) == [
        Structure(6, ("0",), ("2",), True),
        Structure(5, ("2",), ("4",), True),
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    )
    model = transformers.BertModel(config)
    model.set_attn_implementation(attention)
    tokens = torch.randint(50, (2, 6))
    found = found_in(model, tokens)
    assert [(each.units, len(each.rows), len(each.columns)) for each in found] == [(4, 3, 1), (24, 1, 1)] * 2
    assert all(each.removable for each in found)

    compression = movement(
        [
            {"mode": "per_dim", "axis": 0, "target_scopes": "{re}query|key|value|intermediate"},
            {"mode": "per_dim", "axis": 1, "target_scopes": "{re}output.dense"},
        ],
        steps_per_epoch=1,
    )
    config = {
        "input_info": {"sample_size": [2, 6], "type": "long", "filler": "zeros"},
        "compression": {**compression, "ignored_scopes": ["pooler"]},
    }
    controller, model = create_compressed_model(model.eval(), config)
    keep_some(controller)
    stripped = controller.strip()
    assert stripped.encoder.layer[1].intermediate.dense.out_features == 16
    assert stripped.encoder.layer[0].attention.self.query.out_features == 12
    expected = model(tokens).last_hidden_state
    torch.testing.assert_close(stripped(tokens).last_hidden_state, expected, rtol=1e-5, atol=1e-6)


def test_heads_that_share_keys_are_one_unit() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
    )
    model = transformers.LlamaModel(config)
    model.set_attn_implementation("eager")
    heads, forward = find_structures(
        model, (torch.randint(50, (2, 6)),), {"use_cache": False}, linears(model)
    )
    assert (heads.units, len(heads.rows), heads.removable) == (2, 3, False)
    assert (forward.units, len(forward.rows), forward.removable) == (24, 2, True)


def keep_some(controller: Any) -> None:
    """Scores of which a third of each structure's units is below the threshold; then the warm-up's end."""
    with torch.no_grad():
        for structure in controller.structures:
            kept = (torch.arange(structure.units) % 3 != 1).float() - 0.5
            for axis, names in enumerate((structure.rows, structure.columns)):
                for name in names:
                    scores = controller._masks[name].scores
                    size = scores.shape[axis] // structure.units
                    along = kept[:, None].expand(-1, size).reshape(-1)
                    scores.copy_(along[:, None] if axis == 0 else along)
    controller.scheduler.epoch_step(5)


def test_a_unit_goes_if_no_layer_keeps_any_of_it_and_is_filled_if_one_does() -> None:
    masks = {name: torch.zeros(16, 8, dtype=torch.bool) for name in HEADS.rows}
    masks["attention.output"] = torch.zeros(8, 16, dtype=torch.bool)
    masks["classify"] = torch.rand(10, 8) > 0.5
    masks["attention.key"][5, 3] = True  # the second head
    masks["attention.output"][0, 12] = True  # the fourth
    assert kept_units(HEADS, masks).tolist() == [False, True, False, True]
    resolved = resolve([HEADS], masks)
    of_rows = torch.tensor([0, 1, 0, 1]).repeat_interleave(4).bool()
    for name in HEADS.rows:
        assert torch.equal(resolved[name], of_rows[:, None].expand(16, 8))
    assert torch.equal(resolved["attention.output"], of_rows.expand(8, 16))
    assert torch.equal(resolved["classify"], masks["classify"])
    assert int(masks["attention.query"].sum()) == 0


def test_rows_and_columns_of_one_layer_are_resolved_together() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 5))
    structures = found_in(model, torch.randn(1, 4))
    masks = {"0": torch.zeros(3, 4), "1": torch.zeros(2, 3), "2": torch.zeros(5, 2)}
    masks = {name: mask.bool() for name, mask in masks.items()}
    masks["0"][:2] = masks["2"][:, 1] = True
    resolved = resolve(structures, masks)
    assert resolved["1"].tolist() == [[False] * 3, [True, True, False]]


@pytest.mark.parametrize("heads", [-1, 4])
@pytest.mark.parametrize("copy", [True, False])
def test_strip_removes_masked_units(heads: int, copy: bool) -> None:
    controller, model = create_compressed_model(make_transformer(heads=heads), configured(movement(SHARED)))
    keep_some(controller)
    assert 0 < controller.compression_rate < 1
    x, _ = batch(0)
    expected = model.eval()(x)
    parameters = sum(each.numel() for each in make_transformer().parameters())
    stripped = controller.strip(do_copy=copy)
    torch.testing.assert_close(stripped(x), expected, rtol=1e-5, atol=1e-6)
    attention = stripped.attention
    left = 12 if heads == -1 else 16
    assert attention.query.weight.shape == (left, 8)
    assert attention.value.bias.shape == (left,)
    assert (attention.output.in_features, attention.output.weight.shape) == (left, (8, left))
    assert stripped.gate.out_features == stripped.up.weight.shape[0] == stripped.down.in_features == 8
    assert sum(each.numel() for each in stripped.parameters()) < parameters
    assert set(stripped.state_dict()) == set(make_transformer().state_dict())


def test_one_unit_is_left() -> None:
    controller, model = create_compressed_model(make_transformer(), configured(movement(SHARED)))
    with torch.no_grad():
        for mask in controller._masks.values():
            mask.scores.fill_(-1)
    controller.scheduler.epoch_step(5)
    x, _ = batch(0)
    stripped = controller.strip()
    assert stripped.attention.query.out_features == 4
    assert stripped.gate.out_features == 1
    assert torch.equal(stripped(x), model(x))


def test_training_ends_with_whole_units() -> None:
    run = Run(configured(movement(SHARED, init_importance_threshold=-0.01)), make=make_transformer)
    run.train()
    masks = run.controller.masks()
    (heads, forward), counts = run.controller.structures, []
    for structure in (heads, forward):
        kept = kept_units(structure, {name: mask.bool() for name, mask in masks.items()})
        counts.append(int(kept.sum()))
        for name in structure.rows:
            rows = masks[name].reshape(structure.units, -1)
            assert torch.equal(rows, kept.float()[:, None].expand_as(rows))
    records = run.controller.statistics().to_dict()["movement_sparsity"]["structures"]
    assert [(each["units"], each["units"] - each["masked"]) for each in records] == [
        (4, counts[0]),
        (12, counts[1]),
    ]
    assert 0 < counts[1] < 12
    assert "attention.query, attention.key" in run.controller.statistics().to_str().replace("\n", " ")


def test_without_structured_masking_elements_stay_masked() -> None:
    config = configured(movement(enable_structured_masking=False))
    controller, _ = create_compressed_model(make_transformer(), config)
    with torch.no_grad():
        for mask in controller._masks.values():
            mask.scores.normal_()
    controller.scheduler.epoch_step(5)
    assert controller.structures == ()
    for name, mask in controller._masks.items():
        assert torch.equal(controller.masks()[name], (mask.scores > 0).float())
    assert controller.strip().gate.out_features == 12


def test_scores_are_shared_as_configured() -> None:
    controller, model = create_compressed_model(make_transformer(), configured(movement(SHARED)))
    shapes = {name: tuple(mask.scores.shape) for name, mask in controller._masks.items()}
    assert shapes["attention.query"] == (8, 2)
    assert shapes["attention.output"] == (1, 16)
    assert shapes["up"] == (12, 1)
    assert shapes["classify"] == (10, 8)

    controller.scheduler.epoch_step(0)
    mask = controller._masks["attention.query"]
    with torch.no_grad():
        mask.scores.normal_()
        mask.threshold.fill_(0.0)
    weight = model.attention.query.parametrizations.weight.original
    grad = torch.randn_like(weight)
    model.attention.query.weight.backward(grad)
    blocks = (grad * weight.detach()).view(8, 2, 2, 4).sum((1, 3))
    torch.testing.assert_close(mask.scores.grad, blocks)
    whole = F.interpolate(mask.scores.detach()[None, None], scale_factor=(2, 4))[0, 0] > 0
    assert torch.equal(controller.masks()["attention.query"], whole)
    torch.testing.assert_close(weight.grad, grad * whole)


def test_the_loss_counts_elements() -> None:
    controller, _ = create_compressed_model(make_transformer(), configured(movement(SHARED)))
    controller.scheduler.epoch_step(1)
    with torch.no_grad():
        for mask in controller._masks.values():
            mask.scores.normal_()
    expected = torch.cat(
        [
            (
                mask.scores.sigmoid()[:, None, :, None] * torch.ones(1, mask.factors[0], 1, mask.factors[1])
            ).flatten()
            for mask in controller._masks.values()
        ]
    ).mean()
    assert float(controller.loss().detach()) == pytest.approx(0.5 * 0.5 * float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"mode": "block", "target_scopes": "up"}, "sparse_factors belongs to mode 'block'"),
        ({"mode": "fine", "axis": 0, "target_scopes": "up"}, "axis belongs to mode 'per_dim'"),
        (
            {"mode": "block", "sparse_factors": [5, 2], "target_scopes": "up"},
            "5 x 2 do not divide .*'up', 12 x 8",
        ),
        ({"mode": "block", "sparse_factors": [0, 2], "target_scopes": "up"}, "must be positive"),
        ({"mode": "fine", "target_scopes": "upp"}, "Did you mean 'up'"),
        ({"mode": "row", "target_scopes": "up"}, "fine"),
        ({"mode": "fine", "target_scopes": "{re}down"}, "more than one entry for 'down'"),
    ],
)
def test_bad_structures_are_named(structure: dict[str, Any], message: str) -> None:
    model = make_transformer()
    with pytest.raises(ValueError, match=message):
        create_compressed_model(model, configured(movement([structure, SHARED[1]])))
    assert set(model.state_dict()) == set(make_transformer().state_dict())


def test_nothing_to_share_is_said_where_it_was_asked_for() -> None:
    asked = movement(enable_structured_masking=True)
    with pytest.raises(ValueError, match="finds no attention heads or feed-forward dimensions"):
        create_compressed_model(nn.Linear(8, 8), configured(asked))
    with pytest.raises(ValueError, match=r"give input_info .* or set enable_structured_masking to false"):
        create_compressed_model(make_transformer(), {"compression": asked})

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.sum()) > 0 else x

    with pytest.raises(ValueError, match=r"torch.export fails for it .* enable_structured_masking to false"):
        create_compressed_model(Branching(), configured(movement()))
    create_compressed_model(Branching(), configured(movement(enable_structured_masking=False)))


def test_with_quantization_and_export(tmp_path: Any) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    import onnxruntime

    algorithms = (movement(SHARED), {"algorithm": "quantization", "weights": {"mode": "symmetric"}})
    controller, model = create_compressed_model(make_transformer(), configured(*algorithms))
    keep_some(controller.child_ctrls[0])
    x, _ = batch(0)
    x = x[:2]
    expected = model.eval()(x)
    stripped = controller.strip()
    assert stripped.gate.out_features == 8
    torch.testing.assert_close(stripped(x), expected, rtol=1e-3, atol=1e-3)
    controller.export_model(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0.02, atol=0.02)


def test_nothing_waits_and_it_compiles() -> None:
    config = configured(movement(SHARED))
    check_no_waits(config, make_transformer)
    check_compiles(config, make_transformer)
    run = Run(config, make=make_transformer)
    with RefuseWaits():
        run.controller.scheduler.epoch_step(5)  # the resolution
