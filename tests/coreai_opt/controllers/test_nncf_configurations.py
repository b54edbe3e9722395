"""Configurations in the shape of NNCF's samples: they load, build, train and strip."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from coreai_opt.controllers import ControllerConfig, create_compressed_model, register_default_init_args
from coreai_opt.controllers.core.config import without_comments

from .support import batch, loader, make_model

FILES = sorted((Path(__file__).parent / "nncf_configurations").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="are ignored: .'model', 'batch_size', 'epochs', 'optimizer'"):
        config = ControllerConfig.from_json(path)
    config = register_default_init_args(config, loader(), criterion=torch.nn.CrossEntropyLoss())
    controller, model = create_compressed_model(make_model(width=16), config)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for epoch in range(3):
        controller.scheduler.epoch_step()
        for step in range(3):
            controller.scheduler.step()
            x, y = batch(3 * epoch + step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) + controller.loss()
            loss.backward()
            optimizer.step()
            assert bool(loss.isfinite())
    model.eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(controller.strip()(x), model(x), rtol=1e-3, atol=1e-4)
    assert controller.statistics().to_str()
    assert controller.plan(4, 3).to_str()


def test_there_are_twelve() -> None:
    assert len(FILES) == 12


def test_what_is_configured_is_what_is_built() -> None:
    def built(name: str) -> object:
        path = next(path for path in FILES if path.stem == name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = register_default_init_args(path, loader(), criterion=torch.nn.CrossEntropyLoss())
            return create_compressed_model(make_model(width=16), config)[0]

    mixed = built("int8_mixed_preset_with_scopes")
    assert {name: each.n_bits for name, each in mixed.weights.items()} == {"stem": 8, "inner": 4}
    assert [each.name for each in mixed.statistics().quantization.left_whole] == ["unified_scale_ops"]
    manual = built("int4_manual_precision")
    assert {name: each.n_bits for name, each in manual.weights.items()} == {"stem": 8, "inner": 4, "head": 6}
    assert manual.activations["head"].n_bits == 8
    assert "output_quantizers.0" in manual.activations
    movement = built("movement_sparsity")
    assert movement._masks["head"].factors == (2, 2)
    assert built("magnitude_multistep").level == 0.1


def test_comments_and_trailing_commas() -> None:
    text = '{"a": "x // no comment /* nor this */", // one\n "b": [1, 2, /* two */ ], }'
    assert json.loads(without_comments(text)) == {"a": "x // no comment /* nor this */", "b": [1, 2]}
    assert json.loads(without_comments('{"a\\\\": "\\"//", "b": 1, // c\n}')) == {"a\\": '"//', "b": 1}


def test_a_misspelled_root_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="Did you mean 'compression'"):
        ControllerConfig.from_dict({"compresion": {"algorithm": "const_sparsity"}})


def test_both_targets_of_pruning_are_an_error() -> None:
    params = {"pruning_target": 0.5, "pruning_flops_target": 0.5}
    filters = {"algorithm": "filter_pruning", "params": params}
    with pytest.raises(ValueError, match="exclude each other"):
        create_compressed_model(make_model(), {"compression": filters})


def test_scopes_of_operations_and_unknown_ones() -> None:
    sparse = {"algorithm": "magnitude_sparsity"}
    operation = {**sparse, "ignored_scopes": ["Net/__add___0", "{re}.*relu_0"]}
    controller, _ = create_compressed_model(make_model(), {"compression": operation})
    assert len(controller.masks()) == 3
    with pytest.raises(ValueError, match="matches no module"):
        create_compressed_model(make_model(), {"compression": {**sparse, "ignored_scopes": ["nowhere"]}})
    unchecked = {**sparse, "ignored_scopes": ["nowhere"], "validate_scopes": False}
    create_compressed_model(make_model(), {"compression": unchecked})
