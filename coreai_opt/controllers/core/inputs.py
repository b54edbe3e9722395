"""Inputs for the forwards that compression itself runs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.base_model_compressor import training_flags
from coreai_opt.controllers.core.config import InputInfo
from coreai_opt.controllers.core.context import BuildContext
from coreai_opt.controllers.core.losses import device_of

__all__ = [
    "Batch",
    "batch_size",
    "batches",
    "example_inputs",
    "has_example",
    "loss_after_training",
    "losses",
    "one_batch",
    "require_loader",
]

Batch = tuple[tuple[Any, ...], dict[str, Any]]


def _split(batch: Any) -> Batch:
    """The model's arguments from a loader's batch: a dict's entries, or the first of a pair, or itself."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, list | tuple):
        return (batch[0],), {}
    return (batch,), {}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def require_loader(context: BuildContext) -> Any:
    """The registered loader.

    Raises:
        ValueError: there is none.
    """
    loader = context.init_args.train_loader
    if loader is None:
        raise ValueError(
            "initialisation needs data: register a loader with register_default_init_args(config, loader), "
            "or ask for no samples (num_init_samples: 0)"
        )
    return loader


def batches(context: BuildContext, model: nn.Module, num_samples: int) -> Iterator[Batch]:
    """The model's arguments from the registered loader until ``num_samples`` are reached or it ends.

    Raises:
        ValueError: no loader is registered.
    """
    require_loader(context)
    device = torch.device(context.init_args.device) if context.init_args.device else device_of(model)
    seen = 0
    for batch in context.init_args.batches():
        if seen >= num_samples:
            return
        args, kwargs = _split(batch)
        args = tuple(_moved(value, device) for value in args)
        kwargs = {name: _moved(value, device) for name, value in kwargs.items()}
        seen += batch_size((args, kwargs))
        yield args, kwargs


def batch_size(batch: Batch) -> int:
    """Samples of a batch: the first extent of its first tensor."""
    args, kwargs = batch
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1


def example_inputs(context: BuildContext, model: nn.Module) -> Batch:
    """Arguments for one forward.

    Those that ``dummy_forward`` gives the model; or else made from ``input_info``; or else one batch of the
    registered loader.

    Raises:
        ValueError: there is none of them, or ``dummy_forward`` does not call the model.
    """
    if context.dummy_forward is not None:
        return _arguments_of(context.dummy_forward, model)
    if context.input_info:
        infos = context.input_info
        args = tuple(_example(info, model) for info in infos if info.keyword is None)
        kwargs = {info.keyword: _example(info, model) for info in infos if info.keyword}
        return args, kwargs
    if context.init_args.train_loader is not None:
        return one_batch(context, model)
    raise ValueError(
        "an example of the model's inputs is needed: give input_info in the configuration, or register a "
        "loader with register_default_init_args"
    )


def has_example(context: BuildContext) -> bool:
    """Whether anything tells how an input of the model looks."""
    given = (context.dummy_forward, context.init_args.train_loader)
    return any(each is not None for each in given) or bool(context.input_info)


def one_batch(context: BuildContext, model: nn.Module) -> Batch:
    """Arguments for one forward: data, if a loader is registered; else as :func:`example_inputs`.

    Raises:
        ValueError: nothing tells; or the loader is empty.
    """
    if context.init_args.train_loader is None:
        return example_inputs(context, model)
    for batch in batches(context, model, 1):
        return batch
    raise ValueError("the registered data loader gives no batch")


def losses(context: BuildContext, model: nn.Module, num_samples: int) -> Iterator[Tensor]:
    """The task's loss on batches of the registered loader, with a graph, until ``num_samples`` are reached.

    Raises:
        ValueError: no loader or no criterion is registered, or a batch has no target.
    """
    init = context.init_args
    require_loader(context)
    if init.criterion is None and init.criterion_fn is None:
        raise ValueError(
            "the loss of the task is needed: register its function with "
            "register_default_init_args(config, loader, criterion=...)"
        )
    device = torch.device(init.device) if init.device else device_of(model)
    seen = 0
    for batch in init.batches():
        if seen >= num_samples:
            return
        args, kwargs = _split(batch)
        target = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if len(batch) > 1 else None
        if target is None:
            raise ValueError("the loss of the task needs batches with targets: pairs, or dicts with 'labels'")
        args = tuple(_moved(value, device) for value in args)
        kwargs = {name: _moved(value, device) for name, value in kwargs.items()}
        seen += batch_size((args, kwargs))
        output, target = model(*args, **kwargs), _moved(target, device)
        if init.criterion_fn is not None:
            yield init.criterion_fn(output, target, init.criterion)
        else:
            yield init.criterion(output, target)


def loss_after_training(context: BuildContext, model: nn.Module, steps: int, rate: float = 1e-2) -> float:
    """The mean loss in evaluation mode after a few steps of SGD; the model keeps the changes.

    Args:
        context: has the data and the criterion.
        model: is trained.
        steps: of the optimizer.
        rate: its learning rate.
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    everything = 2**62
    done = 0
    with torch.enable_grad(), training_flags(model, True):
        while done < steps:
            before = done
            for loss in losses(context, model, everything):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if done >= steps:
                    break
            if done == before:
                raise ValueError("the registered data loader gives no batch")
        optimizer.zero_grad()
    with torch.no_grad(), training_flags(model, False):
        values = [float(loss) for loss in losses(context, model, everything)]
    return sum(values) / max(len(values), 1)


class _Called(BaseException):
    """Ends a dummy forward at the call of the model, which does not run. Not to be caught as an Exception."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.batch = args, kwargs


def _arguments_of(dummy_forward: Callable[[nn.Module], Any], model: nn.Module) -> Batch:
    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Called(args, kwargs)

    handle = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        dummy_forward(model)
    except _Called as called:
        return called.batch
    finally:
        handle.remove()
    raise ValueError("dummy_forward_fn must call the model that it is given; it returned without doing so")


def _example(info: InputInfo, model: nn.Module) -> Tensor:
    dtype = torch.int64 if info.type == "long" else _floating_dtype(model)
    if info.filler == "random":
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(info.sample_size, generator=generator).to(dtype)
    else:
        values = torch.full(info.sample_size, 0 if info.filler == "zeros" else 1, dtype=dtype)
    return values.to(device_of(model))


def _floating_dtype(model: nn.Module) -> torch.dtype:
    for tensor in model.parameters():
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
