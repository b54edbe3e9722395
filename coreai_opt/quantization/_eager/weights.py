"""Parametrized weights: simulated together where they are small, and not again while they do not change.

Reading a parametrized weight runs its simulator. Two things make that cheaper, without another result:

- A forward of the whole model that needs gradients first simulates all small weights at once
  (`together_forward`), and the attribute finds them. What it finds is good for that forward only.
- A weight that needs no gradient at the moment is held, and given out until it, the simulator's state or its
  settings change. Changes are told by the tensors' version counters, which writes through ``tensor.data`` do
  not move; ``model.train()`` and ``model.eval()`` let go of what is held.
"""

import weakref
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from coreai_opt.quantization._eager.interception import ReplacedForward, simulate
from coreai_opt.quantization._eager.shared_classes import share_classes
from coreai_opt.quantization._eager.trace import compressions_of
from coreai_opt.quantization.spec._plan import settings_of, simulates_as_built_in
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.qparams_calculator import StaticQParamsCalculator

__all__ = ["Shelf", "WeightRead", "are_saved_tensors_hooked", "gives_the_same_again", "install_reads"]

_version = attrgetter("_version")
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]


def install_reads(model: nn.Module) -> list["WeightRead"]:
    """Put a :class:`WeightRead` on each of the model's weights with a simulator, and return them."""
    reads = []
    for module, _, name, parametrizations in compressions_of(model):
        if _has_one_simulator(parametrizations):
            read = WeightRead(parametrizations)
            read.install()
            _shorten_the_way(type(module), name)
            reads.append(read)
        else:
            ChainRead(parametrizations).install()
    share_classes(model)
    return reads


def _shorten_the_way(cls: type[nn.Module], name: str) -> None:
    """Let the attribute look for a weight that is there before it calls the parametrization.

    Args:
        cls: the class that torch made for the parametrized module, with a property for the weight.
        name: the weight's name.
    """
    given: Any = cls.__dict__[name]
    if isinstance(given, _ShortProperty):
        return

    def read(module: nn.Module) -> Any:
        if not _is_compiling():
            # All in one function: two hundred calls of a helper take longer than the work.
            try:
                parametrizations: Any = module.__dict__["_modules"]["parametrizations"]._modules[name]
            except KeyError:  # removed, from a module that shares its class with others
                raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}") from None
            forward = parametrizations.__dict__.get("forward")
            if type(forward) is WeightRead and (found := forward.shelf.found) is not None:
                output, original, version = found[forward.index]
                if (
                    parametrizations._parameters.get("original") is original
                    and original._version == version
                    and len(parametrizations._modules) == 1
                    and _is_grad_enabled()
                    and _top_hooks(True) is None
                ):
                    return output
        return given.fget(module)

    setattr(cls, name, _ShortProperty(read, given.fset))


class _ShortProperty(property):
    """The property of a parametrized weight, after :func:`_shorten_the_way`."""


def _has_one_simulator(parametrizations: ParametrizationList) -> bool:
    return len(parametrizations) == 1 and isinstance(parametrizations[0], FakeQuantizeImplBase)


class Shelf:
    """Weights that a forward of the whole model has simulated, for those that read them while it runs.

    Attributes:
        found: for each, the output, the weight and its version; None while no forward runs.
        holders: reads that hold an output of their own, which they do not need any more once this is filled.
    """

    __slots__ = ("found", "holders")

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor, int]] | None = None
        self.holders: weakref.WeakSet[WeightRead] = weakref.WeakSet()

    def fill(self, outputs: Iterable[Tensor], originals: Sequence[Tensor]) -> None:
        """Lay out the output of each of the originals, as they are now."""
        while self.holders:
            self.holders.pop().let_go()
        self.found = list(zip(outputs, originals, map(_version, originals), strict=True))

    def clear(self) -> None:
        """Forget them."""
        self.found = None


class _Held:
    """A simulated weight, and all that it depends on."""

    __slots__ = ("inputs", "output", "settings", "versions")

    def __init__(self, original: Tensor, simulator: FakeQuantizeImplBase, output: Tensor) -> None:
        # After the forward, which may have written the state.
        self.inputs = _inputs_of(original, simulator)
        self.settings = _settings_now(simulator)
        self.versions = _versions(self.inputs, output)
        self.output = output

    def is_valid(self, original: Tensor, simulator: FakeQuantizeImplBase) -> bool:
        """Whether nothing has changed."""
        inputs = _inputs_of(original, simulator)
        return (
            len(inputs) == len(self.inputs)
            and all(map(_is_same, inputs, self.inputs))
            and _versions(inputs, self.output) == self.versions
            and _settings_now(simulator) == self.settings
        )


def _is_same(one: object, other: object) -> bool:
    return one is other


def _inputs_of(original: Tensor, simulator: FakeQuantizeImplBase) -> list[Tensor]:
    calculator: Any = simulator._modules["qparams_calculator"]
    buffers = (*simulator._buffers.values(), *calculator._buffers.values())
    return [original, *(buffer for buffer in buffers if buffer is not None)]


def _versions(inputs: list[Tensor], output: Tensor) -> list[int]:
    # Tensors of inference mode count no versions; nobody may write to them outside of it.
    versions = [each._version for each in inputs if not each.is_inference()]
    return versions if output.is_inference() else [*versions, output._version]


def _settings_now(simulator: FakeQuantizeImplBase) -> tuple[Any, ...]:
    return (torch.is_inference_mode_enabled(), simulator.mode_changes, *settings_of(simulator))


class ChainRead(ReplacedForward):
    """The forward of a parametrization list that compresses otherwise: prunes and quantizes, for example."""

    def __call__(self) -> Tensor:
        """The compressed weight. The functions that this calls are none of the module's forward."""
        return self._run_unseen(self.module, (), {})  # type: ignore[no-any-return]


class WeightRead(ReplacedForward):
    """The forward of a parametrization list that is one simulator."""

    def __init__(self, parametrizations: ParametrizationList) -> None:
        super().__init__(parametrizations)
        self._held: _Held | None
        self.place_on(Shelf(), 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_held": None, "shelf": Shelf(), "index": 0}

    def __call__(self) -> Tensor:
        """The simulated weight."""
        module: Any = self.module
        parts = module._modules
        if torch.compiler.is_compiling() or len(parts) != 1:
            return self._run_unseen(module, (), {})  # type: ignore[no-any-return]
        original, simulator = _original_of(module), parts["0"]
        if original.requires_grad and torch.is_grad_enabled():
            self._held = None
            return simulate(simulator, original)
        held = self._held
        if held is not None and held.is_valid(original, simulator):
            return held.output
        output = simulate(simulator, original)
        self._held = None
        if output is not original and gives_the_same_again(simulator):
            self._held = _Held(original, simulator, output)
            self.shelf.holders.add(self)
        return output

    @property
    def places(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where the weight and the simulator are kept."""
        module: Any = self._module()
        return module._parameters, module._modules

    @property
    def is_needed(self) -> bool:
        """Whether the parametrization has not been removed."""
        return self._module() is not None

    @property
    def pair(self) -> tuple[FakeQuantizeImplBase, Tensor]:
        """The simulator and the weight that it simulates."""
        module: Any = self._module()
        return module._modules["0"], _original_of(module)

    def place_on(self, shelf: Shelf, index: int) -> None:
        """Take the weight that a forward of the whole model has simulated from there, if it is there."""
        self.let_go()
        self.shelf = shelf
        self.index = index

    def let_go(self) -> None:
        """Forget the output that is held."""
        self._held = None


def _original_of(parametrizations: nn.Module) -> Any:
    for place in (parametrizations._parameters, parametrizations._buffers):
        if (original := place.get("original")) is not None:
            return original
    return parametrizations.original  # a replica has plain tensors for parameters


def gives_the_same_again(simulator: FakeQuantizeImplBase) -> bool:
    """Whether a second forward on the same tensor has the same result, and changes no state."""
    flags = simulator._flags
    flags.update(simulator._buffers)
    return (
        not (flags.observe and type(simulator._modules["qparams_calculator"]) is not StaticQParamsCalculator)
        and not simulator._forward_hooks
        and not simulator._forward_pre_hooks
        and simulates_as_built_in(simulator)
    )


def are_saved_tensors_hooked() -> bool:
    """Whether autograd hands what it saves to hooks, as it does in a checkpointed part of a model.

    Such a part is computed again in the backward pass, and must save the same tensors then.
    """
    return _top_hooks(True) is not None
