"""Takes whole models through graph mode, from prepare to finalize, and writes down what is seen.

Public names only: the same file runs on both packages.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from coreai_opt import ExportBackend
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

from .graph_calls import call, quantizer_as_upstream
from .graph_models import MODELS
from .graph_probes import PROBES as NAMED_PROBES
from .graph_random import SEEDS, random_probe
from .quantizer_runs import quiet
from .snapshots import Raised, freeze

__all__ = ["CONFIGS", "MODELS", "PROBES", "RUNS", "answer", "places", "prepared", "run"]

STEPS, CALIBRATION_BATCHES = 5, 2
PROBES = NAMED_PROBES | {f"random {seed}": partial(random_probe, seed) for seed in SEEDS}


def _mixed() -> QuantizerConfig:
    """All kinds of specifications: asymmetric activations, clipped weights in channels, blocks by type."""
    activation = QuantizationSpec(dtype="uint8", qscheme="asymmetric", qparam_calculator_cls="global_minmax")
    weight = QuantizationSpec(
        dtype="int4", qscheme="symmetric_with_clipping", granularity=PerChannelGranularity()
    )
    blocks = QuantizationSpec(dtype="int4", granularity=PerBlockGranularity(block_size=2))
    linear = ModuleQuantizerConfig(op_state_spec={"weight": blocks})
    return QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_output_spec={"*": activation}, op_state_spec={"weight": weight}
        ),
        module_type_configs={nn.Linear: linear},
    )


# Apple's package leaves dropouts of attention on in evaluation: ours does with `strict_upstream`.
UPSTREAM = ("zoo encoder",)
CONFIGS: dict[str, Callable[[], QuantizerConfig]] = {"default": QuantizerConfig, "mixed": _mixed}
RUNS = (
    *((model, "default") for model in MODELS),
    *((model, "mixed") for model in ("residual", "unet", "vit", "tied", "shared")),
)


def simulators(model: nn.Module) -> dict[str, FakeQuantizeImplBase]:
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, FakeQuantizeImplBase)}


def places(model: GraphModule) -> dict[str, Any]:
    """Each quantizer in the graph: on which tensor, for which readers, what it is, and which of them are one.

    Nodes are named without their number: that counts how often the graph was rewritten.
    """
    found, first = {}, {}
    named = simulators(model)
    for node in model.graph.nodes:
        quantizer = named.get(str(node.target)) if node.op == "call_module" else None
        if quantizer is not None:
            found[str(node.target)] = {
                "is": first.setdefault(id(quantizer), node.target),
                "reads": _plain(node.args[0].name),
                "for": [_plain(user.name) for user in node.users],
                "tensor": quantizer.tensor_fqn,
                "target": str(quantizer.quantization_target),
                "dtype": str(quantizer.dtype),
                "scheme": str(quantizer.qscheme),
                "formulation": str(quantizer.qformulation),
                "granularity": (
                    type(quantizer.granularity).__name__,
                    quantizer.granularity.axis,
                    getattr(quantizer.granularity, "block_size", None),
                ),
                "float_range": list(quantizer.qparams_calculator.float_range),
                "calculator": type(quantizer.qparams_calculator).__name__,
                "limits": (quantizer.quant_min, quantizer.quant_max),
            }
    return found


def _plain(name: str) -> str:
    return name if name.startswith("activation_post_process") else name.rstrip("0123456789").rstrip("_")


def prepared(name: str) -> dict[str, Any]:
    """What prepare makes of a probe."""
    with quiet(0):
        try:
            model, inputs, config = PROBES[name]()
            found: Any = Quantizer(model, config).prepare(inputs)
            return {"places": places(found), "state": freeze(dict(found.state_dict()))}
        except Exception as error:  # noqa: BLE001 - which exception it is, is what we compare
            return {"raised": Raised.of(error)}


class Run:
    """A model with a config, and the batches that it will see."""

    def __init__(
        self, model: str, config: str, state: dict[str, Tensor] | None = None, upstream: bool = True
    ) -> None:
        made, self.draw = MODELS[model]()
        self.generator = torch.Generator().manual_seed(1)
        make: Any = quantizer_as_upstream if model in UPSTREAM and upstream else Quantizer
        self.quantizer = make(made, CONFIGS[config]())
        self.model: Any = self.quantizer.prepare(self.draw(self.generator), state_dict=state)

    def forward(self) -> Tensor:
        """Everything that a batch gives, in one tensor."""
        outputs = tree_leaves(self.model(*self.draw(self.generator)))
        return torch.cat([each.flatten() for each in outputs if each is not None])

    def evaluate(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            output = self.forward()
        self.model.train()
        return output

    def step(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        torch.manual_seed(2)  # Apple's package draws random numbers where it prepares and switches modes
        output = self.forward()
        loss = (output - 0.1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        seen = freeze({"output": output, "loss": loss, "gradients": gradients, "switches": self.switches()})
        optimizer.step()
        return seen

    def switches(self) -> dict[str, tuple[bool, bool]]:
        found = simulators(self.model).items()
        return {name: (bool(each.observer_enabled), bool(each.fake_quant_enabled)) for name, each in found}


def run(model: str, config: str, upstream: bool = True) -> dict[str, Any]:
    """Everything that one can see from preparation to the finalized model."""
    with quiet(0):
        try:
            return dict(_run(Run(model, config, upstream=upstream)))
        except Exception as error:  # noqa: BLE001 - compared
            return {"raised": Raised.of(error)}


def _run(run: Run) -> Iterator[tuple[str, Any]]:
    yield "places", places(run.model)
    yield "prepared", freeze({"state": dict(run.model.state_dict()), "switches": run.switches()})
    with run.quantizer.calibration_mode():
        outputs = [run.forward() for _ in range(CALIBRATION_BATCHES)]
        yield "calibration", freeze({"outputs": outputs, "switches": run.switches()})
    yield "calibrated", {"state": freeze(dict(run.model.state_dict())), "evaluated": freeze(run.evaluate())}
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
    with run.quantizer.training_mode():
        for step in range(STEPS):
            yield f"step {step}", run.step(optimizer)
    yield "trained", freeze({"state": dict(run.model.state_dict()), "switches": run.switches()})
    yield "evaluated", freeze(run.evaluate())
    run.model.eval()
    run.model = run.quantizer.finalize(backend=ExportBackend.Torch)
    with torch.no_grad():
        yield "finalized output", freeze(run.forward())
    left = {name for name, each in simulators(run.model).items()}
    yield "finalized", {"quantizers": sorted(left)}


def continue_from(model: str, config: str, state: dict[str, Any]) -> dict[str, Any]:
    """Prepare with a state, evaluate, and take a training step."""
    with quiet(0):
        try:
            run = Run(model, config, {name: value.tensor() for name, value in state.items()})
            state_before = freeze(dict(run.model.state_dict()))
            loaded = {"state": state_before, "evaluated": freeze(run.evaluate())}
            with run.quantizer.training_mode():
                return loaded | {"step": run.step(torch.optim.SGD(run.model.parameters(), lr=0.05))}
        except Exception as error:  # noqa: BLE001 - compared
            return {"raised": Raised.of(error)}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """For the oracle's process: the job's probes, runs and calls, and what follows from our states."""
    return {
        "probes": {name: prepared(name) for name in job.get("probes", ())},
        "runs": {each: run(*each) for each in job.get("runs", ())},
        "calls": {name: call(name) for name in job.get("calls", ())},
        "continued": {each: continue_from(*each, state) for each, state in job.get("states", {}).items()},
    }
