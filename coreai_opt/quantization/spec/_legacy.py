"""Call forms of earlier releases."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from coreai_opt.config.spec.factory import CompressionTargetTensor
from coreai_opt.quantization.spec.qscheme import QuantizationScheme

__all__ = ["accept_release_0_2"]


def accept_release_0_2(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor take the arguments of release 0.2 as well, where ``qscheme`` came second.

    ``qscheme`` and ``quantization_target`` belong to the calculator now, whose values hold.
    """
    names = [name for name in inspect.signature(init).parameters if name not in ("self", "kwargs")]
    old_names = [names[0], "qscheme", *names[1:-1], "quantization_target", names[-1]]

    @functools.wraps(init)
    def accept(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if len(args) > 1 and isinstance(args[1], QuantizationScheme):
            kwargs |= dict(zip(old_names, args, strict=False))
            args = ()
        given = {name: kwargs.pop(name) for name in ("qscheme", "quantization_target") if name in kwargs}
        init(self, *args, **kwargs)
        for name, value in given.items():
            # torchao passes arguments of these names too, with values of its own kinds.
            holds = getattr(self.qparams_calculator, name, value)
            if isinstance(value, QuantizationScheme | CompressionTargetTensor) and holds != value:
                warnings.warn(
                    f"{name}={value} is not used: the given qparams_calculator has {name}={holds}",
                    UserWarning,
                    stacklevel=2,
                )

    return accept
