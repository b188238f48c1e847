"""A benchmark as a picture: one panel a model, one bar a contestant.

draw_speeds(records, Path("speed.svg"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from util.report.figures import SERIES, STYLE, save_figure
from util.script_arguments import RIVALS

WIDTH, BAR_HEIGHT, TITLE_HEIGHT = 6.4, 0.26, 0.55  # inches
RIVAL_COLOR, FULL_COLOR, EXIT_COLOR = SERIES[6], SERIES[7], SERIES[1]


def draw_speeds(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write an .svg or .png of the records that scripts/benchmark.py prints."""
    save_figure(speed_figure(records), path)


def speed_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Median milliseconds a token, fastest first; rivals, full depth and early exits in their own colours."""
    heights = [TITLE_HEIGHT + BAR_HEIGHT * len(record["rows"]) for record in records]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        panels = figure.subplots(len(records), height_ratios=heights, squeeze=False)[:, 0]
        for axes, record in zip(panels, records, strict=True):
            draw_panel(axes, record)
        panels[-1].set_xlabel("ms/token (median)")
    return figure


def draw_panel(axes: Axes, record: dict[str, Any]) -> None:
    rows = sorted(record["rows"], key=lambda row: row["ms_per_token"])
    values = [row["ms_per_token"] for row in rows]
    bars = axes.barh(range(len(rows)), values, color=[color_of(row) for row in rows])
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    threads = record["environment"]["threads"]
    axes.set_title(f"{record['model']}, CPU threads: {threads}", loc="left", fontsize=10)


def color_of(row: dict[str, Any]) -> str:
    if row["name"] in RIVALS:
        return RIVAL_COLOR
    return EXIT_COLOR if row.get("exit_share") else FULL_COLOR
