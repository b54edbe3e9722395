import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coreai_opt.controllers import create_compressed_model

from ..support import check_compiles, check_no_waits, configured, make_model


def distillation(kind: str = "softmax", **more: object) -> dict[str, object]:
    return {"algorithm": "knowledge_distillation", "type": kind, **more}


SPARSE = {"algorithm": "magnitude_sparsity", "params": {"sparsity_target_epoch": 2}}


def test_softmax_is_the_cross_entropy_of_softened_probabilities() -> None:
    controller, model = create_compressed_model(
        make_model().eval(), configured(distillation(scale=3.0, temperature=2.0))
    )
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    model.train()
    x = torch.randn(4, 1, 8, 8)
    output = model(x)
    goal = F.softmax(controller.teacher(x) / 2, dim=1)
    expected = 3 * 2**2 * F.cross_entropy(output / 2, goal)
    torch.testing.assert_close(controller.loss(), expected)


def test_mse_is_the_scaled_mean_squared_difference() -> None:
    controller, model = create_compressed_model(make_model(), configured(distillation("mse", scale=0.5)))
    x = torch.randn(4, 1, 8, 8)
    output = model.train()(x)
    torch.testing.assert_close(controller.loss(), 0.5 * F.mse_loss(output, controller.teacher(x)))


def test_only_outputs_with_a_gradient_count() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            y = self.layer(x)
            return {"logits": y, "more": [y.detach() * 2, y.argmax(1)]}

    controller, model = create_compressed_model(Two(), configured(distillation("mse")))
    with torch.no_grad():
        model.layer.weight.add_(1)
    x = torch.randn(5, 3)
    output = model.train()(x)["logits"]
    torch.testing.assert_close(controller.loss(), F.mse_loss(output, controller.teacher(x)["logits"]))


def test_no_loss_before_a_training_forward() -> None:
    controller, model = create_compressed_model(make_model(), configured(distillation()))
    model.eval()(torch.randn(2, 1, 8, 8))
    loss = controller.loss()
    assert loss.shape == ()
    assert float(loss) == 0
    assert controller.statistics().knowledge_distillation.last_loss == 0


def test_a_copy_does_not_listen() -> None:
    controller, model = create_compressed_model(make_model(), configured(distillation()))
    model.train()(torch.randn(2, 1, 8, 8))
    before = float(controller.loss())
    stripped = controller.strip()
    assert not stripped._forward_hooks
    stripped.train()(torch.randn(2, 1, 8, 8))
    assert float(controller.loss()) == before


def test_the_teacher_learns_nothing_and_is_not_in_the_model() -> None:
    controller, model = create_compressed_model(make_model(), configured(distillation()))
    assert not any(parameter.requires_grad for parameter in controller.teacher.parameters())
    assert list(model.state_dict()) == list(make_model().state_dict())
    assert not controller.teacher.training


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="temperature"):
        create_compressed_model(make_model(), configured(distillation(temperature=0)))
    with pytest.raises(ValueError, match="softmax"):
        create_compressed_model(make_model(), configured(distillation("kl")))


def test_nothing_waits() -> None:
    check_no_waits(configured(distillation(), SPARSE))


def test_compiles() -> None:
    check_compiles(configured(distillation(), SPARSE))


@pytest.mark.parametrize(
    ("shape", "more", "axis"),
    [
        ((4, 10), {}, 1),
        ((2, 7, 10), {}, 2),
        ((2, 10, 3, 5), {}, 1),
        ((2, 7, 10), {"class_axis": 1}, 1),
        ((2, 3, 5, 10), {"class_axis": -1}, 3),
    ],
)
def test_softmax_is_over_the_classes_and_a_mean_over_all_positions(
    shape: tuple[int, ...], more: dict[str, int], axis: int
) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.values = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.values * self.layer(x).sum()

    torch.manual_seed(0)
    config = {"algorithm": "knowledge_distillation", "type": "softmax", "temperature": 2.0, **more}
    controller, model = create_compressed_model(Logits(), {"compression": config})
    with torch.no_grad():
        model.values.mul_(3)
    x = torch.ones(1, 1)
    student, teacher = model.train()(x), controller.teacher(x)
    classes = shape[axis]
    mine = student.movedim(axis, -1).reshape(-1, classes) / 2
    its = teacher.movedim(axis, -1).reshape(-1, classes) / 2
    expected = 4 * F.cross_entropy(mine, its.softmax(-1))
    torch.testing.assert_close(controller.loss(), expected)


class Auxiliary(nn.Module):
    """Returns more in training than in evaluation: an output, a loss, or nothing but losses."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.norm, self.head, self.extra = (
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(4, 3)
        )  # fmt: skip
        self.how = how

    def forward(self, x: torch.Tensor) -> object:
        x = F.dropout(self.norm(self.body(x)), 0.0, self.training)
        y = self.head(x)
        if not self.training:
            return y
        if self.how == "output":
            return y, self.extra(x)
        loss = y.square().mean()
        return {"loss": loss, "logits": y} if self.how == "loss" else {"loss": loss}


@pytest.mark.parametrize(("how", "pairs"), [("output", 2), ("loss", 1)])
def test_outputs_that_are_there_in_training_alone(
    how: str, pairs: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    distilled = {"algorithm": "knowledge_distillation", "type": "mse"}
    controller, model = create_compressed_model(Auxiliary(how), {"compression": distilled})
    running = controller.teacher.norm.running_mean.clone()
    x = torch.randn(8, 4)
    with torch.no_grad():
        for layer in (model.head, model.extra):
            layer.bias.add_(1.0)
    model.train()(x)
    model(x)
    assert len(controller._lesson.pairs) == pairs
    loss = controller.loss()
    assert 0.5 * pairs < float(loss.detach()) < 4 * pairs
    loss.backward()
    assert bool(model.head.bias.grad.any())
    assert torch.equal(controller.teacher.norm.running_mean, running)  # its statistics stay as they were
    assert caplog.text.count("the teacher runs in training mode") == 1


def test_a_model_that_returns_nothing_but_losses_is_refused() -> None:
    distilled = {"algorithm": "knowledge_distillation", "type": "mse"}
    _, model = create_compressed_model(Auxiliary("losses"), {"compression": distilled})
    with pytest.raises(RuntimeError, match="nothing but losses"):
        model.train()(torch.randn(8, 4))
