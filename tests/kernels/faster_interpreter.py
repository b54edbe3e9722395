"""Triton's interpreter without three of its costs, which are larger than a kernel's work on a small tensor.

It exchanges the functions of Triton's language anew for every launch and every function that a kernel calls,
makes a table of all dtypes whenever it looks one up, and computes integers a second time in 64 bits, to see
whether they overflow: positions in small tensors cannot, and ``make test-without-native`` keeps that check.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

__all__ = ["faster_interpreter"]


@contextlib.contextmanager
def faster_interpreter() -> Iterator[None]:
    """Within, the language is exchanged once for each function, and restored at the end."""
    from triton.runtime import interpreter

    exchange: Callable[[Any], Any] = interpreter._patch_lang
    look_up: Callable[[Any], Any] = interpreter._get_np_dtype
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    scopes: list[Any] = []
    dtypes: dict[str, Any] = {}

    @functools.cache
    def exchange_once(function: Any) -> Any:
        scopes.append(exchange(function))
        return interpreter._LangPatchScope()  # nothing to restore after a launch

    def kept(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = look_up(dtype)
        return dtypes[name]

    with (
        mock.patch.object(interpreter, "_patch_lang", exchange_once),
        mock.patch.object(interpreter, "_get_np_dtype", kept),
        mock.patch.object(interpreter.interpreter_builder, "options", options),
    ):
        try:
            yield
        finally:
            for scope in reversed(scopes):
                scope.restore()
