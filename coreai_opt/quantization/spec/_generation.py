"""The generation of a simulator's modules: until when it holds what was worked out from their settings."""

from typing import Any

import torch
from torch import nn

from coreai_kernels.runtime import Generation

__all__ = ["HasGeneration", "generation_of"]


class HasGeneration(nn.Module):
    """A module that begins a new generation whenever one of its attributes is assigned or deleted.

    What is written into a tensor, or straight into the dictionaries of the module, is not noticed.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign, and begin a new generation."""
        super().__setattr__(name, value)
        # Training mode makes no difference to a simulator, and some loops set it at each step.
        if name != "training" and not torch.compiler.is_compiling():
            generation_of(self).advance()

    def __delattr__(self, name: str) -> None:
        """Delete, and begin a new generation."""
        super().__delattr__(name)
        if not torch.compiler.is_compiling():
            generation_of(self).advance()


def generation_of(module: nn.Module) -> Generation:
    """The generation of a module's settings. That of a module without one of its own ends at once."""
    own = module.__dict__
    found = own.get("_generation")
    if found is None:
        found = Generation()
        if isinstance(module, HasGeneration):
            own["_generation"] = found
    return found  # type: ignore[no-any-return]
