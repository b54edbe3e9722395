"""Draws the figures of the pages: ``python docs/figures/draw.py``.

Those of docs/concepts.md with the package's own functions, those of docs/performance.md from the results of
benchmarks.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

import coreai_kernels

mpl.use("svg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
# The same file from each run; colours that read on white and on dark pages.
mpl.rcParams.update(
    {
        "svg.hashsalt": "coreai-opt",
        "svg.fonttype": "path",
        "figure.facecolor": "white",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)
BLUE, ORANGE, GREY = "#2a6fbb", "#d9730d", "#9a9a9a"


def save(figure: plt.Figure, name: str) -> None:
    """Write one figure without a date, so that an unchanged one gives an unchanged file."""
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def quantizer(x: torch.Tensor, scheme: str, bits: int = 3) -> torch.Tensor:
    """What a quantizer that has observed ``x`` makes of it, per tensor."""
    low, high = coreai_kernels.observe_range(x, block_size=tuple(x.shape))
    quant_min, quant_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero_point, _ = coreai_kernels.choose_qparams(
        low, high, scheme=coreai_kernels.Scheme[scheme], quant_min=quant_min, quant_max=quant_max
    )
    return coreai_kernels.fake_quantize(
        x,
        scale,
        zero_point,
        block_size=tuple(x.shape),
        quant_min=quant_min,
        quant_max=quant_max,
    )


def scale_and_zero_point() -> None:
    """Steps of a 3-bit quantizer, around zero and shifted."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
    for axis, scheme, title in zip(
        axes,
        ("SYMMETRIC", "ASYMMETRIC"),
        ("symmetric: zero point 0", "asymmetric: zero point moves"),
        strict=True,
    ):
        x = torch.linspace(-0.6, 1.8, 1201)
        axis.plot(x, x, color=GREY, linewidth=0.8, label="as it was")
        axis.plot(x, quantizer(x, scheme), color=BLUE, label="3 bits")
        axis.set_title(title)
        axis.set_xlabel("value")
        axis.legend(frameon=False)
    axes[0].set_ylabel("simulated value")
    save(figure, "scale-and-zero-point")


def granularity() -> None:
    """One scale for a tensor, for each channel, for each block: the blocks, and the error that they leave."""
    torch.manual_seed(0)
    weight = torch.randn(8, 16) * torch.logspace(-1, 0.5, 8)[:, None]
    weight[:, 8:] *= 0.3
    figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.6))
    for axis, block_size, title in zip(
        axes, ((8, 16), (1, 16), (1, 4)), ("per tensor", "per channel", "blocks of 4"), strict=True
    ):
        low, high = coreai_kernels.observe_range(weight, block_size=block_size)
        scale, zero_point, _ = coreai_kernels.choose_qparams(
            low, high, scheme=coreai_kernels.Scheme.SYMMETRIC, quant_min=-8, quant_max=7
        )
        rounded = coreai_kernels.fake_quantize(
            weight, scale, zero_point, block_size=block_size, quant_min=-8, quant_max=7
        )
        error = (rounded - weight).square().mean().sqrt() / weight.square().mean().sqrt()
        shown = scale.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
        axis.imshow(shown.log(), cmap="viridis", vmin=-5, vmax=0)
        axis.set_title(f"{title}: {scale.numel()} scale{'s' if scale.numel() > 1 else ''}\nerror {error:.1%}")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("inputs")
    axes[0].set_ylabel("outputs")
    save(figure, "granularity")


def straight_through() -> None:
    """The step function, and the gradient that takes its place."""
    x = torch.linspace(-1.6, 1.6, 1201, requires_grad=True)
    scale = torch.full((1,), 0.25)
    y = coreai_kernels.fake_quantize(
        x, scale, torch.zeros(1, dtype=torch.int32), block_size=(1201,), quant_min=-4, quant_max=3
    )
    y.sum().backward()
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.6))
    axes[0].plot(x.detach(), y.detach(), color=BLUE)
    axes[0].set_title("forward: rounds and clips")
    axes[1].plot(x.detach(), x.grad, color=ORANGE)
    axes[1].set_title("backward: 1, and 0 where clipped")
    for axis in axes:
        axis.set_xlabel("value")
    save(figure, "straight-through")


def masks() -> None:
    """Which elements of one weight four schemes keep, half of them each."""
    torch.manual_seed(3)
    weight = torch.randn(8, 16) * torch.linspace(0.5, 1.5, 8)[:, None]
    found = {
        "unstructured": coreai_kernels.topk_mask(weight, 64),
        "2:4": coreai_kernels.nm_mask(weight, 2, 4),
        "blocks of 2 × 4": coreai_kernels.block_mask(weight, 8, (2, 4)),
        "channels": coreai_kernels.channel_mask(weight, 4),
    }
    figure, axes = plt.subplots(1, 4, figsize=(8, 1.9))
    for axis, (title, mask) in zip(axes, found.items(), strict=True):
        axis.imshow(mask, cmap="Blues", vmin=0, vmax=1.3)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, "masks")


def palettes() -> None:
    """The values of a weight, and the eight of its palette."""
    torch.manual_seed(1)
    weight = torch.cat([torch.randn(3000) * 0.4, torch.randn(400) * 0.15 + 1.3])
    palette = coreai_kernels.kmeans_1d(weight, 8, block_size=(3400,))
    figure, axis = plt.subplots(figsize=(6.5, 2.5))
    axis.hist(weight.numpy(), bins=120, color=GREY)
    for value in palette.flatten().tolist():
        axis.axvline(value, color=ORANGE, linewidth=1.2)
    axis.set_xlabel("value of a weight; lines: the 8 entries of a 3-bit palette")
    axis.set_yticks([])
    save(figure, "palettes")


def _results(name: str) -> list[dict[str, Any]]:
    data = json.loads((FOLDER.parents[1] / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    return data["results"]  # type: ignore[no-any-return]


def training_steps() -> None:
    """What int8 adds to a training step of each model: ours and Apple's."""
    rows = _results("training-epyc-1core.json")
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    for axis, mode in zip(axes, ("eager", "graph"), strict=True):
        of_mode = {row["model"]: row["overhead"] for row in rows if row["mode"] == mode}
        for offset, who, colour in ((-0.2, "apple", GREY), (0.2, "ours", BLUE)):
            places = [place + offset for place in range(len(models))]
            axis.bar(places, [of_mode[model][who] * 1e3 for model in models], 0.4, color=colour, label=who)
        axis.set_yscale("log")
        axis.set_xticks(range(len(models)), models, rotation=45, ha="right")
        axis.set_title(f"{mode} mode")
    axes[0].set_ylim(top=2000)  # room for the legend
    axes[0].set_ylabel("added to a step, ms")
    axes[0].legend(["Apple's 0.4.0", "this package"], frameon=False)
    save(figure, "training-steps")


def simulators() -> None:
    """How many times as fast as Apple's single simulators are, by size."""
    rows = [row for row in _results("cpu-epyc-1core.json") if "apple" in row["seconds"]]
    figure, axis = plt.subplots(figsize=(6.5, 2.8))
    colours = {"int4": BLUE, "int8": "#7fb7d4", "fp8 e4m3": ORANGE, "fp4 e2m1": "#8a5aa8"}
    for name, colour in colours.items():
        chosen = [row for row in rows if row["case"]["format"] == name and "backward" in row["case"]["phase"]]
        sizes = sorted({row["case"]["size"] for row in chosen})
        ratios = [
            [
                row["seconds"]["apple"] / row["seconds"]["native"]
                for row in chosen
                if row["case"]["size"] == size
            ]
            for size in sizes
        ]
        means = [statistics.geometric_mean(each) for each in ratios]
        axis.plot(sizes, means, marker="o", color=colour, label=name)
        axis.fill_between(
            sizes, [min(each) for each in ratios], [max(each) for each in ratios], color=colour, alpha=0.15
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{size}²" for size in sizes])
    axis.set_ylabel("times as fast as Apple's")
    axis.set_title("forward and backward; bands: the least and the most of all cases")
    axis.legend(frameon=False, ncols=2)
    save(figure, "simulators")


if __name__ == "__main__":
    for draw in (
        scale_and_zero_point,
        granularity,
        straight_through,
        masks,
        palettes,
        training_steps,
        simulators,
    ):
        draw()
