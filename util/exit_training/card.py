"""The model card of an exit adapter's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.loading import LoadedModel
from util.model_card import Card, usage, write_card
from util.tables import markdown_table

EXAMPLE = "Once upon a time"
COLUMNS = {"decoding": "decoding", "threshold": "threshold", "max_pending": "cap", "speedup": "speed-up"}


def write_exit_card(folder: Path, loaded: LoadedModel, base: str, rows: list[dict[str, Any]]) -> None:
    """Say of which model the exit is, how to decode with it, and what it was forecast to bring.

    `rows`: settings as `scripts/train_exit.py` recommends them, all of one layer; the first is shown in use.
    """
    chosen = rows[0]
    policy = f"Free({chosen['layer']}, SoftmaxGap(), {chosen['threshold']:g}, lossless=True"
    policy += f", max_pending={chosen['max_pending']})" if chosen["max_pending"] else ")"
    metadata = {
        "base_model": None if Path(base).exists() else base,
        "tags": ["early-exit", "exit-adapter"],
    }
    sections = [
        f"An exit after layer {chosen['layer']} of {loaded.view.num_layers} for {base}, whose own weights "
        "stay as they are: lossless decoding returns exactly its output.",
        usage(str(folder), loaded, EXAMPLE, policy=policy),
        forecast_table(rows),
    ]
    write_card(folder, Card(folder.name, metadata, sections))


def forecast_table(rows: list[dict[str, Any]]) -> str:
    shown = [[show(row[name]) for name in COLUMNS] for row in rows]
    table = markdown_table([*COLUMNS.values()], shown)
    return f"Forecast on held-out texts, on the machine that taught it:\n\n{table}"


def show(cell: Any) -> str:
    return "" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)
