"""Line charts as SVG, for the report."""

import math
from html import escape

COLORS = ("#4c8dd6", "#e8813a", "#46a862", "#d9534f", "#9b77cf", "#a5785c", "#db6fae", "#8a8f98", "#b5a52a", "#2fb0bd")
"""Colors of the lines, visible on a white and on a dark background."""


def chart(title: str, series: dict[str, list[tuple[float, float]]], log: bool = False) -> str:
    """An SVG chart of named series of points (step, value). `log`: a logarithmic axis, if all values are above 0."""
    series = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs, ys = zip(*(point for points in series.values() for point in points))
    log = log and min(ys) > 0
    scaled = math.log10 if log else float
    marks = ticks(min(ys), max(ys), log)
    low, high, last = min(scaled(min(ys)), scaled(marks[0])), max(scaled(max(ys)), scaled(marks[-1])), max(xs)

    def x_of(step: float) -> float:
        return 48 + 364 * step / last

    def y_of(value: float) -> float:
        return 196 - 184 * (scaled(value) - low) / ((high - low) or 1)

    drawn = [
        f"<path d='M48 {y_of(mark):.1f}H412' stroke='var(--line)'/>"
        f"<text x=42 y={y_of(mark) + 4:.1f} text-anchor=end>{mark:.4g}</text>" for mark in marks
    ] + [f"<text x={x_of(step):.1f} y=212 text-anchor=middle>{step:.6g}</text>"
         for step in ticks(0, last) if step % 1 == 0]
    legend = []
    for number, (name, points) in enumerate(series.items()):
        color, label = COLORS[number % len(COLORS)], escape(name.removeprefix("loss/").removeprefix("val/"))
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        dots = "".join(f"<circle cx={x_of(x):.1f} cy={y_of(y):.1f} r=2.5 fill='{color}'/>" for x, y in points)
        drawn.append(f"<g><title>{label}: {points[-1][1]:.4g} at step {points[-1][0]:,}</title>"
                     f"<polyline points='{path}' fill=none stroke='{color}' stroke-width=1.6 />"
                     f"{dots if len(points) < 16 else ''}</g>")
        legend.append(f"<span><i style='background: {color}'></i>{label} {points[-1][1]:.3g}</span>")
    return (f"<figure style='margin: 0'><h3>{escape(title)}{', logarithmic' if log else ''}</h3>"
            f"<svg viewBox='0 0 432 228'>{''.join(drawn)}<text x=230 y=226 text-anchor=middle>step</text></svg>"
            f"<div class=legend>{''.join(legend)}</div></figure>")


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """About five round numbers that cover `low` to `high`; on a logarithmic axis they lie between them."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [10.0**power * digit for power in powers for digit in (1, 2, 5)]
        inside = [mark for mark in marks if low <= mark <= high]
        return inside[:: max(1, len(inside) // 6)] or [low]
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    return [round(number * step, 10) for number in range(math.floor(low / step), math.ceil(high / step) + 1)]
