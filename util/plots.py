"""Plots as files; Matplotlib's own state, such as its backend, stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from util.report.figures import MARKERS


def plot_trade_off(path: Path, rows: list[dict[str, Any]], quality: str, baseline: dict[str, Any]) -> None:
    """Scatter of quality against speed-up, with the baseline's quality as a line."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(baseline[quality], color="0.7", linewidth=1, linestyle="--", zorder=1)
    for index, row in enumerate(rows):
        label = f"{row['method']} ({row['checkpoint']})" if "checkpoint" in row else row["method"]
        style = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}
        axes.scatter(row["speedup"], row[quality], s=60, label=label, zorder=2, **style)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    axes.margins(0.08)
    axes.set_xlabel("speed-up over full depth (measured)")
    axes.set_ylabel(quality.replace("_", " ").upper())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
