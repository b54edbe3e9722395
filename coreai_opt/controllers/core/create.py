"""From a model and a configuration to a compressed model and its controller."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coreai_opt._restoring import undone_on_failure
from coreai_opt._sharding.layout import is_sharded
from coreai_opt.controllers.core.api import State
from coreai_opt.controllers.core.base import (
    MARK,
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.composite import CompositeCompressionAlgorithmBuilder
from coreai_opt.controllers.core.config import ControllerConfig, InitArgs
from coreai_opt.controllers.core.context import BuildContext
from coreai_opt.controllers.core.state import take

__all__ = ["create_compressed_model", "register_default_init_args"]

AnyConfig = ControllerConfig | Mapping[str, Any] | str | Path


def create_compressed_model(
    model: nn.Module,
    config: AnyConfig,
    compression_state: State | None = None,
    dummy_forward_fn: Callable[[nn.Module], Any] | None = None,
    wrap_inputs_fn: Callable[..., Any] | None = None,
    wrap_outputs_fn: Callable[..., Any] | None = None,
    dump_graphs: bool = False,
) -> tuple[BaseCompressionAlgorithmController, nn.Module]:
    """Build the algorithms of ``config`` into ``model``, in place.

    To resume, give the ``compression_state`` that was saved, then load the model's ``state_dict``; what the
    algorithms added is not initialised anew then.

    Args:
        model: the model, on the device on which it will be trained.
        config: a dict, the path of a JSON or YAML file, or a :class:`ControllerConfig`.
        compression_state: what ``controller.get_compression_state()`` gave.
        dummy_forward_fn: calls the model with an example of its inputs, for algorithms that follow its
            dataflow and for export; by default it comes from ``input_info`` or the registered loader.
        wrap_inputs_fn: taken for compatibility. It marks the inputs of a traced graph; here layers are
            compressed where they are, and nothing has to be marked.
        wrap_outputs_fn: taken for compatibility, as ``wrap_inputs_fn``.
        dump_graphs: taken for compatibility; there are no graphs to dump.

    Returns:
        The controller, and the model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the configuration does not hold, names no algorithm or an unknown one, or the model fits
            none of its scopes.
        RuntimeError: the model is compressed already, or its parameters are sharded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got a {type(model).__name__}")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise RuntimeError(
            "model: its parameters are sharded already. Create the compressed model first, and call "
            "fully_shard on it then. Under tensor parallelism, which comes before, there are no controllers: "
            "use Quantizer, MagnitudePruner and KMeansPalettizer"
        )
    if hasattr(model, MARK):
        raise RuntimeError(
            f"the model is compressed already, by {getattr(model, MARK)}: compress a fresh one, or strip it "
            f"first; algorithms that work together belong into one configuration"
        )
    checked = ControllerConfig.load(config)
    context = BuildContext(checked.init_args, checked.input_info, compression_state is None, dummy_forward_fn)
    builder = _make_builder(checked, context)
    if compression_state is not None:
        builder_state, ctrl_state = take(
            compression_state, "builder_state", "ctrl_state", of="the compression (compression_state)"
        )
        builder.load_state(builder_state)
    training = model.training
    evaluate = checked.init_args.model_eval_fn
    if checked.accuracy_aware_training is not None and evaluate is not None and compression_state is None:
        context.uncompressed_accuracy = float(evaluate(model, checked.init_args.val_loader))
    with undone_on_failure(model):
        builder.apply_to(model)
        controller = builder.build_controller(model)
        if compression_state is not None:
            controller.load_state(ctrl_state)
    model.train(training)
    setattr(model, MARK, [each.name for each in builder.builders])
    return controller, model


def _make_builder(config: ControllerConfig, context: BuildContext) -> CompositeCompressionAlgorithmBuilder:
    if not config.compression:
        raise ValueError("the configuration names no algorithm: fill its 'compression'")
    builders = []
    for entry in config.compression:
        if "algorithm" not in entry:
            raise ValueError(
                f"an entry of 'compression' lacks 'algorithm', one of "
                f"{sorted(BaseCompressionAlgorithmBuilder.list_registry_keys())}; it has {sorted(entry)}"
            )
        cls = BaseCompressionAlgorithmBuilder.resolve(entry["algorithm"])
        if config.compression_lr_multiplier is not None:
            entry = {"compression_lr_multiplier": config.compression_lr_multiplier, **entry}
        builders.append(cls(entry, context))
    return CompositeCompressionAlgorithmBuilder(builders)


def register_default_init_args(
    config: AnyConfig,
    train_loader: Any,
    criterion: nn.Module | None = None,
    criterion_fn: Callable[..., Any] | None = None,
    val_loader: Any = None,
    model_eval_fn: Callable[..., Any] | None = None,
    device: str | torch.device | None = None,
) -> ControllerConfig:
    """Attach what initialisation needs to a configuration.

    Args:
        config: as for :func:`create_compressed_model`.
        train_loader: yields batches: a tensor, a tuple or list whose first entry is the model's input, or a
            dict of keyword arguments. Ranges and batch-norm statistics are taken from it, and the number of
            steps in an epoch if it has a length.
        criterion: loss function of the task.
        criterion_fn: ``(outputs, target, criterion)`` to the loss.
        val_loader: validation data.
        model_eval_fn: ``(model, val_loader)`` to a metric, the greater the better. It measures the
            uncompressed model where the configuration has ``accuracy_aware_training``.
        device: where the batches go; None for the model's device.

    Returns:
        The checked configuration, which keeps them.
    """
    checked = ControllerConfig.load(config)
    checked._init_args = InitArgs(
        train_loader=train_loader,
        val_loader=val_loader,
        criterion=criterion,
        criterion_fn=criterion_fn,
        model_eval_fn=model_eval_fn,
        device=device,
    )
    return checked
