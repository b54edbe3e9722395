"""A training loop with quantized weights and activations, replayed as a CUDA graph."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.quantization import Quantizer, QuantizerConfig

__all__ = ["training_loop"]

_WARM_UP = 3


def _model(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, width))


def _step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, foreach=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return step


def _captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph; what warms it up is training, too."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss.clone()

    return replay


def _warmed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    for _ in range(_WARM_UP):
        step()
    return step


def training_loop(
    device: str = "cuda", width: int = 1024, batch: int = 256, steps: int = 50, graphs: bool = True
) -> dict[str, Any]:
    """Train the same model in float, quantized, and quantized in a CUDA graph.

    Args:
        device: where.
        width, batch: of three linear layers, and of their inputs.
        steps: after the first ones.
        graphs: whether the device has CUDA graphs.

    Returns:
        ``"milliseconds"``: medians of a step by contender; ``"losses_differ_by"``: the largest difference of
        a loss between the graph's steps and those without it, None without graphs.
    """
    generator = torch.Generator(device=device).manual_seed(1)
    batches = [torch.randn(batch, width, device=device, generator=generator) for _ in range(4)]
    target = torch.randn(batch, width, device=device, generator=generator)
    float_model = _model(width).to(device)
    config = QuantizerConfig(execution_mode="eager")
    quantized = Quantizer(copy.deepcopy(float_model), config).prepare((batches[0],)).train()
    contenders = {"float": (float_model, _warmed), "quantized": (copy.deepcopy(quantized), _warmed)}
    if graphs:
        contenders["quantized, CUDA graph"] = (quantized, _captured)
    milliseconds, losses = {}, {}
    for name, (model, prepare) in contenders.items():
        x = batches[0].clone()
        run = prepare(_step(model, x, target))
        seconds, found = [], []
        for number in range(steps):
            x.copy_(batches[number % len(batches)])
            start = time.perf_counter()
            found.append(run())
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        milliseconds[name] = statistics.median(seconds) * 1e3
        losses[name] = torch.stack(found)
    differ = None
    if graphs:
        differ = float((losses["quantized"] - losses["quantized, CUDA graph"]).abs().max())
    last = {name: float(each[-1]) for name, each in losses.items()}
    return {"milliseconds": milliseconds, "last_losses": last, "losses_differ_by": differ}
