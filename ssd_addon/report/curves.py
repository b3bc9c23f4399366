"""Training curves as SVG, drawn here so that the page needs no plotting library and follows its colors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ssd_addon.report.text import html


def panel(
    title: str, unit: str, series: Mapping[int, Sequence[tuple[float, float]]], marks: Sequence[float] = ()
) -> str:
    """One panel: step across, the value up, and a dashed line at each step that is marked."""
    w, h, left, right, top, bottom = 320, 212, 44, 10, 38, 34
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(ys), max(ys)
    if 0 < y0 < y1 / 2:
        y0 = 0.0
    if y1 - y0 <= 1e-9 * max(1.0, abs(y0), abs(y1)):  # a constant
        y0, y1 = y0 - 0.5 * max(1.0, abs(y0)), y1 + 0.5 * max(1.0, abs(y1))
    ticks = _ticks(y0, y1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        return left + across * (w - left - right), h - bottom - (y - y0) / (y1 - y0) * (h - top - bottom)

    parts = [f'<text class="title" x="{left}" y="14">{html(title)}</text>']
    if unit:
        parts.append(f'<text x="{left}" y="28">{html(unit)}</text>')
    for tick in ticks:
        _, y = place(x0, tick)
        parts.append(f'<path class="axis" d="M{left} {y:.1f}H{w - right}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x, anchor in ((x0, "start"), (x1, "end")) if x1 > x0 else ((x0, "middle"),):
        parts.append(f'<text x="{place(x, y0)[0]:.1f}" y="{h - bottom + 15}" text-anchor="{anchor}">{x:g}</text>')
    parts.append(f'<text x="{(left + w - right) / 2}" y="{h - 6}" text-anchor="middle">step</text>')
    for x in (x for x in marks if x0 <= x <= x1):
        parts.append(f'<path class="mark" d="M{place(x, y0)[0]:.1f} {top}V{h - bottom}"/>')
    for k, points in series.items():
        thin = points[:: max(1, len(points) // 300)]
        thin = [*thin, points[-1]] if thin[-1] != points[-1] else thin
        color = f"var(--s{k if k == 6 else k % 6})"
        xy = [place(*p) for p in thin]
        if len(xy) == 1:
            parts.append(f'<circle cx="{xy[0][0]:.1f}" cy="{xy[0][1]:.1f}" r="3" style="fill:{color}"/>')
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in xy)
        parts.append(f'<polyline class="curve" style="stroke:{color}" points="{line}"/>')
    label = f"{title}: from step {x0:g} to {x1:g}"
    return f'<svg viewBox="0 0 {w} {h}" role="img" aria-label="{html(label)}">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 4)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def finite(value: Any) -> TypeGuard[float]:
    """A number that a curve can be drawn through: no NaN, no infinity, and none whose differences overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
