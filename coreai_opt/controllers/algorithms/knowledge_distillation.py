"""Knowledge distillation (Hinton et al., arXiv 1503.02531): the uncompressed model is the teacher."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

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


logger = logging.getLogger(__name__)

_STILL = (_NormBase, _DropoutNd)


class KnowledgeDistillationConfig(AlgorithmConfig):
    """Configuration of distillation.

    Fields:
        type: ``softmax``, cross-entropy to the teacher's probabilities over the classes; or ``mse``.
        scale: factor on the loss.
        temperature: what logits are divided by, for ``softmax``.
        class_axis: axis of the classes, for ``softmax``; None for the last one of outputs with up to three
            axes, and axis 1, that of channels, of those with more.
    """

    algorithm: Literal["knowledge_distillation"]
    type: Literal["softmax", "mse"]
    scale: float = 1.0
    temperature: float = Field(default=1.0, gt=0)
    class_axis: int | None = None

    @model_validator(mode="after")
    def _fits_its_type(self) -> "KnowledgeDistillationConfig":
        if self.type == "mse" and self.model_fields_set & {"temperature", "class_axis"}:
            raise ValueError("temperature and class_axis are for type 'softmax'; mse has neither")
        return self


class _Lesson:
    """The outputs of the last forward in training mode. A copy of the model shares none of it."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self._as_student: dict[str, Any] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        self._follow(module)
        mine = list(_tensors(output))
        with torch.no_grad():
            its = list(_tensors(self.teacher(*args, **kwargs)))
            if not self.teacher.training and [each.shape for each in mine] != [each.shape for each in its]:
                self._train_teacher()
                its = list(_tensors(self.teacher(*args, **kwargs)))
        if len(mine) != len(its):
            raise RuntimeError(
                f"knowledge_distillation: the model returned {len(mine)} tensors and its uncompressed copy "
                f"{len(its)} for the same input"
            )
        # Losses that a model computes itself are no outputs to be learned.
        self.pairs = [
            (student, teacher.detach())
            for student, teacher in zip(mine, its, strict=True)
            if student.requires_grad and student.dim() > 0
        ]
        if not self.pairs and any(each.requires_grad for each in mine):
            raise RuntimeError(
                "knowledge_distillation: in training the model returns nothing but losses, and no output to "
                "learn from the teacher. Let it return its predictions, too"
            )

    def _follow(self, student: nn.Module) -> None:
        """Move and cast the teacher as the student was, since it is no part of it."""
        parameter = next((each for each in student.parameters() if each.is_floating_point()), None)
        if parameter is None:
            return
        now: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
        if self._as_student is None:
            # The teacher is a copy: it was cast as the student until now, but maybe on another device.
            own = next(each for each in self.teacher.parameters() if each.is_floating_point())
            self._as_student = {"device": own.device, "dtype": own.dtype}
        changed = {key: value for key, value in now.items() if self._as_student[key] != value}
        if changed:
            self.teacher.to(**changed)
            self._as_student = now

    def _train_teacher(self) -> None:
        """Let the teacher return what a model in training does; dropout and batch statistics stay off."""
        logger.warning(
            "knowledge_distillation: in training the model returns other outputs than in evaluation; the "
            "teacher runs in training mode from now on, its dropout and batch-norm layers in evaluation mode"
        )
        for module in self.teacher.modules():
            module.training = not isinstance(module, _STILL)

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

    ``softmax``: ``scale * T**2 * (cross-entropy of softmax(student / T) to softmax(teacher / T))``, the mean
    over the samples, and over the positions of sequences and maps. ``mse``: ``scale`` times the mean squared
    difference. Summed over those outputs of the student that require a gradient and are no scalars; zero
    before the first training forward.
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
        axis = self._config.class_axis
        if axis is None:
            axis = -1 if student.dim() <= 3 else 1
        goal = torch.softmax(teacher / temperature, dim=axis)
        cross_entropy = -(goal * torch.log_softmax(student / temperature, dim=axis)).sum(axis).mean()
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
            self._config.type,
            self._config.scale,
            None if last is None else float(last),
            left_whole=self.left_whole,
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
