"""Constructors that wait: classes with some of their arguments bound."""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from coreai_opt._environment import quiet_torchao_import

with quiet_torchao_import():
    from torchao.quantization.pt2e.observer import PartialWrapper

__all__ = ["PartialConstructor", "with_args"]

T = TypeVar("T")


class PartialConstructor(PartialWrapper, Generic[T]):  # type: ignore[misc]
    """A constructor of ``T`` with arguments bound, which torchao's graph transformations accept.

    Arguments bound by :meth:`with_callable_args` are functions, called anew at each construction: so that no
    two constructed objects share a submodule.
    """

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
