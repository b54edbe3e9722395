from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.controllers import CompressionStage, create_compressed_model
from coreai_opt.controllers.schedules.curves import biased_exponential
from coreai_opt.controllers.structures.channels import find_channels

from ..support import check_compiles, check_no_waits, configured, make_model


class Residual(nn.Module):
    """A residual block with a depthwise convolution, then strided branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.expand_norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.contract = nn.Conv2d(32, 16, 1)
        self.left = nn.Conv2d(16, 24, 3, stride=2)
        self.right = nn.ConvTranspose2d(16, 24, 3, stride=1, padding=1)
        self.head = nn.Linear(24 * 9 + 24 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(self.expand_norm(self.expand(x)))
        x = F.relu(x + self.contract(F.relu(self.depthwise(y))))
        left, right = self.left(x).flatten(1), self.right(x).flatten(1)
        return self.head(torch.cat([left, right], dim=1))


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    return model


EVERYTHING = {"prune_first_conv": True, "prune_downsample_convs": True}


def pruning(level: float = 0.0, **params: Any) -> dict[str, Any]:
    return {"algorithm": "filter_pruning", "pruning_init": level, "params": params}


def created(level: float, **params: Any) -> tuple[Any, Any]:
    config = {"input_info": {"sample_size": [2, 3, 8, 8]}, "compression": pruning(level, **params)}
    return create_compressed_model(residual(), config)


def test_dependent_layers_are_found() -> None:
    channels = find_channels(residual(), (torch.randn(2, 3, 8, 8),), {})
    found = {tuple(each.producers): each for each in channels.clusters}
    assert set(found) == {("stem", "contract"), ("expand",), ("left",), ("right",)}
    assert found["stem", "contract"].followers == ["stem_norm"]
    assert found["stem", "contract"].reads_input
    assert found["expand",].followers == ["expand_norm", "depthwise"]
    assert found["left",].strided
    assert [span.entries for span in channels.consumers["head"]] == [24 * 9, 24 * 64]


@pytest.mark.parametrize("importance", ["L1", "L2", "geometric_median"])
@pytest.mark.parametrize("ranking", [{}, {"all_weights": True}])
def test_strip_shrinks_and_keeps_the_outputs(importance: str, ranking: dict[str, bool]) -> None:
    controller, model = created(0.5, filter_importance=importance, **EVERYTHING, **ranking)
    x = torch.randn(2, 3, 8, 8)
    model.eval()
    stripped = controller.strip()
    torch.testing.assert_close(stripped(x), model(x), rtol=1e-4, atol=1e-5)
    statistics = controller.statistics().filter_pruning
    parameters = sum(parameter.numel() for parameter in stripped.parameters())
    assert parameters == statistics.parameters < statistics.full_parameters
    assert stripped.depthwise.groups == stripped.expand.out_channels < 32
    assert controller.compression_rate == statistics.share_of_filters > 0.25
    controller.prepare_for_export()
    torch.testing.assert_close(model(x), stripped(x))


def test_the_least_important_filters_go() -> None:
    model = residual()
    with torch.no_grad():
        model.expand.weight[::2] *= 0.01
    config = {"input_info": {"sample_size": [2, 3, 8, 8]}, "compression": pruning(0.5)}
    controller, model = create_compressed_model(model, config)
    assert controller.masks()["expand"].tolist() == [0.0, 1.0] * 16
    assert list(controller.masks()) == ["expand", "right"]


def test_the_geometric_median_finds_filters_that_others_can_replace() -> None:
    model = residual()
    with torch.no_grad():
        model.expand.weight[:16] = 2 + 0.01 * torch.randn(16, 16, 3, 3)
        model.expand.weight[16:] = 2 * torch.randn(16, 16, 3, 3)
    config = {
        "input_info": {"sample_size": [2, 3, 8, 8]},
        "compression": pruning(0.5, filter_importance="geometric_median"),
    }
    controller, _ = create_compressed_model(model, config)
    assert controller.masks()["expand"].tolist() == [0.0] * 16 + [1.0] * 16


def test_kept_filters_are_multiples_of_eight() -> None:
    controller, _ = created(0.0, **EVERYTHING)
    for level in (0.1, 0.3, 0.55, controller.maximal_compression_rate):
        controller.compression_rate = level
        kept = {int(mask.sum()) for mask in controller.masks().values()}
        assert all(count % 8 == 0 and count > 0 for count in kept)
    with pytest.raises(ValueError, match="compression_rate must be in"):
        controller.compression_rate = 0.99
    with pytest.raises(TypeError, match="compression_rate must be a number; got 'half'"):
        controller.compression_rate = "half"


@pytest.mark.parametrize("ranking", [{}, {"all_weights": True}])
def test_a_flops_target_is_met_by_the_fewest_filters(ranking: dict[str, bool]) -> None:
    controller, _ = created(0.4, pruning_flops_target=0.4, **EVERYTHING, **ranking)
    statistics = controller.statistics().filter_pruning
    assert controller.compression_rate == 1 - statistics.flops / statistics.full_flops >= 0.4
    assert controller.maximal_compression_rate < 1
    shapes = [(64, 16 * 27), (64, 32 * 144), (64, 32 * 9), (64, 16 * 32), (9, 24 * 144), (64, 24 * 144)]
    full = 2 * 2 * (sum(places * weights for places, weights in shapes) + 10 * 24 * 73)
    assert statistics.full_flops == full


def test_one_target() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        created(0.0, pruning_target=0.5, pruning_flops_target=0.5)


def test_channels_that_reach_the_output_or_mix_stay() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(16, 16, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.softmax(self.a(x), dim=1)
            return self.c(torch.sigmoid(self.b(y)))

    clusters = find_channels(Mixing(), (torch.randn(1, 16, 4, 4),), {}).clusters
    assert clusters == []
    config = {"input_info": {"sample_size": [1, 16, 4, 4]}, "compression": pruning(0.5)}
    with pytest.raises(ValueError, match="finds no filters to prune"):
        create_compressed_model(Mixing(), config)


def test_a_gate_that_multiplies_may_be_pruned_with_what_it_gates() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gate, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(x) * torch.sigmoid(self.gate(x)))

    clusters = find_channels(Gated(), (torch.randn(1, 3, 4, 4),), {}).clusters
    assert [each.producers for each in clusters] == [["body", "gate"]]


def test_schedules() -> None:
    for schedule, golden in (
        ("baseline", [0.0, 0.0, 0.75, 0.75]),
        ("exponential", [0.0, 0.0, 0.0, 1 - 0.25 ** (1 / 8)]),
        ("exponential_with_bias", [0.0, 0.0, 0.0, biased_exponential(1, 0.0, 0.75, 8)]),
    ):
        controller, _ = created(
            0.0, schedule=schedule, pruning_target=0.75, num_init_steps=2, pruning_steps=9
        )
        levels = []
        for _ in range(4):
            controller.scheduler.epoch_step()
            levels.append(controller.level)
        assert levels == pytest.approx(golden), schedule
        controller.scheduler.epoch_step(10)
        assert controller.level == pytest.approx(0.75)
        assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED


def test_pruning_quantization_and_distillation_together() -> None:
    algorithms = (
        {"algorithm": "quantization"},
        pruning(0.5, prune_first_conv=True),
        {"algorithm": "knowledge_distillation", "type": "mse"},
    )
    model = Net16()
    controller, model = create_compressed_model(model.eval(), configured(*algorithms))
    x = torch.randn(2, 1, 8, 8)
    stripped = controller.strip()
    torch.testing.assert_close(stripped(x), model(x), rtol=1e-3, atol=1e-3)
    assert stripped.inner.weight.shape == (8, 8, 3, 3)
    before = model(x)
    controller.prepare_for_export()
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)


class Net16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.inner(x)), 4).flatten(1))


QUICK = {"prune_first_conv": True, "pruning_target": 0.5, "pruning_steps": 2}


def test_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    check_no_waits(configured(pruning(**QUICK)))
    check_no_waits(configured(pruning(**QUICK, update_per_optimizer_step=True)))


def test_compiles() -> None:
    check_compiles(configured(pruning(**QUICK)))


def test_the_model_is_unchanged_by_the_search() -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_channels(model, (torch.randn(2, 1, 8, 8),), {})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
