"""States and the end of a quantizer's life, call by call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer
from coreai_opt.quantization.config import QATSchedule

from .quantizer_configs import eager
from .quantizer_models import Model, X, prepared, switched

__all__ = ["STATES"]


def saved() -> dict[str, Any]:
    """The state of a calibrated model, saved while it observes and does not simulate."""
    torch.manual_seed(0)
    quantizer = prepared()
    with quantizer.calibration_mode():
        quantizer.model(torch.randn(3, 4))
        return {name: value.clone() for name, value in quantizer.model.state_dict().items()}


def prepared_with(change: Callable[[dict[str, Any]], Any]) -> Any:
    """What prepare makes of a state, into other weights and with inputs of zeros."""
    state = saved()
    change(state)
    torch.manual_seed(1)
    quantizer = Quantizer(Model(), eager())
    model = quantizer.prepare((torch.zeros(3, 4),), state_dict=state)
    quantizer.model = model  # type: ignore[attr-defined]
    return dict(model.state_dict()), switched(quantizer), model.eval()(X)


def without(part: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return change


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def finalized(make: Callable[[], nn.Module], **fields: Any) -> Any:
    model = make()
    parameters = dict(model.named_parameters())
    quantizer = prepared(eager(global_config=ModuleQuantizerConfig(**fields)), model)
    torch.manual_seed(3)
    expected = model.eval()(X)
    model.train()
    found = quantizer.finalize(backend="torch")
    same = {
        name: getattr(found.get_submodule(name.rpartition(".")[0]), "weight", None) is value
        for name, value in parameters.items()
        if name.endswith("weight")
    }
    training = [each.training for each in found.modules()]
    return dict(found.state_dict()), same, training, expected, found.eval()(X)


def afterwards(action: Callable[[Any], Any]) -> Any:
    quantizer = prepared()
    quantizer.finalize(backend="torch")
    return action(quantizer)


def enter(mode: str) -> Callable[[Any], Any]:
    return lambda quantizer: getattr(quantizer, mode)().__enter__()


def mark() -> Any:
    quantizer = prepared()
    buffer = quantizer.model._coreai_opt_prepared
    found = buffer.dtype, tuple(buffer.shape), "_coreai_opt_prepared" in quantizer.model.state_dict()
    quantizer.finalize(backend="torch")
    return found, hasattr(quantizer.model, "_coreai_opt_prepared")


WEIGHTS = {"op_input_spec": None, "op_output_spec": None}

STATES: dict[str, Callable[[], Any]] = {
    "prepare with a state": lambda: prepared_with(lambda state: None),
    "prepare with a key less": lambda: prepared_with(without("running_min")),
    "prepare with a key more": lambda: prepared_with(lambda state: state.update(x=torch.zeros(1))),
    "prepare with another shape": lambda: prepared_with(
        lambda state: state.update({"layer.bias": torch.zeros(5)})
    ),
    "prepare with a float model's state": lambda: prepared_with(without("quantize")),
    "prepare with a state by position": lambda: Quantizer(Model(), eager()).prepare((X,), None, True, {}),
    "prepare with a number": lambda: Quantizer(Model(), eager()).prepare((X,), state_dict=3),
    "finalize": lambda: finalized(Model),
    "finalize weights": lambda: finalized(Model, **WEIGHTS),
    "finalize a tie": lambda: finalized(Tied, **WEIGHTS),
    "calibration after finalize": lambda: afterwards(enter("calibration_mode")),
    "training after finalize": lambda: afterwards(enter("training_mode")),
    "step after finalize": lambda: afterwards(lambda quantizer: quantizer.step()),
    "mark": mark,
    **{
        f"{name} under a schedule": lambda name=name: getattr(
            prepared(
                eager(global_config=ModuleQuantizerConfig(qat_schedule=QATSchedule(enable_fake_quant=3)))
            ),
            name,
        )()
        for name in ("enable_observer", "disable_observer", "enable_fake_quant", "disable_fake_quant")
    },
}
