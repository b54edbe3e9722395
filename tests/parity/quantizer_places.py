"""Small models, one question each: which operations and layers get simulators, and along which axes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt.quantization import Quantizer, QuantizerConfig

from .quantizer_configs import eager
from .quantizer_runs import places, quiet
from .snapshots import Raised, freeze

__all__ = ["MATRIX", "PLACES", "Function", "ask", "place"]

Question = tuple[nn.Module, tuple[Any, ...], QuantizerConfig]
PLACES: dict[str, Callable[[], Question]] = {}

MATRIX, SQUARE, IMAGE = torch.ones(3, 4), torch.eye(4), torch.ones(2, 4, 6, 6)
SEQUENCE, VOLUME, INDICES = torch.ones(2, 4, 6), torch.ones(2, 4, 5, 5, 5), torch.tensor([[1, 2]])


def place(name: str) -> dict[str, Any]:
    """Where one question's simulators are, and what the prepared model gives."""
    with quiet(0):
        try:
            model, inputs, config = PLACES[name]()
            prepared = Quantizer(model, config).prepare(inputs)
            output = freeze(prepared(*inputs))
        except Exception as error:  # noqa: BLE001 - compared
            return {"raised": Raised.of(error)}
    return {"places": places(prepared), "keys": tuple(prepared.state_dict()), "output": output}


class Function(nn.Module):
    """A function as a model; keyword arguments become attributes."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def ask(name: str, question: Callable[[], Question]) -> None:
    """Add a question.

    Raises:
        ValueError: there is one of that name.
    """
    if name in PLACES:
        raise ValueError(f"two questions are called {name}")
    PLACES[name] = question


def operation(name: str, function: Callable[..., Any], *inputs: Any) -> None:
    ask(f"operation {name}", lambda: (Function(lambda _, *given: function(*given)), inputs, eager()))


def each_operation(functions: Any, names: str, *inputs: Any) -> None:
    for name in names.split():
        operation(name, of_copies(getattr(functions, name)), *inputs)


def of_copies(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation in place must not write to the inputs."""
    return lambda x, *rest: function(x.clone(), *rest)


def weighted(name: str, function: Callable[..., Any], x: Tensor = MATRIX, **shapes: tuple[int, ...]) -> None:
    def question() -> Question:
        parameters = {key: parameter(*shape) for key, shape in shapes.items()}
        return Function(function, **parameters), (x,), eager()

    ask(f"operation {name}", question)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape))


def assigned(x: Tensor) -> Tensor:
    y = x * 3
    y += x
    y *= 2
    y -= x
    return y


each_operation(torch, "add sub mul matmul div maximum pow mm subtract multiply", SQUARE, SQUARE + 1)
each_operation(torch.Tensor, "add_ sub_ mul_ div_", SQUARE, SQUARE + 1)
each_operation(F, "relu gelu silu softplus sigmoid hardswish dropout normalize", MATRIX)
each_operation(F, "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d", IMAGE, 2)
each_operation(F, "max_pool1d adaptive_avg_pool1d", SEQUENCE, 2)
operation("operators", lambda x, y: (x + y) * (x - y) / (y + 2) @ x, SQUARE, SQUARE + 1)
operation("reflected", lambda x: (1 + x) * (2 - x) + 2 * x, MATRIX)
operation("assigned", assigned, MATRIX)
operation("a number", lambda x: x + 1, MATRIX)
operation("a 0-d tensor", lambda x: x * torch.tensor(2.0), MATRIX)
operation("one element", lambda x: x * torch.ones(1), MATRIX)
operation("two 0-d tensors", lambda x: x.sum() + x.mean(), MATRIX)
operation("integers", lambda x: x.long() + x.long(), MATRIX)
operation("mixed with integers", lambda x: x + x.long(), MATRIX)
operation("booleans", lambda x: (x > 0) * x, MATRIX)
operation("the same tensor twice", lambda x: x + x + x, MATRIX)
operation("keywords", lambda x: torch.add(input=x, other=x, alpha=2), MATRIX)
operation("bfloat16", lambda x: x.bfloat16() + x.bfloat16(), MATRIX)
operation("nothing at all", lambda x: x, MATRIX)
operation("under no_grad", lambda x: torch.no_grad()(lambda: x + x)(), MATRIX)
operation("bmm, cat", lambda x: torch.cat([x.bmm(x), x]), SQUARE[None])
operation("einsum", lambda x: torch.einsum("ij,jk->ik", x, x), SQUARE)
operation("attention", lambda x: F.scaled_dot_product_attention(x, x, x), SEQUENCE)
operation("linear, weight given", F.linear, MATRIX, torch.ones(5, 4))
weighted("linear, own weight", lambda s, x: F.linear(x, s.weight, s.bias), weight=(5, 4), bias=(5,))
weighted("linear, other name", lambda s, x: F.linear(x, s.w), w=(5, 4))
weighted("linear, weight computed", lambda s, x: F.linear(x, s.w.t()), w=(4, 5))
weighted("matmul, own weight", lambda s, x: x @ s.weight, weight=(4, 5))
weighted("mul, own weight", lambda s, x: s.weight * x, weight=(4,))
weighted("conv2d", lambda s, x: torch.conv2d(x, s.weight), IMAGE, weight=(6, 4, 3, 3))
weighted("conv_transpose2d", lambda s, x: F.conv_transpose2d(x, s.weight), IMAGE, weight=(4, 6, 3, 3))
weighted("embedding", lambda s, x: F.embedding(x, s.weight), INDICES, weight=(5, 4))
ask(
    "operation linear, weight of a child",
    lambda: (Function(lambda s, x: F.linear(x, s.a.weight), a=nn.Linear(4, 4)), (MATRIX,), eager()),
)
ask(
    "operation linear, forward of a child",
    lambda: (Function(lambda s, x: s.a.forward(x), a=nn.Linear(4, 4)), (MATRIX,), eager()),
)

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear": (lambda: nn.Linear(4, 6), MATRIX),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), SEQUENCE),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), VOLUME),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), SEQUENCE),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGE),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 3), VOLUME),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), IMAGE),
    "Embedding": (lambda: nn.Embedding(8, 4), INDICES),
    "Bilinear": (lambda: nn.Sequential(Function(lambda s, x: s.b(x, x), b=nn.Bilinear(4, 4, 2))), MATRIX),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "LayerNorm": (lambda: nn.LayerNorm(4), MATRIX),
    "PReLU": (lambda: nn.PReLU(), MATRIX),
    "LSTM": (lambda: nn.LSTM(6, 5, 2), SEQUENCE),
    "GRU": (lambda: nn.GRU(6, 5, bidirectional=True), SEQUENCE),
    "LSTMCell": (lambda: nn.LSTMCell(4, 5), MATRIX),
    "MultiheadAttention": (
        lambda: Function(lambda s, x: s.a(x, x, x), a=nn.MultiheadAttention(6, 2)),
        SEQUENCE,
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(6, 2, 8), SEQUENCE),
}
PRESETS = QuantizerConfig.presets
for layer_name, (make_layer, layer_input) in LAYERS.items():
    ask(f"layer {layer_name}", lambda m=make_layer, x=layer_input: (nn.Sequential(m()), (x,), eager()))
    ask(
        f"default axis {layer_name}",
        lambda m=make_layer, x=layer_input: (m(), (x,), PRESETS.w8(execution_mode="eager")),
    )
    ask(
        f"default axis of blocks {layer_name}",
        lambda m=make_layer, x=layer_input: (
            nn.Sequential(m()),
            (x,),
            PRESETS.w4_per_block(block_size=2, execution_mode="eager"),
        ),
    )
