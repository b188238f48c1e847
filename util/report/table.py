"""The table of all settings: on the page, as CSV and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from util.report.results import ResultSet, Setting
from util.tables import format_figure

INTERVALS = {"quality_share": "quality_share_interval", "speedup": "speedup_interval"}
COLUMNS = {
    "quality_share": "% of full depth",
    "speedup": "speed-up",
    "ideal_speedup": "ideal speed-up",
    "real_over_ideal": "real / ideal",
    "tokens_per_second": "tokens/s",
    "ms_per_token": "ms/token",
    "seconds_per_sample_median": "s/sample, median",
    "average_layers": "layers/token",
    "exit_share": "exit share",
    "threshold": "threshold",
    "shallow_layer": "exit layer",
    "batch_size": "batch",
}


@dataclass
class Cell:
    """A table cell: what is shown, its interval in small print, and the value it is sorted by."""

    text: str
    interval: str = ""
    value: float | str | None = None


@dataclass
class TableData:
    headings: list[str]
    rows: list[list[Cell]]
    marked: list[bool] = field(default_factory=list)  # rows on the Pareto front


def settings_of(sets: list[ResultSet]) -> list[tuple[ResultSet, Setting]]:
    """Every setting whose figures are known, with the set it belongs to."""
    return [(result, setting) for result in sets for setting in result.settings if setting.figures]


def results_table(sets: list[ResultSet]) -> TableData | None:
    """All settings with figures; columns that no setting has are left out."""
    pairs = settings_of(sets)
    if not pairs:
        return None
    scores = {result.main_score: score_name(result) for result, _ in pairs}
    rows = [[figure_cell(*pair, key) for key in (*scores, *COLUMNS)] for pair in pairs]
    used = [index for index in range(len(rows[0])) if any(row[index].value is not None for row in rows)]
    headings = [*scores.values(), *COLUMNS.values()]
    named = [[text_cell(setting.name), text_cell(setting.checkpoint)] for _, setting in pairs]
    return TableData(
        ["setting", "checkpoint", *(headings[index] for index in used)],
        [name + [row[index] for index in used] for name, row in zip(named, rows, strict=True)],
        [setting.name in result.pareto for result, setting in pairs],
    )


def figure_cell(result: ResultSet, setting: Setting, key: str) -> Cell:
    """A figure; the threshold, exit layer and batch size are the setting's own."""
    value = getattr(setting, key) if hasattr(setting, key) else setting.figures.get(key)
    bounds = setting.figures.get("interval" if key == result.main_score else INTERVALS.get(key))
    return Cell(format_figure(value), format_interval(bounds), value)


def text_cell(text: str) -> Cell:
    return Cell(text, value=text)


def number_cell(value: float) -> Cell:
    return Cell(f"{value:.3f}" if isinstance(value, float) else str(value), value=value)


def format_interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def score_name(result: ResultSet) -> str:
    return {"bleu": "BLEU", "f1": "F1", "rougeLsum": "ROUGE-Lsum"}.get(result.main_score, result.main_score)


def flat_figures(result: ResultSet, setting: Setting) -> dict[str, Any]:
    """A CSV row: all figures as they are, intervals as two columns."""
    row: dict[str, Any] = {"results": result.label, "dataset": result.dataset, "split": result.split}
    for key in ("name", "method", "checkpoint", "threshold", "shallow_layer", "batch_size"):
        row[key] = getattr(setting, key)
    for key, value in setting.figures.items():
        name = f"{result.main_score}_interval" if key == "interval" else key
        if isinstance(value, list) and len(value) == 2:
            row[f"{name}_low"], row[f"{name}_high"] = value
        elif not isinstance(value, list | dict) and key not in row:
            row[name] = value
    row["pareto"] = setting.name in result.pareto
    return row


def as_markdown(table: TableData) -> str:
    """The table of the page in GitHub's Markdown; text columns to the left."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"

    text = line(table.headings) + line([":--", ":--"] + ["--:"] * (len(table.headings) - 2))
    return text + "".join(
        line([f"{cell.text} {cell.interval}".strip() for cell in row]) for row in table.rows
    )
