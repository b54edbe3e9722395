"""A small network, its data, and runs that are saved and resumed at any step."""

import io
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

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.inner(x))
        return self.head(F.max_pool2d(x, 2).flatten(1))


def make_model(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


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

    def __post_init__(self) -> None:
        state = self.state or {}
        self.controller, self.model = create_compressed_model(
            make_model(self.seed), self.config, state.get("compression")
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

    def save(self) -> bytes:
        stream = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "compression": self.controller.get_compression_state(),
                "step": self.step,
            },
            stream,
        )
        return stream.getvalue()

    @classmethod
    def resumed(cls, config: Any, saved: bytes) -> "Run":
        # Another seed: nothing may depend on the weights that the model is made with.
        return cls(config, seed=7, state=torch.load(io.BytesIO(saved), weights_only=True))


def assert_same_model(actual: nn.Module, expected: nn.Module, what: str = "") -> None:
    mine, its = actual.state_dict(), expected.state_dict()
    assert list(mine) == list(its)
    for name, value in its.items():
        assert torch.equal(mine[name], value), f"{what}: {name} differs"


def assert_same_state(actual: Any, expected: Any, what: str) -> None:
    """Numbers, strings and tensors of two saved states, to the last bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected), f"{what} differs"
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


def check_resume(config: Any) -> None:
    """Save at every step; a run resumed from there goes on as the whole run did, to the last bit.

    After one step it has the state that the whole run had, from which the next one resumes; in mid-epoch, it
    goes on to the end, too.
    """
    whole = Run(config)
    saved, rates = [whole.save()], []
    for step in range(EPOCHS * STEPS):
        whole.train(step + 1)
        saved.append(whole.save())
        rates.append((whole.controller.compression_stage(), whole.controller.compression_rate))
    for step, state in enumerate(saved[:-1]):
        until = len(rates) if step == STEPS + 1 else step + 1
        resumed = Run.resumed(config, state)
        resumed.train(until)
        now, then = (
            torch.load(io.BytesIO(each), weights_only=True) for each in (resumed.save(), saved[until])
        )
        assert_same_state(now, then, f"resumed at step {step}")
        assert torch.equal(torch.stack(resumed.losses), torch.stack(whole.losses[step:until]))
        assert (resumed.controller.compression_stage(), resumed.controller.compression_rate) == rates[
            until - 1
        ]


class RefuseWaits(TorchDispatchMode):
    """Fails on the operators that make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.WAITS or name in ("equal", "masked_select", "_unique2"):
            raise AssertionError(f"{func.name()} makes the host wait")
        return func(*args, **(kwargs or {}))


def check_no_waits(config: Any) -> None:
    """A step, a forward, the loss and a backward do not wait for the device."""
    run = Run(config)
    run.train(1)
    x, y = batch(1)
    with RefuseWaits():
        run.controller.scheduler.step()
        loss = F.cross_entropy(run.model(x), y) + run.controller.loss()
        loss.backward()


def check_compiles(config: Any) -> None:
    """The compressed model is one graph, with the eager one's results."""
    eager, compiled = Run(config), Run(config)
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
