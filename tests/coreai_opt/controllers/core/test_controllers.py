"""The interface: creation, configuration, stages, states, composition."""

import inspect
import io
import json
from functools import partial
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from coreai_opt.controllers import (
    CompressionAlgorithmController,
    CompressionStage,
    ControllerConfig,
    create_compressed_model,
    register_default_init_args,
)
from coreai_opt.controllers.core.base import BaseCompressionAlgorithmController
from coreai_opt.controllers.core.state import check_plain

from ..support import Run, check_compiles, check_no_waits, configured, loader, make_model

MAGNITUDE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.2}
MSE = {"algorithm": "knowledge_distillation", "type": "mse"}


def create(*algorithms: dict[str, Any]) -> tuple[Any, Any]:
    return create_compressed_model(make_model(), configured(*algorithms))


def test_stages_combine() -> None:
    none, some, full = CompressionStage
    assert none < some < full
    assert (none + none, full + full, none + full) == (none, full, some)
    assert CompressionStage.combine([]) is none
    assert CompressionStage.combine([full, full]) is full
    assert CompressionStage.combine([full, none]) is some


def test_the_controller_has_the_interface_of_2_x() -> None:
    members = {
        "loss", "scheduler", "name", "compression_rate", "maximal_compression_rate", "compression_stage",
        "statistics", "export_model", "prepare_for_export", "strip", "disable_scheduler", "model",
        "set_builder_state_with_name", "load_state", "get_state", "get_compression_state", "distributed",
    }  # fmt: skip
    assert members <= set(dir(CompressionAlgorithmController))
    assert inspect.isabstract(CompressionAlgorithmController)
    assert inspect.isabstract(BaseCompressionAlgorithmController)
    export = inspect.signature(CompressionAlgorithmController.export_model).parameters
    assert list(export)[1:] == ["save_path", "save_format", "input_names", "output_names", "model_args"]
    assert list(inspect.signature(BaseCompressionAlgorithmController).parameters) == ["target_model"]


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_a_configuration_file(tmp_path: Any, suffix: str) -> None:
    config = {"input_info": {"sample_size": [1, 1, 8, 8]}, "compression": MAGNITUDE}
    path = tmp_path / f"config.{suffix}"
    path.write_text(json.dumps(config) if suffix == "json" else yaml.safe_dump(config))
    controller, _ = create_compressed_model(make_model(), path)
    assert controller.name == "magnitude_sparsity"
    assert controller.compression_rate == 0.2


def test_other_files_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"\.json, \.yaml or \.yml"):
        create_compressed_model(make_model(), tmp_path / "config.toml")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        create_compressed_model(make_model(), tmp_path / "list.json")
    with pytest.raises(TypeError, match="got a int"):
        create_compressed_model(make_model(), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"compresion": MAGNITUDE}, r"unknown key 'compresion'. Did you mean 'compression'"),
        ({"compression": {**MAGNITUDE, "sparsity_intit": 0.1}}, r"Did you mean 'sparsity_init'"),
        (
            {"compression": {**MAGNITUDE, "params": {"sparsity_targt": 0.1}}},
            r"Did you mean 'sparsity_target'",
        ),
        ({"compression": {"algorithm": "magnitud_sparsity"}}, r"Did you mean 'magnitude_sparsity'"),
        ({"compression": {"sparsity_init": 0.1}}, r"lacks 'algorithm'"),
        ({}, r"names no algorithm"),
        ({"compression": [MAGNITUDE, MAGNITUDE]}, r"more than once: \['magnitude_sparsity'\]"),
        ({"compression": {**MAGNITUDE, "sparsity_init": 1.5}}, r"sparsity_init"),
        ({"compression": {**MAGNITUDE, "ignored_scopes": ["innr"]}}, r"Did you mean 'inner'"),
        ({"compression": {**MAGNITUDE, "target_scopes": ["norm"]}}, r"finds no layer"),
    ],
)
def test_a_wrong_configuration_is_explained(config: dict[str, Any], message: str) -> None:
    model = make_model()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        create_compressed_model(model, config)
    assert list(model.state_dict()) == names
    create_compressed_model(model, configured(MAGNITUDE))


def test_a_model_is_compressed_once() -> None:
    controller, model = create(MAGNITUDE)
    with pytest.raises(RuntimeError, match=r"compressed already, by \['magnitude_sparsity'\]"):
        create_compressed_model(model, configured(MAGNITUDE))
    create_compressed_model(controller.strip(), configured(MAGNITUDE))
    with pytest.raises(TypeError, match=r"torch.nn.Module; got a str"):
        create_compressed_model("model", configured(MAGNITUDE))  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["head", "Net/Linear[head]", "{re}^he"])
def test_scopes(scope: str) -> None:
    ignoring, _ = create({**MAGNITUDE, "ignored_scopes": scope})
    assert sorted(ignoring.masks()) == ["inner", "stem"]
    aiming, _ = create({**MAGNITUDE, "target_scopes": [scope]})
    assert list(aiming.masks()) == ["head"]


def test_a_scope_covers_what_is_inside() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    controller, _ = create_compressed_model(model, configured({**MAGNITUDE, "ignored_scopes": ["0"]}))
    assert list(controller.masks()) == ["1"]


def test_the_state_is_plain() -> None:
    controller, _ = create(MAGNITUDE, MSE)
    controller.scheduler.epoch_step()
    stream = io.BytesIO()
    torch.save(controller.get_compression_state(), stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    assert set(loaded) == {"builder_state", "ctrl_state"}
    for name in ("magnitude_sparsity", "knowledge_distillation"):
        assert {"loss_state", "scheduler_state", "compression_stage"} <= set(loaded["ctrl_state"][name])
        assert type(loaded["ctrl_state"][name]["compression_stage"]) is int
    with pytest.raises(TypeError, match=r"state\['stage'\] is a CompressionStage"):
        check_plain({"stage": CompressionStage.UNCOMPRESSED})


def test_the_builder_state_has_to_be_set() -> None:
    controller, model = create(MAGNITUDE)
    bare = type(controller)(model, controller.config)
    with pytest.raises(RuntimeError, match="no name"):
        bare.get_state()
    with pytest.raises(RuntimeError, match="builder's state is not known"):
        bare.get_compression_state()
    bare.set_builder_state_with_name("magnitude_sparsity", {})
    assert bare.get_compression_state()["builder_state"] == {"magnitude_sparsity": {}}


def test_states_of_others_are_ignored() -> None:
    controller, _ = create(MAGNITUDE)
    before = controller.get_state()
    controller.load_state({"quantization": {"nothing": 1}})
    assert controller.get_state() == before
    with pytest.raises(KeyError, match=r"the state of magnitude_sparsity lacks"):
        controller.load_state({"magnitude_sparsity": {}})


def test_the_composite_sums_steps_and_combines() -> None:
    controller, model = create(MAGNITUDE, MSE)
    assert [child.name for child in controller.child_ctrls] == [
        "knowledge_distillation",
        "magnitude_sparsity",
    ]
    assert controller.compression_rate == 0.2
    controller.compression_rate = 0.3
    assert controller.child_ctrls[1].compression_rate == 0.3
    assert controller.maximal_compression_rate == 1.0
    assert controller.compression_stage() is CompressionStage.PARTIALLY_COMPRESSED
    controller.scheduler.epoch_step()
    controller.scheduler.step(5)
    assert [child.scheduler.current_step for child in controller.child_ctrls] == [5, 5]
    model.train()(torch.randn(2, 1, 8, 8))
    expected = sum(child.loss() for child in controller.child_ctrls)
    assert float(controller.loss().detach()) == float(expected.detach()) > 0
    assert set(controller.statistics().to_dict()) == {"magnitude_sparsity", "knowledge_distillation"}


def test_a_rate_that_cannot_be_set_says_so() -> None:
    controller, _ = create(MSE)
    with pytest.raises(NotImplementedError, match=r"knowledge_distillation.*cannot be set"):
        controller.compression_rate = 0.5
    sparse, _ = create(MAGNITUDE)
    with pytest.raises(ValueError, match=r"in \[0, 1\]; got 1.5"):
        sparse.compression_rate = 1.5


def test_the_default_loss_is_a_tensor() -> None:
    controller, _ = create(MAGNITUDE)
    assert isinstance(controller.loss(), torch.Tensor)
    assert controller.loss().shape == ()


@pytest.mark.parametrize("algorithms", [(MAGNITUDE,), (MAGNITUDE, MSE)])
def test_a_disabled_scheduler_counts_and_holds(algorithms: Any) -> None:
    config = configured(*algorithms)
    run = Run(config)
    run.train(2)
    rate = run.controller.compression_rate
    run.controller.disable_scheduler()
    assert run.controller.scheduler.current_step == 1
    run.train(7)
    assert run.controller.scheduler.current_step == 6
    assert run.controller.scheduler.current_epoch == 2
    assert run.controller.compression_rate == rate
    resumed = Run.resumed(config, run.save())
    resumed.train(9)
    assert resumed.controller.compression_rate == rate
    assert resumed.controller.scheduler.current_step == 8


PRUNED = {"algorithm": "filter_pruning", "pruning_init": 0.4, "params": {"prune_first_conv": True}}
RANDOM = {
    "algorithm": "rb_sparsity",
    "params": {"schedule": "exponential", "update_per_optimizer_step": True},
}
INT8 = {"algorithm": "quantization", "preset": "mixed"}


@pytest.mark.parametrize(
    "algorithms", [(PRUNED, INT8, MSE), (RANDOM, {**INT8, "learnable_ranges": True}, MSE)]
)
def test_several_neither_wait_nor_break_the_graph(algorithms: Any) -> None:
    make = partial(make_model, width=24)
    check_no_waits(configured(*algorithms), make)
    check_compiles(configured(*algorithms), make)


def test_a_changed_configuration_is_noticed_on_resuming() -> None:
    run = Run(configured({**MAGNITUDE, "params": {"sparsity_target": 0.2}}))
    state = run.controller.get_compression_state()
    with pytest.warns(UserWarning, match="saved FULLY_COMPRESSED and is PARTIALLY_COMPRESSED"):
        create_compressed_model(make_model(), configured(MAGNITUDE), state)


def test_statistics_are_tables_and_data() -> None:
    controller, _ = create(MAGNITUDE)
    text = controller.statistics().to_str()
    assert "sparsity of masked weights" in text
    assert "| inner " in text
    data = controller.statistics().to_dict()["magnitude_sparsity"]
    assert data["sparsity_of_masked_weights"] == pytest.approx(0.2, abs=1e-3)
    assert [layer["name"] for layer in data["layers"]] == ["stem", "inner", "head"]
    json.dumps(data)


def test_steps_per_epoch_come_from_the_loader() -> None:
    config = register_default_init_args(
        {"compression": {**MAGNITUDE, "params": {"update_per_optimizer_step": True}}}, loader()
    )
    assert isinstance(config, ControllerConfig)
    controller, _ = create_compressed_model(make_model(), config)
    controller.scheduler.epoch_step()
    controller.scheduler.step()


def test_a_dummy_forward_gives_the_inputs() -> None:
    seen = []

    def forward(model: nn.Module) -> None:
        seen.append(model)
        model(x=torch.zeros(2, 1, 8, 8))

    model = make_model(width=16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    controller, model = create_compressed_model(model, {"compression": PRUNED}, dummy_forward_fn=forward)
    assert seen == [model]
    assert controller.example_inputs()[1]["x"].shape == (2, 1, 8, 8)
    assert not model._forward_pre_hooks
    assert torch.equal(model.norm.running_mean, state["norm.running_mean"])
    with pytest.raises(ValueError, match="dummy_forward_fn must call the model"):
        create_compressed_model(make_model(), {"compression": PRUNED}, dummy_forward_fn=lambda model: None)


def test_the_models_mode_stays() -> None:
    for training in (True, False):
        _, model = create_compressed_model(make_model().train(training), configured(MAGNITUDE))
        assert model.training is training


@pytest.mark.parametrize("algorithm", ["magnitude_sparsity", "rb_sparsity"])
def test_a_misspelt_schedule_leaves_the_model_as_it_was(algorithm):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"algorithm": algorithm, "params": {"schedule": "polynom"}}
    config = {"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": settings}
    with pytest.raises(ValueError, match="Did you mean 'polynomial'"):
        create_compressed_model(model, config)
    assert type(model[0]) is torch.nn.Conv2d
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    settings["params"]["schedule"] = "exponential"
    create_compressed_model(model, config)
