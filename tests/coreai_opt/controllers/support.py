"""A small network, its data, and runs that are saved and resumed at any step."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from coreai_opt.controllers import create_compressed_model, register_default_init_args

EPOCHS, STEPS = 3, 3


class Net(nn.Module):
    """Convolutions with batch norm and a skip connection, then a linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.inner(x))
        return self.head(F.max_pool2d(x, 2).flatten(1))


def make_model(seed: int = 0, width: int = 8) -> Net:
    torch.manual_seed(seed)
    return Net(width)


class Attention(nn.Module):
    """Attention of 4 heads with 4 features each, written so that it runs with any number of heads."""

    def __init__(self, heads: int = -1) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 16) for _ in range(3))
        self.output = nn.Linear(16, 8)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, 4).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.output(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Rows of images as tokens; one block of attention and a gated feed-forward part; 10 classes."""

    def __init__(self, heads: int = -1) -> None:
        super().__init__()
        self.attention = Attention(heads)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.classify = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.squeeze(1)
        x = x + self.attention(self.norm(x))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.classify(x.mean(1))


def make_transformer(seed: int = 0, heads: int = -1) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(heads)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)


def loader() -> list[tuple[Tensor, Tensor]]:
    return [batch(-step - 1) for step in range(STEPS)]


def configured(*algorithms: dict[str, Any], **more: Any) -> Any:
    config = {
        "input_info": {"sample_size": [2, 1, 8, 8]},
        "compression": [dict(each) for each in algorithms],
        **more,
    }
    return register_default_init_args(config, loader())


@dataclass
class Run:
    """A training run that can be saved and resumed."""

    config: Any
    seed: int = 0
    state: dict[str, Any] | None = None
    losses: list[Tensor] = field(default_factory=list)
    step: int = 0
    make: Callable[[int], nn.Module] = make_model

    def __post_init__(self) -> None:
        state = self.state or {}
        self.controller, self.model = create_compressed_model(
            self.make(self.seed), self.config, state.get("compression")
        )
        if state:
            self.model.load_state_dict(state["model"])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def train(self, until: int = EPOCHS * STEPS) -> None:
        self.model.train()
        while self.step < until:
            if self.step % STEPS == 0:
                self.controller.scheduler.epoch_step()
            self.controller.scheduler.step()
            x, y = batch(self.step)
            loss = F.cross_entropy(self.model(x), y) + self.controller.loss()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.detach())
            self.step += 1

    def snapshot(self) -> dict[str, Any]:
        """What is saved."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "compression": self.controller.get_compression_state(),
            "step": self.step,
        }

    def save(self) -> bytes:
        stream = io.BytesIO()
        torch.save(self.snapshot(), stream)
        return stream.getvalue()

    @classmethod
    def resumed(cls, config: Any, saved: bytes, make: Callable[[int], nn.Module] = make_model) -> "Run":
        # Another seed: nothing may depend on the weights that the model is made with.
        return cls(config, seed=7, make=make, state=torch.load(io.BytesIO(saved), weights_only=True))


def assert_same_state(actual: Any, expected: Any, what: str) -> None:
    """Numbers, strings and tensors of two saved states, to the last bit."""
    if isinstance(expected, Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
        assert actual.numpy().tobytes() == expected.numpy().tobytes(), f"{what} differs"
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), what
        for key, value in expected.items():
            assert_same_state(actual[key], value, f"{what}, {key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), what
        for index, (mine, its) in enumerate(zip(actual, expected, strict=True)):
            assert_same_state(mine, its, f"{what}, {index}")
    else:
        assert actual == expected, f"{what}: {actual} instead of {expected}"


class RefuseWaits(TorchDispatchMode):
    """Fails on the operators that make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.WAITS or name in ("equal", "masked_select", "_unique2"):
            raise AssertionError(f"{func.name()} makes the host wait")
        return func(*args, **(kwargs or {}))


def check_no_waits(config: Any, make: Callable[[int], nn.Module] = make_model) -> None:
    """A step, a forward, the loss and a backward do not wait for the device."""
    run = Run(config, make=make)
    run.train(1)
    x, y = batch(1)
    with RefuseWaits():
        run.controller.scheduler.step()
        loss = F.cross_entropy(run.model(x), y) + run.controller.loss()
        loss.backward()


def check_compiles(config: Any, make: Callable[[int], nn.Module] = make_model) -> None:
    """The compressed model is one graph, with the eager one's results."""
    eager, compiled = (Run(config, make=make) for _ in range(2))
    torch._dynamo.reset()
    run = torch.compile(compiled.model, fullgraph=True, backend="aot_eager")
    for each in (eager, compiled):
        each.controller.scheduler.epoch_step()
        each.controller.scheduler.step()
    x, y = batch(0)
    losses = []
    for each, model in ((eager, eager.model), (compiled, run)):
        loss = F.cross_entropy(model(x), y) + each.controller.loss()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    for mine, its in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
