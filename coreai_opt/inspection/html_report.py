"""A page about a compressed model: one file, readable offline and without scripts."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from coreai_opt._utils.svg import bars
from coreai_opt._utils.writing import write_text
from coreai_opt.inspection.figures import figures

__all__ = ["report"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td, dd { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; }
dl { min-width: 18rem; margin: .4rem 0; }
dt { opacity: .7; } dd { margin: 0; }
.totals { display: flex; flex-wrap: wrap; gap: 1rem; }
.totals div { border: 1px solid #8884; border-radius: .5rem; padding: .6rem 1rem; }
.totals b { display: block; font-size: 1.4rem; }
.warn { color: #cf222e; font-weight: 600; }
"""
# From these shares on a figure is marked.
_MUCH_CLIPPED, _MUCH_DEAD = 0.01, 0.1


def report(
    model: nn.Module, path: str | Path, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write an HTML page about a model: sizes, ranges, errors, clipping, histograms, palettes, masks.

    The page is one file without scripts or anything to load.

    Args:
        model: a float model, or one prepared in either mode or finalized; it is left as it was.
        path: where to write.
        example_inputs: positional arguments for one forward, or a mapping of keyword arguments, which shows
            how much of the activations is clipped; None to leave that out.

    Returns:
        The figures on the page, see :func:`coreai_opt.inspection.figures`.

    Raises:
        NotImplementedError: see :func:`coreai_opt.inspection.bits_per_weight`.
        TypeError: ``model`` is no module; or ``example_inputs`` is neither a tuple nor a mapping.
        RuntimeError: the model is on the meta device.
    """
    found = figures(model, example_inputs)
    write_text(path, page(type(model).__name__, found))
    return found


def page(title: str, found: dict[str, Any]) -> str:
    """The page for :func:`coreai_opt.inspection.figures`."""
    total = found["model"]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        '<section class="totals">',
        *(
            f"<div><b>{value}</b>{name}</div>"
            for name, value in (
                ("bits per weight", f"{total['bits_per_weight']:.3f}"),
                ("bytes", f"{total['bytes']:,}"),
                ("parameters and buffers", f"{total['total_weights']:,}"),
            )
        ),
        "</section>",
        "<h2>Tensors</h2>",
        _table(
            ("tensor", "shape", "bits", "per element", "error", "range", "histogram", "compression"),
            (_tensor_row(entry) for entry in found["tensors"]),
        ),
    ]
    if found["activations"]:
        parts += [
            "<h2>Activations</h2>",
            _table(
                ("simulator", "quantization", "range", "clipped", "saturated"),
                (_activation_row(entry) for entry in found["activations"]),
            ),
        ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _cell(text: Any) -> str:
    return f"<td>{html.escape(str(text))}</td>"


def _number(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _range(entry: dict[str, Any]) -> str:
    if entry.get("minimum") is None:
        return ""
    return f"{entry['minimum']:.4g} … {entry['maximum']:.4g}"


def _share(value: float | None, much: float) -> str:
    if value is None:
        return _number("")
    mark = ' class="warn"' if value >= much else ""
    return _number(f"<span{mark}>{value:.3%}</span>")


def _tensor_row(entry: dict[str, Any]) -> list[str]:
    histogram = entry["histogram"]
    # One value throughout has no distribution to show.
    picture = (
        ""
        if histogram is None or len(histogram) == 1
        else bars(histogram, entry["minimum"], entry["maximum"])
    )
    error = entry.get("relative_error")
    return [
        _cell(entry["name"]),
        _cell(f"{'×'.join(map(str, entry['shape'])) or 'scalar'} {entry['dtype']}"),
        _number(f"{entry['bits']:,}"),
        _number(f"{entry['bits_per_weight']:.3f}"),
        _number("" if error is None else f"{error:.2e}"),
        _cell(_range(entry)),
        f"<td>{picture}</td>",
        f"<td>{''.join(_compression(each) for each in entry.get('compression', ()))}</td>",
    ]


def _compression(found: dict[str, Any]) -> str:
    pairs = []
    for name, value in found.items():
        if name in ("picture", "dead_entries"):
            continue
        text = html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
        if (name == "clipped" and value >= _MUCH_CLIPPED) or (name == "dead" and value >= _MUCH_DEAD):
            text = f'<span class="warn">{text}</span>'
        pairs.append(f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{text}</dd>")
    return f"<dl>{''.join(pairs)}</dl>" + _mask(found.get("picture"))


def _mask(picture: list[list[float]] | None) -> str:
    """Dark where elements stay."""
    if picture is None:
        return ""
    size = 5
    cells = "".join(
        f'<rect x="{x * size}" y="{y * size}" width="{size}" height="{size}" opacity="{value}"/>'
        for y, row in enumerate(picture)
        for x, value in enumerate(row)
        if value
    )
    width, height = len(picture[0]) * size, len(picture) * size
    return f'<svg width="{width}" height="{height}" fill="currentColor"><title>mask</title>{cells}</svg>'


def _activation_row(entry: dict[str, Any]) -> list[str]:
    return [
        _cell(entry["name"]),
        _cell(f"{entry['dtype']} {entry['scheme']} {entry['granularity']}"),
        _cell(_range(entry)),
        _share(entry.get("clipped"), _MUCH_CLIPPED),
        _share(entry.get("saturated"), 1.1),
    ]
