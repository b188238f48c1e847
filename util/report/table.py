"""The table of all settings: on the page, as CSV and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from util.evaluation.timing_doubts import untrusted_timing
from util.report.results import ResultSet, SettingResults
from util.tables import format_figure, markdown_table

INTERVALS = {"quality_share": "quality_share_interval", "speedup": "speedup_interval"}
COLUMNS = {  # after speed-up and quality; ms/token is left to the CSV, as it tells what tokens/s does
    "ideal_speedup": "ideal speed-up",
    "real_over_ideal": "real/ideal",
    "tokens_per_second": "tokens/s",
    "seconds_per_sample_median": "s/sample, median",
    "average_layers": "layers/token",
    "exit_share": "exit share",
    "threshold": "threshold",
    "zeta": "zeta",
    "shallow_layer": "exit layer",
    "batch_size": "batch",
    "checkpoint": "checkpoint",
}
TIMED_APART = (
    "Timed apart from each other: these times do not compare, so that no speed-up is given. "
    "(scripts/sweep.py decodes settings in turn.)"
)


@dataclass
class Cell:
    """A table cell: what is shown, its interval in small print, and the value it is sorted by.

    `kind` is a CSS class, `hint` says what it means.
    """

    text: str
    interval: str = ""
    value: float | str | None = None
    kind: str = ""
    hint: str = ""


@dataclass
class TableData:
    caption: str
    headings: list[str]
    rows: list[list[Cell]]
    marked: list[bool] = field(default_factory=list)  # rows on the Pareto front
    notes: list[str] = field(default_factory=list)


def settings_of(sets: list[ResultSet]) -> list[tuple[ResultSet, SettingResults]]:
    """Every setting whose figures are known, with the set it belongs to."""
    return [(result, setting) for result in sets for setting in result.settings if setting.figures]


def results_tables(sets: list[ResultSet]) -> list[TableData]:
    """A table of all settings with figures for each data set."""
    groups: dict[tuple[str, str], list[tuple[ResultSet, SettingResults]]] = {}
    for result, setting in settings_of(sets):
        groups.setdefault((result.data, result.main_score), []).append((result, setting))
    return [results_table(data, pairs) for (data, _), pairs in groups.items()]


def results_table(data: str, pairs: list[tuple[ResultSet, SettingResults]]) -> TableData:
    """Settings on the same samples; columns that tell nothing are left out."""
    result, _ = pairs[0]
    headings = {"speedup": "speed-up", "quality_share": "% of full depth"}
    headings |= {result.main_score: score_name(result), **COLUMNS}
    if all(setting.checkpoint in setting.name for _, setting in pairs):
        headings.pop("checkpoint")
    rows = [[figure_cell(*pair, key) for key in headings] for pair in pairs]
    sizes = {setting.batch_size for _, setting in pairs}
    used = [index for index, key in enumerate(headings) if is_informative(key, [row[index] for row in rows])]
    return TableData(
        data + (f", batch size {sizes.pop()}" if len(sizes) == 1 else ""),
        ["setting", *(list(headings.values())[index] for index in used)],
        [
            [text_cell(setting.name), *(row[index] for index in used)]
            for (_, setting), row in zip(pairs, rows, strict=True)
        ],
        [setting.name in result.pareto for result, setting in pairs],
        notes_on(pairs),
    )


def is_informative(key: str, cells: list[Cell]) -> bool:
    """Whether a column holds anything, and what the caption does not say as well."""
    values = {cell.value for cell in cells}
    return len(values) > 1 if key in ("batch_size", "checkpoint") else values != {None}


def notes_on(pairs: list[tuple[ResultSet, SettingResults]]) -> list[str]:
    """What must be said of the figures' times."""
    doubts = untrusted_timing({**setting.figures, "name": setting.name} for _, setting in pairs)
    apart = len(pairs) > 1 and any(not result.interleaved for result, _ in pairs)
    return ([] if doubts is None else [doubts]) + ([TIMED_APART] if apart else [])


def figure_cell(result: ResultSet, setting: SettingResults, key: str) -> Cell:
    """A figure; the threshold, exit layer, batch size and checkpoint are the setting's own."""
    value = getattr(setting, key) if hasattr(setting, key) else setting.figures.get(key)
    bounds = setting.figures.get("interval" if key == result.main_score else INTERVALS.get(key, ""))
    cell = Cell(format_figure(value), format_interval(bounds), value)
    if key == "speedup" and value is not None:
        cell.text, cell.kind, cell.hint = describe_speedup(setting.figures)
    return cell


def describe_speedup(figures: dict[str, Any]) -> tuple[str, str, str]:
    """A speed-up as shown, the CSS class of its kind, and what is to be known of it."""
    text = format_figure(figures["speedup"])
    if figures.get("timing_doubt"):
        return f"? {text}", "doubted", f"not to be trusted: {figures['timing_doubt']}"
    if figures["speedup"] < 1:
        return f"▼ {text}", "slower", "slower than full depth"
    return text, "", ""


def text_cell(text: str) -> Cell:
    return Cell(text, value=text)


def number_cell(value: float) -> Cell:
    return Cell(f"{value:.3f}" if isinstance(value, float) else str(value), value=value)


def format_interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def score_name(result: ResultSet) -> str:
    return {"bleu": "BLEU", "f1": "F1", "rougeLsum": "ROUGE-Lsum"}.get(result.main_score, result.main_score)


def flat_figures(result: ResultSet, setting: SettingResults) -> dict[str, Any]:
    """A CSV row: all figures as they are, intervals as two columns."""
    row: dict[str, Any] = {"results": result.label, "dataset": result.origin}
    row |= {name: getattr(result, name) for name in ("split", "samples", "interleaved")}
    for key in ("name", "method", "checkpoint", "threshold", "zeta", "shallow_layer", "batch_size"):
        row[key] = getattr(setting, key)
    for key, value in setting.figures.items():
        name = f"{result.main_score}_interval" if key == "interval" else key
        if isinstance(value, list) and len(value) == 2:
            row[f"{name}_low"], row[f"{name}_high"] = value
        elif not isinstance(value, list | dict) and key not in row:
            row[name] = value
    row["pareto"] = setting.name in result.pareto
    return row


def as_markdown(tables: list[TableData]) -> str:
    """The tables of the page in GitHub's Markdown; text columns to the left."""
    return "\n".join(map(table_as_markdown, tables))


def table_as_markdown(table: TableData) -> str:
    rules = ["--:" if is_number_column(table, index) else ":--" for index in range(len(table.headings))]
    cells = [[f"{cell.text} {cell.interval}".strip() for cell in row] for row in table.rows]
    text = f"**{table.caption}**\n\n{markdown_table(table.headings, cells, rules)}\n"
    return text + "".join(f"\n{note}\n" for note in table.notes)


def is_number_column(table: TableData, index: int) -> bool:
    return not any(isinstance(row[index].value, str) for row in table.rows)
