"""Attributes of the model that its graph module keeps, and passes on to copies."""

import logging
from typing import Any

from torch import nn
from torch.fx import GraphModule

from coreai_opt.quantization.config import QuantizerConfig

__all__ = [
    "KEPT_METADATA",
    "OWNERS",
    "attach",
    "attached",
    "keep_metadata",
    "preserved_attributes",
    "restore_metadata",
]

logger = logging.getLogger(__name__)

# Where a graph module keeps attributes that its copies shall have, by torch's convention.
_PRESERVED = "_user_preserved_attributes"
# Buffers that an earlier finalize for Core ML left on modules.
_METADATA_PREFIX = "_COREML_"
_METADATA = "coreai_opt_coreml_metadata"
# The modules that quantizers belong to, see `owners`.
OWNERS = "coreai_opt_owners"
# What copies and files have of a graph module's metadata.
KEPT_METADATA = (OWNERS, _PRESERVED, _METADATA)


def preserved_attributes(model: nn.Module, config: QuantizerConfig) -> dict[str, Any]:
    """The attributes of ``model`` that the configuration names. Missing ones give a warning in the log."""
    found = {}
    for name in config.preserved_attributes or ():
        if hasattr(model, name):
            found[name] = getattr(model, name)
        else:
            logger.warning(f"preserved_attributes: the model has no attribute {name!r}")
    return found


def attach(graph_module: GraphModule, attributes: dict[str, Any]) -> None:
    """Set attributes on the graph module, which its copies get as well."""
    graph_module.meta.setdefault(_PRESERVED, {}).update(attributes)
    for name, value in attributes.items():
        setattr(graph_module, name, value)


def attached(graph_module: GraphModule) -> dict[str, Any]:
    """What was attached."""
    return dict(graph_module.meta.get(_PRESERVED, {}))


def keep_metadata(model: nn.Module, graph_module: GraphModule) -> None:
    """Keep the buffers of ``model`` that describe how it is compressed already."""
    graph_module.meta[_METADATA] = [
        (module_name, name, buffer)
        for module_name, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if name.startswith(_METADATA_PREFIX) and buffer is not None
    ]


def restore_metadata(source: GraphModule, graph_module: GraphModule) -> None:
    """Register the kept buffers of ``source`` on the modules of ``graph_module`` that have their names."""
    for module_name, name, buffer in source.meta.get(_METADATA, []):
        module: nn.Module = graph_module
        for part in filter(None, module_name.split(".")):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(name, buffer)
