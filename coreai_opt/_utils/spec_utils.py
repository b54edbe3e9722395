"""Constructors that wait: classes with some of their arguments bound."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Generic, TypeVar

from coreai_kernels.imports import once_imported

__all__ = ["PartialConstructor", "with_args"]

T = TypeVar("T")


class _Wrapper:
    """In the place of torchao's ``PartialWrapper``, with its attributes, until that is imported.

    Attributes:
        p: the constructor with arguments bound.
        callable_args: functions by the names of the arguments that they make.
    """

    def __init__(self, p: partial[Any]) -> None:
        self.p = p
        self.callable_args: dict[str, Callable[[], Any]] = {}


class PartialConstructor(_Wrapper, Generic[T]):
    """A constructor of ``T`` with arguments bound, which torchao's graph transformations accept.

    Arguments bound by :meth:`with_callable_args` are functions, called anew at each construction: so that no
    two constructed objects share a submodule.
    """

    p: partial[T]
    callable_args: dict[str, Callable[[], Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        made = {name: make() for name, make in self.callable_args.items() if name not in kwargs}
        return self.p(*args, **kwargs, **made)

    def __repr__(self) -> str:
        return f"{self.p!r}{self.callable_args!r}"

    def with_args(self, **kwargs: Any) -> "PartialConstructor[T]":
        """A copy with more arguments bound."""
        return self._copy(partial(self.p, **kwargs), {})

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> "PartialConstructor[T]":
        """A copy with arguments bound to what the functions return, called at each construction."""
        return self._copy(self.p, kwargs)

    def _copy(
        self, bound: partial[T], callable_args: dict[str, Callable[[], Any]]
    ) -> "PartialConstructor[T]":
        result: PartialConstructor[T] = type(self)(bound)
        result.callable_args = {**self.callable_args, **callable_args}
        return result


def with_args(cls: Callable[..., T], **kwargs: Any) -> PartialConstructor[T]:
    """A constructor of ``cls`` with ``kwargs`` bound."""
    return PartialConstructor(partial(cls, **kwargs))


def _derive(observers: ModuleType) -> None:
    PartialConstructor.__bases__ = (observers.PartialWrapper, *PartialConstructor.__bases__[1:])


once_imported("torchao.quantization.pt2e.observer", _derive)
