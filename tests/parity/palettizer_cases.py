"""Which models are palettized, how, and with which values: the cases of `palettizer_runs`."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CASES", "TRAINED", "Case", "build_model"]


@dataclass(frozen=True)
class Case:
    """A model, how it is palettized, and which values are given to it."""

    name: str
    model: str = "linear"
    spec: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    weights: str = "normal"
    sensitive: bool = False


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)[0]


class Shared(nn.Module):
    """Two layers that share a weight, and a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.weight = nn.Parameter(torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.second(self.first(x)), self.weight)


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 36, 8),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)), (3, 24)),
    "convolutions": (_convolutions, (2, 4, 3, 3)),
    "attention": (Attention, (2, 5, 8)),
    "shared": (Shared, (3, 8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 6, 3)), (2, 4, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.ConvTranspose3d(4, 6, 2)), (1, 2, 4, 4, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 4)), (3,)),
}


def _grouped(axis: int | None, size: int) -> dict[str, Any]:
    return {"type": "per_grouped_channel", "axis": axis, "group_size": size}


def _all_cases() -> Iterator[Case]:
    for n_bits, fast, dtype in itertools.product(
        (1, 2, 3, 4, 6, 8), (True, False), ("float32", "float16", "bfloat16", "float64")
    ):
        if dtype == "float32" or n_bits in (2, 4):
            name = f"{n_bits} bits, {dtype}, {'fast' if fast else 'exact'}"
            yield Case(name, spec={"n_bits": n_bits}, config={"enable_fast_kmeans_mode": fast}, dtype=dtype)
    for precision in (1, 2, 3, 6):
        yield Case(f"{precision} decimals", spec={"n_bits": 3}, config={"rounding_precision": precision})
    for axis, size, model in itertools.product((None, 0, 1), (2, 3, 4), ("linear", "convolutions")):
        yield Case(
            f"groups of {size}, axis {axis}, {model}",
            model,
            {"n_bits": 2, "granularity": _grouped(axis, size)},
        )
    for model in ("attention", "shared", "conv1d", "conv3d", "embedding"):
        yield Case(model, model, {"n_bits": 2})
        yield Case(f"{model}, groups", model, {"n_bits": 2, "granularity": _grouped(None, 2)})
    scaled = {"n_bits": 2, "enable_per_channel_scale": True}
    for model in ("linear", "convolutions", "attention"):
        yield Case(f"per-channel scale, {model}", model, scaled)
        yield Case(f"per-channel scale, groups, {model}", model, scaled | {"granularity": _grouped(1, 2)})
    yield Case("per-channel scale, bfloat16", spec=scaled, dtype="bfloat16")
    for dtype, qscheme in itertools.product(
        ("int8", "uint8", "float8_e4m3fn", "float8_e5m2"), ("symmetric", "asymmetric")
    ):
        if not (dtype.startswith("float") and qscheme == "asymmetric"):
            lut = {"dtype": dtype, "qscheme": qscheme}
            yield Case(
                f"LUT in {dtype}, {qscheme}",
                spec={"n_bits": 3, "lut_qspec": lut, "granularity": _grouped(0, 8)},
            )
    for weights in ("constant", "few values", "zeros", "a zero row", "ties"):
        for spec in ({"n_bits": 2}, scaled):
            yield Case(f"{weights}, {spec}", spec=spec, weights=weights)
    for fast, spec in itertools.product(
        (True, False), ({"n_bits": 2}, {"n_bits": 4, "granularity": _grouped(0, 4)}, scaled)
    ):
        yield Case(
            f"sensitivities, {'fast' if fast else 'exact'}, {spec}",
            spec=spec,
            config={"enable_fast_kmeans_mode": fast},
            sensitive=True,
        )
    for size, dim in itertools.product((None, 8), (2, 4)):
        spec = {"n_bits": 2, "cluster_dim": dim} | ({"granularity": _grouped(0, size)} if size else {})
        yield Case(f"vectors of {dim}, groups {size}", spec=spec, config={"enable_fast_kmeans_mode": False})
    yield Case("fewer values than entries", spec={"n_bits": 8, "granularity": _grouped(0, 2)})
    few = {"n_bits": 6, "cluster_dim": 2, "granularity": _grouped(0, 2)}
    yield Case("fewer vectors than entries", spec=few, config={"enable_fast_kmeans_mode": False})
    yield from _pruned_cases()
    yield from _existing_cases()
    for settings in ({}, {"n_init": 2, "n_local_trials": 1}, {"n_init": 1, "max_iter": 2}, {"tol": 0.1}):
        config = {"enable_fast_kmeans_mode": False, "vector_kmeans_config": settings}
        yield Case(f"effort {settings}", spec={"n_bits": 3, "cluster_dim": 2}, config=config)
    schedule = {"pat_schedule": {"enable_fake_palettize": 2}}
    yield Case("trained", spec={"n_bits": 2})
    yield Case("trained from step 2", spec={"n_bits": 2}, config=schedule)
    yield Case("trained in groups", spec={"n_bits": 2, "granularity": _grouped(0, 4)}, config=schedule)


def _pruned_cases() -> Iterator[Case]:
    """Joint sparsity. "unevenly pruned" weights keep more in some rows than in others."""
    sparse = {"sparsity_detection_threshold": 0.25}
    for weights, n_bits, fast in itertools.product(("pruned", "unevenly pruned"), (1, 2, 4), (True, False)):
        spec = sparse | {"n_bits": n_bits}
        config = {"enable_fast_kmeans_mode": fast}
        yield Case(f"{weights}, {n_bits} bits, fast {fast}", spec=spec, config=config, weights=weights)
    for axis, size, model in itertools.product((None, 0, 1), (2, 4), ("linear", "convolutions")):
        spec = sparse | {"n_bits": 2, "granularity": _grouped(axis, size)}
        yield Case(f"pruned, groups of {size}, axis {axis}, {model}", model, spec, weights="unevenly pruned")
    for dtype in ("float16", "bfloat16", "float64"):
        spec = sparse | {"n_bits": 3, "granularity": _grouped(0, 4)}
        yield Case(f"pruned, {dtype}", spec=spec, weights="unevenly pruned", dtype=dtype)
    for name, fields in {
        "scaled": {"enable_per_channel_scale": True},
        "LUT in int8": {"lut_qspec": {"dtype": "int8"}},
        "LUT in uint8": {"lut_qspec": {"dtype": "uint8", "qscheme": "asymmetric"}},
        "LUT in float8": {"lut_qspec": {"dtype": "float8_e4m3fn"}},
    }.items():
        spec = sparse | {"n_bits": 2, "granularity": _grouped(0, 4)} | fields
        yield Case(f"pruned, {name}", spec=spec, weights="unevenly pruned")
    for weights in ("zeros", "a zero row", "few values"):
        spec = {"sparsity_detection_threshold": 0.0, "n_bits": 2, "granularity": _grouped(0, 2)}
        yield Case(f"pruned, {weights}", spec=spec, weights=weights)
    yield Case("not pruned enough", spec={"sparsity_detection_threshold": 0.9}, weights="pruned")
    yield Case("pruned, sensitivities", spec=sparse | {"n_bits": 2}, weights="pruned", sensitive=True)
    grouped = sparse | {"n_bits": 2, "granularity": _grouped(0, 4)}
    yield Case("pruned, sensitivities, groups", spec=grouped, weights="unevenly pruned", sensitive=True)
    exact = {"enable_fast_kmeans_mode": False}
    for size, dim, weights in itertools.product((None, 4), (2, 3), ("pruned", "unevenly pruned")):
        spec = (
            sparse | {"n_bits": 2, "cluster_dim": dim} | ({"granularity": _grouped(0, size)} if size else {})
        )
        yield Case(f"{weights}, vectors of {dim}, groups {size}", spec=spec, weights=weights, config=exact)
    scaled = sparse | {"n_bits": 2, "cluster_dim": 2, "enable_per_channel_scale": True}
    yield Case("pruned, scaled vectors", spec=scaled, weights="pruned", config=exact)
    vectors = sparse | {"n_bits": 2, "cluster_dim": 2}
    yield Case("pruned, vectors, sensitivities", spec=vectors, weights="pruned", config=exact, sensitive=True)


def _existing_cases() -> Iterator[Case]:
    """Weights, or their leading rows, that have no more values than palettes have entries."""
    for n_bits, fast in itertools.product((2, 3, 4), (True, False)):
        config = {"enable_fast_kmeans_mode": fast}
        yield Case(
            f"palettized, {n_bits} bits, fast {fast}",
            spec={"n_bits": n_bits},
            config=config,
            weights="palettized",
        )
    for weights in ("palettized", "palettized first rows"):
        spec = {"n_bits": 3, "granularity": _grouped(0, 2)}
        yield Case(f"{weights}, groups", spec=spec, weights=weights)
        yield Case(f"{weights}, scaled", spec=spec | {"enable_per_channel_scale": True}, weights=weights)
        yield Case(f"{weights}, sensitivities", spec=spec, weights=weights, sensitive=True)
        yield Case(f"{weights}, columns", spec={"n_bits": 3, "granularity": _grouped(1, 2)}, weights=weights)
    for dtype, dim in itertools.product(("float32", "float16", "float64"), (2, 4)):
        spec = {"n_bits": 3, "cluster_dim": dim, "granularity": _grouped(0, 8)}
        config = {"enable_fast_kmeans_mode": False}
        yield Case(
            f"palettized vectors of {dim}, {dtype}",
            spec=spec,
            config=config,
            weights="palettized vectors",
            dtype=dtype,
        )


CASES = {case.name: case for case in _all_cases()}
TRAINED = [name for name in CASES if name.startswith("trained")]


def build_model(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The case's model with its weights, and example inputs."""
    generator = torch.Generator().manual_seed(len(case.name))
    make, shape = MODELS[case.model]
    model = make()
    dtype = getattr(torch, case.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_draw(case.weights, parameter.shape, generator))
    inputs = torch.randn(shape, generator=generator).to(dtype)
    if case.model == "embedding":
        inputs = torch.randint(7, shape, generator=generator)
    return model.to(dtype), (inputs,)


def _draw(kind: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator) * 0.1
    if kind == "constant":
        return torch.full(shape, 0.5)
    if kind == "few values":
        return (values * 10).round() / 4
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "a zero row":
        values[0] = 0
    if kind == "pruned":
        values[values.abs() < 0.06] = 0
    if kind == "unevenly pruned":
        rows = torch.linspace(0.01, 0.2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        values[values.abs() < rows] = 0
    if kind == "palettized":
        values = torch.tensor([-0.1234567, -1e-5, 2e-5, 0.0, 0.7654321])[values.abs().mul(40).long() % 5]
    if kind == "palettized first rows":
        values[: shape[0] // 2] = _draw("palettized", shape, generator)[: shape[0] // 2]
    if kind == "palettized vectors" and len(shape) > 1:
        values = values[:4].repeat(shape[0] // 4, *[1] * (len(shape) - 1))
        values = values[:, :3].repeat(1, shape[1] // 3 + 1, *[1] * (len(shape) - 2))[:, : shape[1]]
    if kind == "ties":
        return torch.arange(values.numel()).reshape(shape) / 64
    return values
