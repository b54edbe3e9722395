"""What post-training algorithms share: their base, and what they are run on."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from coreai_opt._call_inputs import Arguments
from coreai_opt._restoring import training_flags
from coreai_opt._utils.registry_utils import RegisteredConfig
from coreai_opt.quantization._eager.preparation import set_flags, simulators_of
from coreai_opt.quantization.post_training._accumulators import Accumulator
from coreai_opt.quantization.post_training._capture import Capture, columns_of
from coreai_opt.quantization.post_training._layers import Layer, find_layers
from coreai_opt.quantization.post_training._progress import Progress
from coreai_opt.quantization.post_training._stages import Granularity, Stage, check_finite, run_stages

__all__ = ["PostTrainingAlgorithm", "Task"]

S = TypeVar("S", bound=Accumulator)

UNREACHED = (
    "no linear layer or convolution read it in any batch; packed attention and stacked experts do not count "
    "as such in eager mode"
)

logger = logging.getLogger(__name__)


class PostTrainingAlgorithm(RegisteredConfig):
    """Base of the algorithms: an immutable description, named by its key in this registry.

    A subclass implements :meth:`run`, which changes the weights of a prepared model, and what quantizes them.
    """

    @classmethod
    def list_of(cls, given: Any) -> list["PostTrainingAlgorithm"]:
        """The algorithms that a key, an algorithm, or several of these stand for; none for None.

        Raises:
            ValueError: there is no such key.
            TypeError: ``given`` is something else.
        """
        if given is None:
            return []
        several = given if isinstance(given, list | tuple) else [given]
        found = []
        for each in several:
            if isinstance(each, str):
                each = cls.resolve(each)()
            if not isinstance(each, PostTrainingAlgorithm):
                raise TypeError(
                    f"algorithm must be a name, a PostTrainingAlgorithm such as GPTQ(), or a list of these; "
                    f"got {type(each).__name__}"
                )
            found.append(each)
        return found

    @abstractmethod
    def run(self, task: "Task") -> None:
        """Change the model of the task. Its simulators are off meanwhile, and it is in evaluation mode."""

    @property
    def needs_data(self) -> bool:
        """Whether the algorithm looks at inputs."""
        return True


@dataclass
class Task:
    """A model to run an algorithm on.

    Attributes:
        model: prepared.
        batches: arguments of its forwards.
        progress: what has been done before.
        layers: the quantized weights.
        left_out: names of weights that stay as they are, with the reason.
    """

    model: nn.Module
    batches: Sequence[Arguments]
    progress: Progress
    layers: list[Layer] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers, self.left_out = find_layers(self.model)

    def tensors_of(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """The tensors that define these layers: weights, biases, parameters of their quantization."""
        found: dict[str, Tensor] = {}
        for layer in layers:
            found[layer.name] = layer.weight
            if layer.bias is not None:
                found[f"{layer.name}.bias"] = layer.bias
            for name, buffer in layer.simulator.qparams_calculator.named_buffers():
                found[f"{layer.name}.{name}"] = buffer
        return found

    def stages(
        self,
        title: str,
        layers: Sequence[Layer],
        make: type[Accumulator],
        *,
        granularity: Granularity = "block",
        simulate: bool = True,
        keep: bool = True,
        freeze: bool = True,
    ) -> Iterator[Stage]:
        """See :func:`run_stages`. What is done with a stage is kept; what was kept is not handed out again.

        Args:
            title: of the progress bar, and of what is kept.
            layers: which ones.
            make: the statistic.
            granularity: see :func:`run_stages`.
            simulate: see :func:`run_stages`.
            keep: False if a stage changes nothing.
            freeze: whether a stage chooses parameters, which a layer that was kept goes on to keep.
        """
        restored: set[Layer] = set()

        def is_done(readers: Sequence[Layer]) -> bool:
            if restored.issuperset(readers):
                return True
            if not keep or not self.progress.restore(f"{title} {readers[0].name}", self.tensors_of(readers)):
                return False
            restored.update(readers)
            return True

        with tqdm(desc=title, total=len(layers), unit="layer") as bar:
            for stage in run_stages(
                self.model,
                layers,
                self.batches,
                make,
                granularity=granularity,
                is_done=is_done,
                simulate=simulate,
            ):
                if restored.issuperset(stage.layers):
                    for layer in stage.layers if freeze else ():
                        layer.keep_parameters()
                elif stage.statistic.count == 0:
                    for layer in stage.layers:
                        self.left_out[layer.name] = UNREACHED
                else:
                    yield stage
                    if keep:
                        unit = f"{title} {stage.layers[0].name}"
                        self.progress.save(unit, self.tensors_of(stage.layers))
                bar.update(len(stage.layers))

    def measure(self, title: str, layers: Sequence[Layer], make: Callable[[], S]) -> dict[Layer, S]:
        """A small statistic of the inputs of many layers, all in one pass of the float model.

        Layers that no batch reaches are left out.

        Raises:
            ValueError: an input is NaN or infinite.
        """
        found = {layer: make() for layer in layers}
        capture = Capture(layers, lambda layer, given: found[layer].add(columns_of(layer, given)))
        for batch in tqdm(self.batches, desc=title):
            with torch.no_grad(), capture:
                self.model(*batch.args, **batch.kwargs)
        for layer in layers:
            check_finite(layer, found[layer])
            if found[layer].count == 0:
                del found[layer]
                self.left_out[layer.name] = UNREACHED
        return found

    def warn_of_left_out(self, algorithm: str) -> None:
        """Name, in the log, the weights that the algorithm left as they were."""
        for name, reason in self.left_out.items():
            logger.warning(f"{algorithm} left {name} as it was: {reason}")


@contextmanager
def simulators_off(model: nn.Module) -> Iterator[None]:
    """All simulators are off while it is active, and on and not observing afterwards; modules evaluate."""
    try:
        with training_flags(model, False), torch.no_grad():
            set_flags(simulators_of(model), observe=False, simulate=False)
            yield
    finally:
        set_flags(simulators_of(model), observe=False, simulate=True)


def run_algorithms(
    model: nn.Module,
    algorithms: Sequence[PostTrainingAlgorithm],
    batches: Sequence[Arguments],
    state_path: str | Path | None,
) -> Mapping[str, str]:
    """Run one algorithm after another, and return the weights that the last one left as they were."""
    text = "; ".join(repr(each) for each in algorithms)
    progress = Progress(state_path, model, text, batches)
    left_out: dict[str, str] = {}
    with simulators_off(model):
        for algorithm in algorithms:
            task = Task(model, batches, progress)
            if not task.layers:
                raise ValueError(
                    f"{type(algorithm).__name__}: the model has no quantized weight that it could choose"
                )
            algorithm.run(task)
            task.warn_of_left_out(type(algorithm).__name__)
            left_out = task.left_out
            set_flags(simulators_of(model), observe=False, simulate=False)
    return left_out
