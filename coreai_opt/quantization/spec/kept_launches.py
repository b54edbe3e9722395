"""The same fake quantizers on the same tensors, forward after forward."""

from collections.abc import Iterable, Sequence
from itertools import chain, islice, starmap, zip_longest
from operator import attrgetter, is_
from typing import Any

from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from coreai_kernels.ops import foreach
from coreai_kernels.ops.library import reaches_kernels
from coreai_opt.quantization.spec._assignments import Quiet
from coreai_opt.quantization.spec._plan import settings_of
from coreai_opt.quantization.spec._switches import Flags
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.qparams_calculator import (
    GlobalMinMaxQParamsCalculator,
    MovingAverageQParamsCalculator,
    StaticQParamsCalculator,
)
from coreai_opt.quantization.spec.together import HOOKS, Task, is_hooked, launch_of, launches, task_of

__all__ = ["KeptLaunches"]

_CALCULATORS = (StaticQParamsCalculator, MovingAverageQParamsCalculator, GlobalMinMaxQParamsCalculator)

_NOTHING = object()

# What a tensor may be given without becoming another object.
_requires_grad = attrgetter("requires_grad")
_facts = attrgetter("dtype", "device", "shape")
_version = attrgetter("_version")


class KeptLaunches:
    """Launches that are worked out once, and good as long as nothing that they depend on has changed.

    Working out what each of many simulators has to do costs more than its work. Here a forward makes sure of
    all of them at once, in a few passes over flat lists: the identity of buffers and tensors, the version
    counters of the switches, that nobody listens, and that no setting has been assigned to.

    Simulators are kept that simulate_together launches, with a built-in calculator that keeps its parameters
    and has observed before; and tensors that need a gradient.

    Args:
        simulators: fake quantizers.
        tensors: one for each.
        places: for each, dictionaries that have to go on holding the very same values.

    Attributes:
        members: which of the tensors are kept, by their index, in the order of the outputs.
        tensors: those.
    """

    def __init__(
        self,
        simulators: Sequence[FakeQuantizeImplBase],
        tensors: Sequence[Tensor],
        places: Sequence[tuple[dict[str, Any], ...]],
    ) -> None:
        # Listeners to all modules have to be called.
        self._is_hooked = _has_any_global_hook()
        groups: dict[Any, list[tuple[int, Task]]] = {}
        seen: set[int] = set()
        for i, (simulator, tensor) in enumerate(zip(simulators, tensors, strict=True)):
            calculator = id(simulator._modules["qparams_calculator"])
            task = None if self._is_hooked or calculator in seen else _lasting_task_of(simulator, tensor)
            seen.add(calculator)
            if task is not None:
                groups.setdefault((task[0], tensor.device), []).append((i, task))
        pieces = [piece for members in groups.values() for piece in launches(members, tensors)]
        self.members = [i for piece in pieces for i, _ in piece]
        self._launches = [
            (launch_of([task for _, task in piece]), [tensors[i] for i, _ in piece]) for piece in pieces
        ]
        self._simulators = [simulators[i] for i in self.members]
        self.tensors = [tensors[i] for i in self.members]
        calculators: list[Any] = [each._modules["qparams_calculator"] for each in self._simulators]
        self._hooks = [vars(each)[name] for each in self._simulators for name in HOOKS]
        self._flags: list[Any] = [each._buffers[name] for each in self._simulators for name in Flags.NAMES]
        flags = iter(self._flags)
        # All of them, not up to the first that cannot be kept.
        can = [
            launch.keep(inputs, list(islice(flags, len(Flags.NAMES) * len(inputs))))
            for launch, inputs in self._launches
        ]
        self._are_guarded = all(can)
        self._places = [
            *chain.from_iterable([places[i] for i in self.members]),
            *(each._buffers for each in self._simulators),
            *(each._buffers for each in calculators),
        ]
        self._values = list(_values(self._places))
        self._versions = list(map(_version, self._flags))
        self._tensor_facts = list(map(_facts, self.tensors))
        self._settings = list(map(settings_of, self._simulators))
        self._quiet = Quiet()

    def are_valid(self) -> bool:
        """Whether nothing has changed."""
        return (
            _are_same(_values(self._places), self._values)
            and all(map(_requires_grad, self.tensors))
            and ((self._are_guarded and reaches_kernels()) or self._are_untouched())
            and not (self._is_hooked or _has_any_global_hook())
            and (self._quiet.lasts() or self._are_unchanged())
        )

    def _are_untouched(self) -> bool:
        """What the native backend makes sure of, if it keeps the launches."""
        return (
            list(map(_version, self._flags)) == self._versions
            and list(map(_facts, self.tensors)) == self._tensor_facts
        )

    def _are_unchanged(self) -> bool:
        """Whether there are the same settings, and nobody listens, after something was assigned somewhere."""
        quiet = Quiet()
        if any(self._hooks) or list(map(settings_of, self._simulators)) != self._settings:
            return False
        self._quiet = quiet
        return True

    def __call__(self) -> list[Tensor] | None:
        """The outputs of the members, as :func:`simulate_together` gives them.

        Returns:
            None if something has changed that :meth:`are_valid` leaves to the native backend.
        """
        outputs: list[Tensor] = []
        for launch, tensors in self._launches:
            outputs += launch(tensors)
        return outputs if len(outputs) == len(self.tensors) else None


def _are_same(some: Iterable[object], others: Iterable[object]) -> bool:
    return all(starmap(is_, zip_longest(some, others, fillvalue=_NOTHING)))


def _values(places: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, places))


def _lasting_task_of(simulator: FakeQuantizeImplBase, tensor: Tensor) -> Task | None:
    """The simulator's task, if it is the same for as long as nothing is assigned."""
    calculator: Any = simulator._modules["qparams_calculator"]
    buffers = [*simulator._buffers.values(), *calculator._buffers.values()]
    if (
        type(calculator) not in _CALCULATORS
        or not tensor.requires_grad
        or is_hooked(simulator)
        or any(buffer is not None and buffer.is_inference() for buffer in buffers)
    ):
        return None
    task = task_of(simulator, tensor)
    if task is None or not foreach.takes(tensor, task[1]):
        return None
    # Views and copies in the place of the buffers would outlive what they were made of.
    is_kept = all(any(value is buffer for buffer in buffers) for value in task[1] if value is not None)
    return task if is_kept else None
