"""What PyTorch does on a Mac's GPU, as a mode under which CPU tensors may do nothing else.

Which operators have a kernel for the device ``mps`` is read from the table that the installed torch was
generated from. Operators that are made of others are entered, and those have to have one.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchgen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

__all__ = ["MpsRules"]

# "Cannot convert a MPS Tensor to float64", and the like for the others.
MISSING_DTYPES = (
    torch.float64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
# Kernels made of other operators, for any device.
_MADE_OF_OTHERS = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


@functools.cache
def _kernels() -> dict[str, str]:
    """Under which dispatch key operators have the kernel that MPS tensors get; ``MPS`` for one of its own."""
    root = Path(torchgen.__file__).parent / "packaged/ATen/native"
    table = parse_native_yaml(str(root / "native_functions.yaml"), str(root / "tags.yaml"))

    def have(key: str) -> set[str]:
        index = table.backend_indices[DispatchKey[key]]
        return {str(f.func.name) for f in table.native_functions if index.has_kernel(f)}

    own = have("MPS")
    # The forms with and without ``out`` share a kernel.
    own |= {str(f.func.name) for f in table.native_functions if str(f.structured_delegate) in own}
    found = {name: key for key in _MADE_OF_OTHERS for name in have(key)}
    return found | dict.fromkeys(own | have("CompositeImplicitAutograd"), "MPS")


class MpsRules(TorchDispatchMode):
    """Fails where MPS tensors would: a missing operator or dtype. And where the host would wait for them.

    Args:
        on_host: tensors that lie on the CPU even so, which may be read.
    """

    def __init__(self, on_host: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.on_host = {tensor.untyped_storage().data_ptr() for tensor in on_host}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is torch.ops.aten.lift_fresh.default and first.dtype == torch.float64:
            self.on_host.add(first.untyped_storage().data_ptr())  # from Python or numpy
        if first is not None and first.untyped_storage().data_ptr() in self.on_host:
            return func(*args, **kwargs)
        assert func.namespace == "aten", f"{name} is not made of torch's operators"
        key = _kernels().get(name.removeprefix("aten::"))
        assert key is not None, f"{name} has no kernel for MPS"
        assert not _waits(func, args), f"{name} makes the host wait"
        if key == "MPS" or func.is_view:
            result = _called(func, args, kwargs)
        else:
            with self:
                result = func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                assert tensor.dtype not in MISSING_DTYPES, f"{name}: MPS has no {tensor.dtype}"
        return result


def _waits(func: Any, args: Any) -> bool:
    """Whether the result's shape, or the host, depends on values: the host waits for the device."""
    if func is torch.ops.aten.index.Tensor:  # of indices, unlike masks, one can tell
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    # Numbers that were made tensors come as numbers, for which there are overloads.
    named = zip(func._schema.arguments, args, strict=False)
    is_number = any(str(a.type) == "Tensor" and isinstance(x, (int, float)) for a, x in named)
    return (func.overloadpacket if is_number else func)(*args, **kwargs)
