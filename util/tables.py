"""Result records as JSON, CSV, a terminal table, a plot, and text coloured by exit depth.

The functions know nothing of models: a row is a dict of a method's figures.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKERS = "os^DvP*X<>"
PLAIN_WIDTH = 120
DEPTH_STYLES = ("green", "yellow", "red")  # shallow, middle, deep


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What a result depends on besides its arguments."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git": git_hash(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def git_hash() -> str | None:
    """Commit of this source tree; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    os.replace(temporary, path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line a row, one column for every key of any row."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def comparison_table(title: str, columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> Table:
    """A table of the keys in `columns`, which maps each key to a heading; missing figures are dashes."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(columns.values()):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(format_figure(row.get(key)) for key in columns))
    return table


def format_figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def plot_trade_off(path: Path, rows: list[dict[str, Any]], quality: str, baseline: dict[str, Any]) -> None:
    """Scatter of quality against speed-up, with the baseline's quality as a line."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
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
    plt.close(figure)


def color_by_depth(pieces: list[str], exit_layers: list[int], num_layers: int) -> Text:
    """Text pieces, each in the colour of its exit layer: green shallow, yellow middle, red last."""
    text = Text()
    for piece, layer in zip(pieces, exit_layers, strict=True):
        text.append(piece, style=depth_style(layer, num_layers))
    return text


def depth_style(layer: int, num_layers: int) -> str:
    if layer == num_layers:
        return DEPTH_STYLES[2]
    return DEPTH_STYLES[0] if layer <= num_layers / 3 else DEPTH_STYLES[1]


def depth_legend() -> Text:
    """What the colours of `color_by_depth` mean."""
    legend = Text("exit depth: ")
    for name, style in zip(("early", "middle", "last layer"), DEPTH_STYLES, strict=True):
        legend.append(f" {name} ", style=style)
    return legend


def print_report(*parts: Any) -> None:
    """Print to the terminal; elsewhere (a log, a pipe) as wide as tables need."""
    console = Console() if Console().is_terminal else Console(width=PLAIN_WIDTH)
    for part in parts:
        console.print(part)
