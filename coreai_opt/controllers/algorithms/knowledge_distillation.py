"""Knowledge distillation (Hinton et al., arXiv 1503.02531): the uncompressed model is the teacher."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coreai_opt.controllers.core.api import CompressionLoss, CompressionStage, State
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.config import AlgorithmConfig
from coreai_opt.controllers.core.copies import copy_model
from coreai_opt.controllers.core.hooks import remove_hooks
from coreai_opt.controllers.core.losses import device_of
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics

__all__ = [
    "KnowledgeDistillationBuilder",
    "KnowledgeDistillationConfig",
    "KnowledgeDistillationController",
    "KnowledgeDistillationLoss",
]


@AlgorithmStatistics.register("knowledge_distillation")
@dataclass(frozen=True)
class KnowledgeDistillationStatistics(AlgorithmStatistics):
    """The last loss before scaling to the task's; None before the first."""

    loss_type: str
    scale: float
    last_loss: float | None


class KnowledgeDistillationConfig(AlgorithmConfig):
    """Configuration of distillation.

    Fields:
        type: ``softmax``, cross-entropy to the teacher's probabilities over axis 1; or ``mse``.
        scale: factor on the loss.
        temperature: what logits are divided by, for ``softmax``.
    """

    algorithm: Literal["knowledge_distillation"]
    type: Literal["softmax", "mse"]
    scale: float = 1.0
    temperature: float = Field(default=1.0, gt=0)


class _Lesson:
    """The outputs of the last forward in training mode. A copy of the model shares none of it."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            target = self.teacher(*args, **kwargs)
        self.pairs = [
            (mine, its.detach())
            for mine, its in zip(_tensors(output), _tensors(target), strict=True)
            if mine.requires_grad
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Lesson":
        return _Lesson(self.teacher)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


class KnowledgeDistillationLoss(CompressionLoss):
    """Distance between the student's and the teacher's outputs in the last training forward.

    ``softmax``: ``scale * T**2 * (cross-entropy of softmax(student / T) to softmax(teacher / T), summed and
    divided by the batch)``. ``mse``: ``scale`` times the mean squared difference. Summed over those outputs
    of the student that require a gradient; zero before the first training forward.
    """

    def __init__(self, model: nn.Module, lesson: _Lesson, config: KnowledgeDistillationConfig) -> None:
        self._model = model
        self._lesson = lesson
        self._config = config
        self.last: Tensor | None = None

    def calculate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with its gradient to the student."""
        total = torch.zeros((), device=device_of(self._model))
        for student, teacher in self._lesson.pairs:
            total = total + self._distance(student, teacher)
        self.last = total.detach()
        return total

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        scale, temperature = self._config.scale, self._config.temperature
        if self._config.type == "mse":
            return scale * F.mse_loss(student, teacher)
        axis = 1 if student.dim() > 1 else 0
        batch = student.shape[0] if student.dim() > 1 else 1
        goal = torch.softmax(teacher / temperature, dim=axis)
        cross_entropy = -(goal * torch.log_softmax(student / temperature, dim=axis)).sum() / batch
        return scale * temperature**2 * cross_entropy


class KnowledgeDistillationController(BaseCompressionAlgorithmController):
    """Adds a loss; compresses nothing, so that its rate is 0."""

    def __init__(self, target_model: nn.Module, config: KnowledgeDistillationConfig, lesson: _Lesson) -> None:
        super().__init__(target_model)
        self._config = config
        self._lesson = lesson
        self._loss = KnowledgeDistillationLoss(target_model, lesson, config)

    @property
    def teacher(self) -> nn.Module:
        """The frozen copy of the model as it was."""
        return self._lesson.teacher

    def _get_compression_rate(self) -> float:
        return 0.0

    def compression_stage(self) -> CompressionStage:
        """FULLY_COMPRESSED: there is nothing left to apply."""
        return CompressionStage.FULLY_COMPRESSED

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """See the base."""
        last = self._loss.last  # type: ignore[attr-defined]
        own = KnowledgeDistillationStatistics(
            self._config.type, self._config.scale, None if last is None else float(last)
        )
        return CompressionStatistics(knowledge_distillation=own)

    def strip_model(self, model: nn.Module) -> None:
        """Stop listening to the model."""
        remove_hooks(model, lambda hook: isinstance(hook, _Lesson))


@BaseCompressionAlgorithmBuilder.register("knowledge_distillation")
class KnowledgeDistillationBuilder(BaseCompressionAlgorithmBuilder):
    """Copies the model before any other algorithm touches it.

    The copy's ``state_dict`` belongs to the builder's state: a resumed run has the same teacher, whatever
    weights the model is made with.
    """

    config_type = KnowledgeDistillationConfig
    order = 0

    def _apply_to(self, model: nn.Module) -> None:
        teacher = copy_model(model).eval().requires_grad_(False)
        if self._loaded is not None:
            teacher.load_state_dict(self._loaded["teacher"])
        self._lesson = _Lesson(teacher)
        model.register_forward_hook(self._lesson, with_kwargs=True)

    def build_controller(self, model: nn.Module) -> KnowledgeDistillationController:
        """See the base."""
        return KnowledgeDistillationController(model, self.config, self._lesson)

    def _get_state(self) -> State:
        return {"teacher": dict(self._lesson.teacher.state_dict())}
