"""Parametrized weights: simulated together where they are small, and not again while they do not change.

Reading a parametrized weight runs its simulator. Two things make that cheaper, without another result:

- A forward of the whole model that needs gradients first simulates all small weights at once
  (`together_forward`), and readers find theirs. What a reader finds is good for that forward only.
- A weight that needs no gradient at the moment is held, and given out until it, the simulator's state or its
  settings change. Changes are told by the tensors' version counters, which writes through ``tensor.data`` do
  not move; ``model.train()`` and ``model.eval()`` let go of what is held.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from coreai_opt.quantization._eager.interception import ReplacedForward, simulate
from coreai_opt.quantization.spec._plan import settings_of, simulates_as_built_in
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.qparams_calculator import StaticQParamsCalculator

__all__ = ["Generation", "WeightRead", "are_saved_tensors_hooked", "gives_the_same_again", "install_reads"]

_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]


def install_reads(model: nn.Module) -> list["WeightRead"]:
    """Put a :class:`WeightRead` on each of the model's weights with a simulator, and return them."""
    reads = []
    for module in model.modules():
        if not is_parametrized(module):
            continue
        for name, parametrizations in module.parametrizations.items():  # type: ignore[union-attr, operator]
            if _has_one_simulator(parametrizations):
                read = WeightRead(parametrizations)
                read.install()
                _shorten_the_way(type(module), name)
                reads.append(read)
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
        if not torch.compiler.is_compiling():
            parametrizations: Any = module.__dict__["_modules"]["parametrizations"]._modules[name]
            forward = parametrizations.__dict__.get("forward")
            if type(forward) is WeightRead and (weight := forward.fresh(parametrizations)) is not None:
                return weight
        return given.fget(module)

    setattr(cls, name, _ShortProperty(read, given.fset))


class _ShortProperty(property):
    """The property of a parametrized weight, after :func:`_shorten_the_way`."""


def _has_one_simulator(parametrizations: ParametrizationList) -> bool:
    return len(parametrizations) == 1 and isinstance(parametrizations[0], FakeQuantizeImplBase)


class Generation:
    """One forward of the whole model."""

    __slots__ = ("is_running",)

    def __init__(self) -> None:
        self.is_running = True


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


class WeightRead(ReplacedForward):
    """The forward of a parametrization list that is one simulator."""

    def __init__(self, parametrizations: ParametrizationList) -> None:
        super().__init__(parametrizations)
        self._held: _Held | None = None
        self._fresh: tuple[Tensor, Tensor, int, Generation] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_held": None, "_fresh": None}

    def __call__(self) -> Tensor:
        """The simulated weight."""
        module: Any = self.module
        parts = module._modules
        if torch.compiler.is_compiling() or len(parts) != 1:
            return self._run_unseen(module, (), {})  # type: ignore[no-any-return]
        original, simulator = _original_of(module), parts["0"]
        if original.requires_grad and torch.is_grad_enabled():
            self._held = None
            fresh = self.fresh(module)
            return simulate(simulator, original) if fresh is None else fresh
        held = self._held
        if held is not None and held.is_valid(original, simulator):
            return held.output
        output = simulate(simulator, original)
        self._held = None
        if output is not original and gives_the_same_again(simulator):
            self._held = _Held(original, simulator, output)
        return output

    def fresh(self, module: Any) -> Tensor | None:
        """What was taken for the forward that is running, if it is good for the reader.

        Args:
            module: the parametrization list whose forward this is.
        """
        taken = self._fresh
        if taken is None or not torch.is_grad_enabled():
            return None
        output, original, version, generation = taken
        if (
            generation.is_running
            and module._parameters.get("original") is original
            and original._version == version
            and len(module._modules) == 1
            and not are_saved_tensors_hooked()
        ):
            return output
        return None

    @property
    def places(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where the weight and the simulator are kept."""
        module: Any = self._module()
        return module._parameters, module._modules

    @property
    def pair(self) -> tuple[FakeQuantizeImplBase, Tensor]:
        """The simulator and the weight that it simulates."""
        module: Any = self._module()
        return module._modules["0"], _original_of(module)

    def take(self, output: Tensor, original: Tensor, version: int, generation: Generation) -> None:
        """Give ``output`` of ``original`` in that version to readers in this generation."""
        self._held = None
        self._fresh = (output, original, version, generation)

    def drop(self) -> None:
        """Forget what was taken."""
        self._fresh = None


def _original_of(parametrizations: nn.Module) -> Any:
    parameter = parametrizations._parameters.get("original")
    return parametrizations._buffers["original"] if parameter is None else parameter


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
