"""Single calls of graph mode, right and wrong ones: what they return or raise.

Public names only: the same file runs on both packages.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt import ExportBackend
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig
from coreai_opt.quantization.config import QATSchedule
from coreai_opt.quantization.config.quantization_config import KVCacheQuantConfig, OpQuantizerConfig
from coreai_opt.quantization.spec import PerChannelGranularity

from .graph_probes import Function, asymmetric, everywhere, mlp, only
from .quantizer_runs import quiet
from .snapshots import Raised, freeze

__all__ = ["CALLS", "call", "quantizer_as_upstream"]

CALLS: dict[str, Callable[[], Any]] = {}
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def named(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def enter(function: Callable[[], Any]) -> Callable[[], Any]:
        CALLS[name] = function
        return function

    return enter


def call(name: str) -> Any:
    """The value of the call, or the exception."""
    with quiet(0):
        try:
            return freeze(CALLS[name]())
        except Exception as error:  # noqa: BLE001 - compared
            return Raised.of(error)


def prepare(model: nn.Module | None = None, config: QuantizerConfig | None = None, *inputs: Tensor) -> Any:
    return Quantizer(model or mlp(), config).prepare(inputs or (X,))


def quantizer_as_upstream(model: nn.Module, config: QuantizerConfig) -> Quantizer:
    """Apple's, or ours with Apple's numbers."""
    ours = "strict_upstream" in inspect.signature(Quantizer).parameters
    return Quantizer(model, config, **({"strict_upstream": True} if ours else {}))


def schedule() -> QuantizerConfig:
    entry = ModuleQuantizerConfig(qat_schedule=QATSchedule(enable_fake_quant=1, disable_observer=3))
    return QuantizerConfig(global_config=entry)


CALLS["model that is none"] = lambda: Quantizer(3)  # type: ignore[arg-type]
for field in ("op_input_spec", "op_output_spec"):
    CALLS[f"text as a key of {field}"] = lambda field=field: Quantizer(
        mlp(), everywhere(**{field: {"x": QuantizationSpec()}})
    )
for field in ("module_input_spec", "module_output_spec"):
    CALLS[f"text as a key of {field}"] = lambda field=field: Quantizer(
        mlp(),
        QuantizerConfig(
            module_name_configs={"0": ModuleQuantizerConfig(**{field: {"x": QuantizationSpec()}})}
        ),
    )
CALLS["second output of an operation"] = lambda: Quantizer(
    mlp(), everywhere(op_output_spec={1: QuantizationSpec()})
)
CALLS["a list of inputs"] = lambda: Quantizer(mlp()).prepare([X])
CALLS["no inputs"] = lambda: Quantizer(mlp()).prepare(())
CALLS["prepared twice"] = lambda: [
    quantizer := Quantizer(mlp()),
    quantizer.prepare((X,)),
    quantizer.prepare((X,)),
]
CALLS["prepared by another"] = lambda: Quantizer(prepare()).prepare((X,))
CALLS["control flow"] = lambda: prepare(Function(lambda m, t: t if t.sum() > 0 else -t))
CALLS["bad regular expression"] = lambda: prepare(config=everywhere(op_name_config={"(": None}))
CALLS["a state as an input"] = lambda: prepare(config=everywhere(op_input_spec={1: QuantizationSpec()}))
CALLS["an embedding's weight as an input"] = lambda: prepare(
    nn.Embedding(4, 4), everywhere(op_input_spec={0: QuantizationSpec()}), torch.arange(3)
)
CALLS["indices out of range"] = lambda: len(
    prepare(config=everywhere(op_input_spec={7: QuantizationSpec()})).state_dict()
)


@named("activation without an axis")
def _() -> Any:
    spec = QuantizationSpec(granularity=PerChannelGranularity())
    return prepare(config=everywhere(op_input_spec={"*": spec}))


@named("state of a norm without an axis")
def _() -> Any:
    spec = QuantizationSpec(granularity=PerChannelGranularity())
    entry = ModuleQuantizerConfig(module_state_spec={"weight": spec})
    return prepare(nn.LayerNorm(4), QuantizerConfig(module_type_configs={nn.LayerNorm: entry}))


@named("weights with two default axes")
def _() -> Any:
    spec = QuantizationSpec(granularity=PerChannelGranularity())
    model = Function(lambda m, t: m.b(m.a(t)), a=nn.Conv2d(3, 3, 1), b=nn.ConvTranspose2d(3, 3, 1))
    model.b.weight = model.a.weight
    return prepare(model, everywhere(op_state_spec={"weight": spec}), torch.ones(1, 3, 2, 2))


@named("floats and an asymmetric neighbour")
def _() -> Any:
    floats = ModuleQuantizerConfig(op_input_spec={"*": QuantizationSpec(dtype="float8_e4m3fn")})
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_output_spec={"*": asymmetric()}),
        module_name_configs={"b": floats},
    )
    model = Function(lambda m, t: m.b(m.a(t).view(1, 8)), a=nn.Linear(4, 4), b=nn.Linear(8, 2))
    return list(prepare(model, config).state_dict())


@named("cat per channel without outputs")
def _() -> Any:
    spec = QuantizationSpec(granularity=PerChannelGranularity(axis=1))
    config = everywhere(op_input_spec={"*": spec}, op_output_spec=None)
    return prepare(Function(lambda m, a, b: torch.cat([a, b], 1)), config, X, X)


@named("dynamic behind a fixed range")
def _() -> Any:
    spec = QuantizationSpec(qparam_calculator_cls="dynamic")
    return prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), everywhere(op_output_spec={"*": spec}))


@named("state without keys")
def _() -> Any:
    return Quantizer(mlp()).prepare((X,), state_dict={})


@named("state of another shape")
def _() -> Any:
    state = dict(prepare().state_dict())
    state["0.bias"] = torch.ones(9)
    return Quantizer(mlp()).prepare((X,), state_dict=state)


def enter(context: Any) -> None:
    with context:
        pass


CALLS["calibration before prepare"] = lambda: enter(Quantizer(mlp()).calibration_mode())
CALLS["training before prepare"] = lambda: enter(Quantizer(mlp()).training_mode())
CALLS["finalize before prepare"] = lambda: Quantizer(mlp()).finalize(backend=ExportBackend.Torch)
CALLS["step outside of training"] = lambda: [
    quantizer := Quantizer(mlp()),
    quantizer.prepare((X,)),
    quantizer.step(),
]


def on_prepared(function: Callable[[Quantizer, Any], Any], config: QuantizerConfig | None = None) -> Any:
    quantizer = Quantizer(mlp(), config)
    return function(quantizer, quantizer.prepare((X,)))


@named("training inside of training")
def _() -> Any:
    def nested(quantizer: Quantizer, model: Any) -> None:
        with quantizer.training_mode(), quantizer.training_mode():
            pass

    return on_prepared(nested)


CALLS["calibration of another module"] = lambda: on_prepared(lambda q, m: enter(q.calibration_mode(mlp())))
CALLS["finalize of another module"] = lambda: on_prepared(
    lambda q, m: q.finalize(mlp(), backend=ExportBackend.Torch)
)
CALLS["switch of another module"] = lambda: on_prepared(lambda q, m: q.disable_observer(nn.Linear(2, 2)))
CALLS["switch with a schedule"] = lambda: on_prepared(lambda q, m: q.disable_observer(), schedule())
CALLS["folder for another backend"] = lambda: on_prepared(
    lambda q, m: q.finalize(backend=ExportBackend.Torch, mmap_dir="/tmp/nowhere")
)


def switches(model: Any) -> dict[str, Any]:
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "fake_quant_enabled"):
            found[name] = (bool(module.observer_enabled), bool(module.fake_quant_enabled))
    return found


@named("switches of a module")
def _() -> Any:
    def switched(quantizer: Quantizer, model: Any) -> Any:
        quantizer.disable_fake_quant(model.get_submodule("2"))
        quantizer.enable_observer(model.get_submodule("0"))
        return switches(model)

    return on_prepared(switched)


@named("switch of the whole graph")
def _() -> Any:
    def switched(quantizer: Quantizer, model: Any) -> Any:
        quantizer.disable_fake_quant(model)
        return switches(model)

    return on_prepared(switched)


@named("a schedule by name")
def _() -> Any:
    entry = ModuleQuantizerConfig(qat_schedule=QATSchedule(enable_fake_quant=1, disable_observer=2))

    def trained(quantizer: Quantizer, model: Any) -> Any:
        seen = []
        with quantizer.training_mode():
            for _ in range(4):
                seen.append(switches(model))
                quantizer.step()
        with quantizer.training_mode():
            seen.append(switches(model))
        return seen, switches(model)

    return on_prepared(trained, QuantizerConfig(module_name_configs={"2": entry}))


@named("a schedule of a parent")
def _() -> Any:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 2))
    entry = ModuleQuantizerConfig(qat_schedule=QATSchedule(enable_fake_quant=2))
    quantizer = Quantizer(model, QuantizerConfig(module_name_configs={"0": entry}))
    found = quantizer.prepare((X,))
    with quantizer.training_mode():
        return switches(found)


@named("preserved attributes")
def _() -> Any:
    model = mlp()
    model.labels = ["a", "b"]  # type: ignore[assignment]
    config = QuantizerConfig(preserved_attributes=["labels", "missing"])
    quantizer = Quantizer(model, config)
    found: Any = quantizer.prepare((X,))
    return found.labels, quantizer.finalize(backend=ExportBackend.Torch).labels, hasattr(found, "missing")


@named("marks of a prepared and a finalized graph")
def _() -> Any:
    def marks(quantizer: Quantizer, model: Any) -> Any:
        final = quantizer.finalize(backend=ExportBackend.Torch)
        return hasattr(model, "_coreai_opt_prepared"), bool(getattr(final, "_coreai_opt_prepared", False))

    return on_prepared(marks)


@named("dynamic batch")
def _() -> Any:
    batch = torch.export.Dim("batch")
    model = Quantizer(mlp()).prepare((X,), dynamic_shapes=({0: batch},))
    return model(torch.ones(5, 4)), model(X)


@named("a train mode export with a batch norm")
def _() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    found = prepare(model, None, torch.ones(2, 1, 3, 3))
    return dict(found.state_dict())


def cache(name: str = "cache_update", index: int = 1, config: QuantizerConfig | None = None) -> Any:
    model = Function(
        lambda m, t, c: torch.ops.parity_probes.cache_update(c, m.k(t), 0) * 1.0, k=nn.Linear(4, 4)
    )
    specs = OpQuantizerConfig(
        op_input_spec={index: QuantizationSpec()}, op_output_spec=None, op_state_spec=None
    )
    config = config or QuantizerConfig(global_config=None)
    config.kv_cache_quant_configs = {name: KVCacheQuantConfig(op_quantizer_config=specs)}
    return prepare(model, config, X, torch.ones(2, 3, 4))


CALLS["a cache that is not there"] = lambda: cache(name="missing")
CALLS["a cache without that input"] = lambda: cache(index=2)
CALLS["a cache among quantized activations"] = lambda: len(cache(config=QuantizerConfig()).state_dict())
CALLS["a cache with weights"] = lambda: list(
    cache(
        config=QuantizerConfig(global_config=only(op_state_spec={"weight": QuantizationSpec()}))
    ).state_dict()
)


@named("batch norm without parameters")
def _() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False)).eval()
    return prepare(model, None, torch.ones(2, 1, 3, 3))(torch.ones(2, 1, 3, 3))


@named("batch norm without statistics")
def _() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    return prepare(model, None, torch.ones(2, 1, 3, 3))(torch.ones(2, 1, 3, 3))


@named("linear with a batch norm without parameters")
def _() -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 2)).eval()
    return dict(prepare(model).state_dict())


@named("boundary declined behind a tie")
def _() -> Any:
    entry = ModuleQuantizerConfig(module_output_spec={0: None})
    return list(prepare(config=QuantizerConfig(module_name_configs={"0": entry})).state_dict())


@named("finalized twice")
def _() -> Any:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)).eval()
    quantizer = Quantizer(model)
    quantizer.prepare((torch.ones(2, 1, 3, 3),))
    results = [quantizer.finalize(backend=ExportBackend.Torch) for _ in range(2)]
    return [list(each.state_dict()) for each in results]


@named("calibration of a copy")
def _() -> Any:
    def calibrated(quantizer: Quantizer, model: Any) -> Any:
        twin = copy.deepcopy(model)
        with quantizer.calibration_mode(twin):
            return twin(X)

    return on_prepared(calibrated)


@named("bias and weight")
def _() -> Any:
    weight = QuantizationSpec(dtype="int4")
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 2)).eval()
    return dict(prepare(model, everywhere(op_state_spec={"*": weight}), torch.ones(2, 1, 3, 3)).state_dict())


@named("boundary declined at a tie")
def _() -> Any:
    entry = ModuleQuantizerConfig(module_output_spec={0: None})
    return list(prepare(config=QuantizerConfig(module_name_configs={"1": entry})).state_dict())


def own_numbers() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=0.1, momentum=0.5), nn.Dropout(0.9))
    with torch.no_grad():
        model[1].running_var.fill_(0.05)
    return model


@named("numbers of batch norms and dropouts")
def _() -> Any:
    model = prepare(own_numbers())
    model.eval()
    evaluated = model(X)
    model.train()
    model(X)
    return evaluated, dict(model.state_dict())


@named("numbers of batch norms and dropouts, as upstream")
def _() -> Any:
    quantizer = quantizer_as_upstream(own_numbers(), QuantizerConfig())
    model: Any = quantizer.prepare((X,))
    model.eval()
    evaluated = model(X)
    model.train()
    torch.manual_seed(1)
    return evaluated, model(X), dict(model.state_dict())


@named("dropout of channels in evaluation")
def _() -> Any:
    model = prepare(nn.Sequential(nn.Dropout2d(0.5)).train(), None, torch.ones(2, 3, 4, 4))
    model.eval()
    torch.manual_seed(1)
    return model(torch.ones(2, 3, 4, 4))
