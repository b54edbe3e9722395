"""Small drawings as SVG text: no library, readable in every browser."""

from collections.abc import Sequence
from html import escape

__all__ = ["bars", "curve"]

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 56
_INK, _FAINT, _MARK = "#1f6feb", "#8b949e", "#cf222e"

Point = tuple[float, float]


def curve(
    points: Sequence[Point],
    marks: Sequence[tuple[float, float, str]],
    x_title: str,
    y_title: str,
) -> str:
    """A line through ``points``, and labelled marks, with axes.

    Args:
        points: from left to right.
        marks: position and label of each.
        x_title: what the horizontal axis shows.
        y_title: what the vertical axis shows.
    """
    everything = [*points, *((x, y) for x, y, _ in marks)]
    (left, right), (low, high) = (_range([each[axis] for each in everything]) for axis in (0, 1))

    def place(x: float, y: float) -> Point:
        return (
            _MARGIN + (x - left) / (right - left) * (_WIDTH - 2 * _MARGIN),
            _HEIGHT - _MARGIN - (y - low) / (high - low) * (_HEIGHT - 2 * _MARGIN),
        )

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts = [f'<polyline points="{path}" fill="none" stroke="{_INK}" stroke-width="2"/>']
    for x, y, label in marks:
        px, py = place(x, y)
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{_MARK}"/>')
        parts.append(_text(px + 6, py - 6, label))
    return _framed(parts, (left, right), (low, high), x_title, y_title)


def bars(heights: Sequence[float], low: float, high: float, width: int = 220, height: int = 48) -> str:
    """A histogram between ``low`` and ``high``, without axes."""
    tallest = max(heights, default=0) or 1
    step = width / max(len(heights), 1)
    shapes = "".join(
        f'<rect x="{index * step:.1f}" y="{height - each / tallest * height:.1f}" width="{step:.1f}" '
        f'height="{each / tallest * height:.1f}" fill="{_INK}"/>'
        for index, each in enumerate(heights)
    )
    title = f"<title>{low:.4g} to {high:.4g}</title>"
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{title}{shapes}</svg>'


def _range(values: Sequence[float]) -> Point:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" font-family="sans-serif" '
        f'text-anchor="{anchor}"{extra}>{escape(text)}</text>'
    )


def _framed(parts: Sequence[str], xs: Point, ys: Point, x_title: str, y_title: str) -> str:
    right, bottom = _WIDTH - _MARGIN, _HEIGHT - _MARGIN
    middle = f' transform="rotate(-90 14 {_HEIGHT / 2:.0f})"'
    axes = [
        f'<path d="M{_MARGIN},{_MARGIN} V{bottom} H{right}" fill="none" stroke="{_FAINT}"/>',
        _text(_MARGIN, bottom + 16, f"{xs[0]:.4g}"),
        _text(right, bottom + 16, f"{xs[1]:.4g}", "end"),
        _text(_WIDTH / 2, _HEIGHT - 10, x_title, "middle"),
        _text(_MARGIN - 4, bottom, f"{ys[0]:.3g}", "end"),
        _text(_MARGIN - 4, _MARGIN + 4, f"{ys[1]:.3g}", "end"),
        _text(14, _HEIGHT / 2, y_title, "middle", middle),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join([*axes, *parts])}</svg>'
    )
