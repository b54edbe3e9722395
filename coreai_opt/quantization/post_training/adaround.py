"""AdaRound: whether each weight is rounded up or down is learned."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from coreai_kernels import Format
from coreai_opt.quantization.post_training._accumulators import Gram
from coreai_opt.quantization.post_training._layers import Columns
from coreai_opt.quantization.post_training._stages import Granularity
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm, Task

__all__ = ["AdaRound", "regularizer", "rectified_sigmoid"]

# Stretch of the sigmoid: zeta and gamma of equation 23.
_HIGH, _LOW = 1.1, -0.1
# From where to where the exponent of the regularizer goes, once it is on.
_FIRST_BETA, _LAST_BETA = 20.0, 2.0


@PostTrainingAlgorithm.register("adaround")
class AdaRound(PostTrainingAlgorithm):
    """Learned rounding of integer weights (Nagel et al., arXiv 2004.10568, equations 21 to 24).

    Minimises ``||W X - Q X||^2 + regularization * sum(1 - |2 h(V) - 1|^beta)`` of each layer by Adam, where
    ``Q = s clip(floor(W / s) + h(V))`` and ``X`` is what the quantized layers before it give. The first term
    is the mean over all positions of the calibration data, by way of ``X X^T``: each step sees all of them.

    Fields:
        iterations: steps of Adam for each layer.
        learning_rate: of Adam.
        regularization: see above.
        warm_start: share of the steps without regularization.
        sequential: see :class:`GPTQ`.
    """

    iterations: Annotated[int, Field(ge=1)] = 1000
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    regularization: Annotated[float, Field(ge=0)] = 0.01
    warm_start: Annotated[float, Field(ge=0, lt=1)] = 0.2
    sequential: Granularity = "block"

    def run(self, task: Task) -> None:
        """See the base."""
        layers = []
        for layer in task.layers:
            if layer.plan().values[1] == Format.INT:
                layers.append(layer)
            else:
                task.left_out[layer.name] = "only integers are rounded up or down"
        for stage in task.stages("AdaRound", layers, Gram, granularity=self.sequential):
            products = stage.statistic.matrices()
            for layer in stage.layers:
                self._learn(Columns(layer), products)

    def _learn(self, columns: Columns, products: Tensor) -> None:
        matrix = columns.matrix()
        tables = columns.tables(matrix)
        scale, zero_point, minval = (
            None if each is None else each.t().repeat_interleave(columns.width, 1) for each in tables
        )
        assert scale is not None
        _, _, quant_min, quant_max = columns.plan.values
        offset = 0.0 if minval is None else minval
        shift = quant_min if minval is not None else 0.0 if zero_point is None else zero_point.float()
        low, high = quant_min - shift, quant_max - shift
        down = ((matrix - offset) / scale).floor()
        rest = (matrix - offset) / scale - down

        def weight_of(up: Tensor) -> Tensor:
            return (down + up).clamp(low, high) * scale + offset  # type: ignore[arg-type]

        # The start is the weight as it is: h(V) is what floor takes away.
        start = torch.logit(((rest - _LOW) / (_HIGH - _LOW)).clamp(1e-6, 1 - 1e-6))
        choice = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([choice], lr=self.learning_rate)
        warm = round(self.warm_start * self.iterations)
        for step in tqdm(range(self.iterations), desc=columns.layer.name, leave=False):
            with torch.enable_grad():
                up = rectified_sigmoid(choice)
                error = (weight_of(up) - matrix).reshape(len(products), -1, columns.columns)
                loss = ((error @ products) * error).sum()
                if step >= warm:
                    done = (step - warm) / max(1, self.iterations - warm)
                    beta = _LAST_BETA + (_FIRST_BETA - _LAST_BETA) * (1 - done)
                    loss = loss + self.regularization * regularizer(up, beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        columns.write(weight_of((rectified_sigmoid(choice.detach()) >= 0.5).float()), tables)


def rectified_sigmoid(choice: Tensor) -> Tensor:
    """Equation 23 of arXiv 2004.10568: a sigmoid from -0.1 to 1.1, clipped to [0, 1]."""
    return (choice.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def regularizer(up: Tensor, beta: float) -> Tensor:
    """Equation 24 of arXiv 2004.10568: ``sum(1 - |2 up - 1|^beta)``, zero once all are 0 or 1."""
    return (1 - (2 * up - 1).abs().pow(beta)).sum()
