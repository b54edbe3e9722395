"""What the calls of pruning are made with: public names, and small objects of them."""

from typing import Any

import torch
from torch import nn

__all__ = ["X", "api", "module", "pruner", "simulator"]


def api() -> Any:
    import coreai_opt.pruning.config
    import coreai_opt.pruning.spec

    class Names:
        def __getattr__(self, name: str) -> Any:
            for module in (coreai_opt.pruning, coreai_opt.pruning.config, coreai_opt.pruning.spec):
                if hasattr(module, name):
                    return getattr(module, name)
            raise AttributeError(name)

    return Names()


def module(**fields: Any) -> Any:
    return api().ModuleMagnitudePrunerConfig(**fields)


def simulator(sparsity: float = 0.5) -> Any:
    return api().PruneImplBase.get_class("default")(sparsity, api().Unstructured())


def pruner(model: nn.Module | None = None, **fields: Any) -> Any:
    model = nn.Sequential(nn.Linear(4, 4)) if model is None else model
    return api().MagnitudePruner(model, api().MagnitudePrunerConfig(**fields))


X = (torch.zeros(2, 4),)
