"""Batch-norm statistics of a compressed model, found anew: compression shifts what the layers see."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from coreai_opt.base_model_compressor import training_flags
from coreai_opt.controllers.core.context import BuildContext
from coreai_opt.controllers.core.distributed import mean_over_ranks
from coreai_opt.controllers.core.inputs import batches

__all__ = ["adapt_batchnorm"]


@torch.no_grad()
def adapt_batchnorm(model: nn.Module, context: BuildContext, num_samples: int) -> None:
    """Set running means and variances to their averages over ``num_samples`` samples, and over all ranks.

    Only batch-norm layers run in training mode; parameters stay as they are.

    Raises:
        ValueError: the loader is empty.
    """
    layers = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not layers or num_samples == 0 or context.init_args.train_loader is None:
        return
    first = next(iter(batches(context, model, 1)), None)
    if first is None:
        raise ValueError("batch-norm adaptation: the registered data loader gives no batch")
    momenta: dict[nn.Module, Any] = {layer: layer.momentum for layer in layers}
    with training_flags(model, False):
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
        try:
            for args, kwargs in batches(context, model, num_samples):
                model(*args, **kwargs)
        finally:
            for layer in layers:
                layer.momentum = momenta[layer]
    for layer in layers:
        for buffer in (layer.running_mean, layer.running_var):
            if buffer is not None:
                buffer.copy_(mean_over_ranks(buffer))
