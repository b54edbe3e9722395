"""Word of assignments to a simulator's modules, for those that would else compare all settings each time."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Quiet", "ReportsAssignments"]


class _Last:
    """The last assignment to any module that reports them: another object each time."""

    __slots__ = ("assignment",)

    def __init__(self) -> None:
        self.assignment = object()


_last = _Last()


class ReportsAssignments(nn.Module):
    """A module that tells when one of its attributes is assigned to or deleted.

    What is written into a tensor, or straight into the dictionaries of the module, is not told.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign, and tell."""
        super().__setattr__(name, value)
        if not torch.compiler.is_compiling():
            _last.assignment = object()

    def __delattr__(self, name: str) -> None:
        """Delete, and tell."""
        super().__delattr__(name)
        if not torch.compiler.is_compiling():
            _last.assignment = object()


class Quiet:
    """Whether nothing has been assigned to a module that reports it, and no module got a hook, since."""

    __slots__ = ("_assignment", "_hook")

    def __init__(self) -> None:
        self._assignment = _last.assignment
        # Torch numbers all hooks in one sequence: as long as it does not go on there are no new ones.
        self._hook = RemovableHandle.next_id

    def lasts(self) -> bool:
        """Whether it is still quiet."""
        return self._assignment is _last.assignment and self._hook == RemovableHandle.next_id
