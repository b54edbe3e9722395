"""Random sequences of what a user does with a compressor, and what is seen after each step.

Public names only: the same file runs on both packages.
"""

import copy
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt import ExportBackend
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization.spec import PalettizationSpec
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from coreai_opt.pruning.spec import PruningSpec
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationScheme,
    QuantizationSpec,
)

from .runner import captured_log
from .snapshots import Raised, freeze

__all__ = ["KINDS", "WORDS", "Session", "answer", "draw"]


class Network(nn.Module):
    """A convolution, a norm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(36, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.fc(x.flatten(1))))


def _weights(spec: QuantizationSpec) -> QuantizerConfig:
    module = ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec})
    return QuantizerConfig(global_config=module, execution_mode="eager")


def _everything(weight: QuantizationSpec, activation: QuantizationSpec) -> QuantizerConfig:
    specs: dict[str, Any] = {"op_input_spec": {"*": activation}, "op_output_spec": {"*": activation}}
    module = ModuleQuantizerConfig(op_state_spec={"weight": weight}, **specs)
    return QuantizerConfig(global_config=module, execution_mode="eager")


def _rows(dtype: Any) -> QuantizationSpec:
    return QuantizationSpec(dtype=dtype, granularity=PerChannelGranularity(axis=0))


def _average(scheme: QuantizationScheme, dtype: Any) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=dtype,
        qscheme=scheme,
        granularity=PerTensorGranularity(),
        qparam_calculator_cls="moving_average",
    )


def _pruner(sparsity: float) -> Callable[[nn.Module], Any]:
    entry = ModuleMagnitudePrunerConfig(op_state_spec={"weight": PruningSpec(target_sparsity=sparsity)})
    return lambda model: MagnitudePruner(model, MagnitudePrunerConfig(global_config=entry))


def _palettizer(bits: int) -> Callable[[nn.Module], Any]:
    entry = ModuleKMeansPalettizerConfig(op_state_spec={"weight": PalettizationSpec(n_bits=bits)})
    return lambda model: KMeansPalettizer(model, KMeansPalettizerConfig(global_config=entry))


_ASYMMETRIC, _SYMMETRIC = QuantizationScheme.ASYMMETRIC, QuantizationScheme.SYMMETRIC

KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "int4 weights": lambda model: Quantizer(model, _weights(_rows(torch.int4))),
    "int8 blocks": lambda model: Quantizer(
        model,
        _weights(QuantizationSpec(dtype=torch.int8, granularity=PerBlockGranularity(axis=1, block_size=2))),
    ),
    "fp8 weights": lambda model: Quantizer(model, _weights(_rows(torch.float8_e4m3fn))),
    "int8 everywhere": lambda model: Quantizer(
        model, _everything(_rows(torch.int8), _average(_SYMMETRIC, torch.int8))
    ),
    "uint8 activations": lambda model: Quantizer(
        model, _everything(_rows(torch.int4), _average(_ASYMMETRIC, torch.uint8))
    ),
    "half pruned": _pruner(0.5),
    "most pruned": _pruner(0.9),
    "4-bit palettes": _palettizer(4),
    "2-bit palettes": _palettizer(2),
}


class Session:
    """A compressor, its model, and the seeded generator of its inputs."""

    def __init__(self, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.kind = kind
        self.generator = torch.Generator().manual_seed(seed)
        self.model: nn.Module = Network()
        self.compressor = KINDS[kind](self.model)
        self.finalized = False

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.model.parameters())

    def batch(self) -> Tensor:
        x = torch.randn(3, 2, 5, 5, generator=self.generator) * 2
        return x.to(self.dtype)

    def play(self, word: str) -> Any:
        """What the word's action shows, or its exception."""
        with warnings.catch_warnings(), captured_log():
            warnings.simplefilter("ignore")
            try:
                seen = WORDS[word](self)
            except Exception as error:  # noqa: BLE001 - which exception it is, is what we compare
                return {"raised": Raised.of(error)}
            return freeze({"seen": seen, "state": self.model.state_dict()})


def prepare(session: Session) -> None:
    """In evaluation mode, for Apple's pruner and palettizer update batch norms while they prepare."""
    was_training = session.model.training
    session.model.eval()
    session.model = session.compressor.prepare((session.batch(),))
    session.model.train(was_training)


def forward(session: Session) -> Tensor:
    return session.model(session.batch())


def without_gradient(session: Session) -> Tensor:
    with torch.no_grad():
        return session.model(session.batch())


def train(session: Session) -> dict[str, Any]:
    """One step in the compressor's training mode."""
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
    mode = getattr(session.compressor, "training_mode", nullcontext)
    with mode():
        session.model.train()
        loss = session.model(session.batch()).float().square().mean()
        loss.backward()
        gradients = {name: each.grad for name, each in session.model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        if not isinstance(session.compressor, Quantizer):
            session.compressor.step()
    return {"loss": loss, "gradients": gradients}


def calibrate(session: Session) -> Tensor:
    with session.compressor.calibration_mode():
        return session.model(session.batch())


def reload(session: Session) -> Tensor:
    """The state goes into another model, prepared alike, that has seen an input; that one goes on."""
    state = {name: value.clone() for name, value in session.model.state_dict().items()}
    model: nn.Module = Network()
    compressor = KINDS[session.kind](model.eval())
    model = compressor.prepare((session.batch(),))
    model(session.batch())
    model.load_state_dict(state)
    session.model, session.compressor = model.to(session.dtype).train(session.model.training), compressor
    return model(session.batch())


def copied(session: Session) -> bool:
    """What happens to a copy leaves the original alone."""
    before = copy.deepcopy(session.model.state_dict())
    other = copy.deepcopy(session.model)
    other(session.batch())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    after = session.model.state_dict()
    return all(torch.equal(before[name], after[name]) for name in before)


def hooked(session: Session) -> Tensor:
    """A forward with a hook that changes an activation."""
    layer = dict(session.model.named_modules())["fc"]
    handle = layer.register_forward_hook(lambda module, args, output: output * 0.5)
    try:
        return session.model(session.batch())
    finally:
        handle.remove()


def backward_twice(session: Session) -> dict[str, Any]:
    output = session.model(session.batch()).sum()
    parameters = [each for each in session.model.parameters() if each.requires_grad]
    first = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(output, parameters, allow_unused=True)
    return {"first": first, "second": second}


def assigned(session: Session) -> Tensor:
    """The weights are written to in place, as optimizers do."""
    with torch.no_grad():
        for parameter in session.model.parameters():
            parameter.mul_(-0.75)
    return session.model(session.batch())


def finalize(session: Session) -> Tensor:
    session.model = session.compressor.finalize(backend=ExportBackend.Torch)
    session.finalized = True
    return session.model(session.batch())


def _do(action: Callable[[Session], Any]) -> Callable[[Session], None]:
    def word(session: Session) -> None:
        action(session)

    return word


WORDS: dict[str, Callable[[Session], Any]] = {
    "prepare": prepare,
    "forward": forward,
    "without_gradient": without_gradient,
    "train": train,
    "calibrate": calibrate,
    "step": _do(lambda session: session.compressor.step()),
    "observer_on": _do(lambda session: session.compressor.enable_observer()),
    "observer_off": _do(lambda session: session.compressor.disable_observer()),
    "fake_quant_on": _do(lambda session: session.compressor.enable_fake_quant()),
    "fake_quant_off": _do(lambda session: session.compressor.disable_fake_quant()),
    "train_flag": _do(lambda session: session.model.train()),
    "eval_flag": _do(lambda session: session.model.eval()),
    "bfloat16": _do(lambda session: session.model.to(torch.bfloat16)),
    "float16": _do(lambda session: session.model.to(torch.float16)),
    "float32": _do(lambda session: session.model.to(torch.float32)),
    "reload": reload,
    "copied": copied,
    "hooked": hooked,
    "backward_twice": backward_twice,
    "assigned": assigned,
    "finalize": finalize,
}
# What both packages are documented to do alike: without casts, prepared once, and finalized at the end.
COMMON = [word for word in WORDS if word not in ("prepare", "bfloat16", "float16", "float32", "finalize")]


def draw(seed: int) -> tuple[str, list[str]]:
    """A kind and the words of a sequence that both packages know."""
    choose = random.Random(seed)
    words = ["prepare", "forward", *choose.choices(COMMON, k=choose.randint(3, 10))]
    return choose.choice(list(KINDS)), words + ["finalize"] * (choose.random() < 0.5)


def run(seed: int) -> list[Any]:
    """What each word of the sequence showed."""
    kind, words = draw(seed)
    session = Session(kind, seed)
    return [{"word": word, "kind": kind} | session.play(word) for word in words]


def answer(job: dict[str, Any]) -> Any:
    """The logs of the sequences that the job names."""
    return {seed: run(seed) for seed in job["seeds"]}
