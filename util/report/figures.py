"""Figures of the HTML report, as Matplotlib figures and as inline SVG that follows the page's theme.

`inline_svg` swaps the colours below for the page's CSS variables, so that one drawing suits light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from util.analysis import Oracle, Reliability

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, GRID, PAPER = "#1f2328", "#d3d8de", "#fefefe"
# Okabe and Ito's colour-blind safe palette, its yellow replaced by grey; the page has lighter ones for dark.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#7a52a8", "#6b7075", "#3a9bd6")
MARKERS = "os^DvP*X<>"
CSS_NAMES = {INK: "ink", GRID: "grid", PAPER: "paper"} | {
    color: f"series-{index}" for index, color in enumerate(SERIES)
}
STYLE: dict[RcKeyType, Any] = {
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "font.size": 10,
    "svg.hashsalt": "exitlm",  # equal input gives equal files
}
NEAR = 5.0  # percentage points around full depth's quality
MARKED_POINTS = 12  # on a line; more would hide it
WIDTH, HEIGHT = 5.2, 3.7  # inches; 374 SVG units, about a phone's width, so that letters keep their size


@dataclass
class Point:
    """A setting in the trade-off figure. Intervals are [low, high]; `detail` is shown on hovering."""

    series: str
    order: float
    x: float
    y: float
    x_interval: list[float] | None
    y_interval: list[float] | None
    pareto: bool
    detail: str


@dataclass
class Line:
    """A named series of (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def near_points(points: Sequence[Point], line: float | None) -> list[Point]:
    """Those near the line, if others are so far from it that these cannot be told apart; else none."""
    if line is None or max(abs(point.y - line) for point in points) <= 3 * NEAR:
        return []
    return [point for point in points if abs(point.y - line) <= NEAR]


def trade_off_figure(
    points: Sequence[Point],
    panels: Sequence[Sequence[Point]],
    x_label: str,
    y_label: str,
    line: float | None,
    legend: bool = True,
) -> Figure:
    """Quality against speed with intervals, one panel above the other, each with some of the points.

    Rings mark the Pareto front, settings of a series are joined, what is slower than full depth is shaded.
    """
    with rc_context(STYLE):
        size = (WIDTH, HEIGHT * (0.05 + 0.95 * len(panels)) + 0.7 * legend)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(panels), squeeze=False)
        for number, (axes, panel) in enumerate(zip(grid[:, 0], panels, strict=True)):
            draw_trade_off(axes, points, panel, "near-point" if number else "point", line)
            axes.set_ylabel(y_label)
            limit_to(axes, [point.y for point in panel])
            shade_slower(axes, panel)
            if number:
                axes.set_title(f"the same near {line:.0f}%", loc="left", fontsize=9.5)
        grid[-1, 0].set_xlabel(x_label)
        if legend:
            handles, labels = grid[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def shade_slower(axes: Axes, points: Sequence[Point]) -> None:
    """Shade the side of speed-ups below one, if a point lies there."""
    if min(point.x for point in points) < 1:
        left, right = axes.get_xlim()
        axes.axvspan(left, 1, color=GRID, alpha=0.35, linewidth=0, zorder=0)
        axes.annotate(
            "slower", (1, 0.02), xycoords=("data", "axes fraction"), ha="right", fontsize=9, rotation=90
        )
        axes.set_xlim(left, right)


def draw_trade_off(
    axes: Axes, points: Sequence[Point], shown: Sequence[Point], gid: str, line: float | None
) -> None:
    """One panel with those of the points that are `shown`; all of them number the series."""
    if line is not None:
        axes.axhline(line, color=INK, linewidth=1, linestyle="--", zorder=1)
        axes.annotate(
            f"{line:.0f}%",
            (1, line),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=9,
            annotation_clip=True,
        )
    series: dict[str, list[tuple[str, Point]]] = {point.series: [] for point in points}
    for index, point in enumerate(points):
        if point in shown:
            series[point.series].append((f"{gid}-{index}", point))
    for number, (name, members) in enumerate(series.items()):
        draw_series(axes, number, name, sorted(members, key=lambda member: member[1].order))
    if any(point.pareto for point in points):
        axes.scatter([], [], s=110, facecolors="none", edgecolors=INK, label="Pareto front")


def limit_to(axes: Axes, values: list[float]) -> None:
    """Let the y-axis span the values; intervals may leave it."""
    margin = 0.12 * (max(values) - min(values)) or 1.0
    axes.set_ylim(min(values) - margin, max(values) + margin)


def draw_series(axes: Axes, number: int, name: str, members: list[tuple[str, Point]]) -> None:
    """Points with their gids, all in the look of series `number`."""
    look = series_look(number)
    marker = look.pop("marker")
    if len(members) > 1:
        xs, ys = [point.x for _, point in members], [point.y for _, point in members]
        axes.plot(xs, ys, linewidth=1, alpha=0.6, zorder=2, **look)
    for gid, point in members:
        x_bar, y_bar = error_bar(point.x, point.x_interval), error_bar(point.y, point.y_interval)
        axes.errorbar(
            point.x, point.y, xerr=x_bar, yerr=y_bar, color=look["color"], alpha=0.35, linewidth=1, zorder=2
        )
        label = name.lstrip("_") if gid == members[0][0] else None
        dot = axes.scatter(point.x, point.y, s=36, color=look["color"], marker=marker, label=label, zorder=4)
        dot.set_gid(gid)
        if point.pareto:
            axes.scatter(point.x, point.y, s=120, facecolors="none", edgecolors=INK, zorder=3)


def series_look(number: int) -> dict[str, Any]:
    """Colour, marker and line style; where colours run out, dashes tell lines apart."""
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": "-" if number < len(SERIES) else "--",
    }


def error_bar(value: float, bounds: list[float] | None) -> list[list[float]] | None:
    """Distances below and above, as Matplotlib wants them: (2, 1)."""
    if bounds is None:
        return None
    return [[max(0.0, value - bounds[0])], [max(0.0, bounds[1] - value)]]


def line_figure(lines: Sequence[Line], x_label: str, y_label: str) -> Figure:
    """Lines from zero upwards, such as throughput over batch sizes or a threshold over samples."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for number, line in enumerate(lines):
            xs, ys = zip(*line.points, strict=True)
            look = series_look(number) | ({} if len(xs) <= MARKED_POINTS else {"marker": None})
            axes.plot(xs, ys, label=line.name.lstrip("_"), linewidth=1.6, **look)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def throughput_figure(lines: Sequence[Line]) -> Figure:
    """Tokens per second over batch sizes, which are ticks of a logarithmic axis."""
    figure = line_figure(lines, "batch size", "tokens per second")
    axes = figure.axes[0]
    sizes = sorted({size for line in lines for size, _ in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    return figure


def reliability_figure(curves: dict[str, Reliability]) -> Figure:
    """Agreement over confidence, bin by bin, above the number of tokens in each bin."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT + 1.6), layout="constrained")
        top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="perfectly calibrated")
        for number, (name, curve) in enumerate(curves.items()):
            look = series_look(number)
            confidences = [entry.confidence for entry in curve.bins]
            agreements = [entry.agreement for entry in curve.bins]
            top.plot(confidences, agreements, label=name.lstrip("_"), linewidth=1.4, **look)
            width = (curve.bins[0].high - curve.bins[0].low) / len(curves)
            places = [entry.low + (number + 0.5) * width for entry in curve.bins]
            bottom.bar(places, [entry.count for entry in curve.bins], 0.85 * width, color=look["color"])
        top.set_ylabel("agreement with last layer")
        top.set_ylim(0, 1.03)
        bottom.set_ylabel("tokens")
        bottom.set_xlabel("confidence")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def oracle_figure(bars: dict[str, Oracle]) -> Figure:
    """Share of tokens for every oracle layer, one group of bars a layer."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        width = 0.85 / len(bars)
        deepest = 1
        for number, (name, found) in enumerate(bars.items()):
            deepest = max(deepest, len(found.counts))
            offset = (number - (len(bars) - 1) / 2) * width
            places = [layer + offset for layer in range(1, len(found.counts) + 1)]
            shares = [100 * count / sum(found.counts) for count in found.counts]
            axes.bar(places, shares, 0.92 * width, color=SERIES[number % len(SERIES)], label=name.lstrip("_"))
        if deepest <= 12:
            axes.set_xticks(range(1, deepest + 1))
        axes.grid(False, axis="x")
        axes.set_xlabel("oracle layer")
        axes.set_ylabel("% of tokens")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def save_figure(figure: Figure, *paths: Path) -> None:
    """Write files for papers and slides: white background, letters as outlines in SVG."""
    with rc_context(STYLE):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=200, facecolor="white", metadata=metadata)


def inline_svg(figure: Figure, name: str, description: str, details: Sequence[str] = ()) -> Markup:
    """The figure as an SVG element with its own ids, the page's colours and font, and hover texts.

    Args:
        name: prefix of the element's ids; distinct on a page.
        description: read out in place of the picture.
        details: hover texts of the artists with gid `point-<index>` or `near-point-<index>`.
    """
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    view_box = re.findall(r'viewBox="[^"]*"', text)[0]
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(
        r'<g id="(?:near-)?point-(\d+)">',
        lambda start: f"{start.group()}<title>{escape(details[int(start[1])])}</title>",
        body,
    )
    for color, variable in CSS_NAMES.items():
        body = body.replace(color, f"var(--{variable})")
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would apply to the whole page
    body = re.sub(r'; font-family: [^;"]*', "", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    return Markup(f'<svg {view_box} role="img" aria-label="{escape(description)}">{body}')
