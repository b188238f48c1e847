"""One HTML page from result folders, with the figures of its table as CSV and Markdown.

    write_report(read_folders(["save/sweep"]), Path("save/report"))

The page needs no network. A section appears if its input does: each `..._section` returns what the template
`page.html.jinja` shows, or None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from util.evaluation.timing_doubts import untrusted_timing
from util.files import write_text
from util.methods import BASELINE, HF_GENERATE
from util.report.figures import CSS_NAMES
from util.report.heat_map import depth_shades, heat_section
from util.report.judge import judge_section
from util.report.results import Results, ResultSet, SettingResults
from util.report.sections import (
    calibration_section,
    depth_section,
    oracle_section,
    threshold_section,
    throughput_section,
    trade_off_section,
)
from util.report.table import (
    TableData,
    as_markdown,
    describe_speedup,
    flat_figures,
    results_tables,
    score_name,
    settings_of,
)
from util.tables import format_figure, write_csv

TEMPLATE = Path(__file__).with_name("page.html.jinja")
OPTIONAL_FILES = ("report.csv", "report.md", "trade_off.png", "trade_off.svg")
REPORT_FILES = ("report.html", *OPTIONAL_FILES)


def write_report(results: Results, output_dir: Path) -> list[Path]:
    """Write report.html, trade_off.png, trade_off.svg, report.csv and report.md; returns what was written."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in OPTIONAL_FILES:  # an older report's must not pass for this one's
        (output_dir / name).unlink(missing_ok=True)
    tables = results_tables(results.sets)
    if tables:
        write_csv(output_dir / "report.csv", [flat_figures(*pair) for pair in settings_of(results.sets)])
        write_text(output_dir / "report.md", as_markdown(tables))
    page = output_dir / "report.html"
    write_text(page, render_page(results, tables, output_dir))
    return [page, *(path for name in OPTIONAL_FILES if (path := output_dir / name).is_file())]


def render_page(results: Results, tables: list[TableData], output_dir: Path) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    sets = results.sets
    return environment.get_template(TEMPLATE.name).render(
        headline=headline(results),
        trade_off=trade_off_section(sets, output_dir),
        tables=tables,
        measured=any("speed-up" in table.headings for table in tables),
        throughput=throughput_section(sets),
        depth=depth_section(sets),
        calibration=calibration_section(sets),
        thresholds=threshold_section(sets),
        heat=heat_section(sets),
        oracle=oracle_section(sets),
        judges=[judge_section(judge) for judge in results.judges],
        sources=[source for result in sets if (source := source_section(result))],
        shades=depth_shades(),
        series_colors={name: color for color, name in CSS_NAMES.items()},
    )


def headline(results: Results) -> dict[str, Any]:
    """What the page is about in a line, its most important figures, and doubts about its timing."""
    about = [f"{result.label}: {result.data}" for result in results.sets]
    about += [f"judge: {judge.label}" for judge in results.judges]
    several = len({result.data for result in results.sets}) > 1
    rows = ({**setting.figures, "name": setting.name} for _, setting in settings_of(results.sets))
    return {
        "about": about,
        "cards": [card for result in results.sets for card in cards_of(result, several)],
        "doubts": untrusted_timing(rows),
    }


def cards_of(result: ResultSet, several: bool) -> list[dict[str, str]]:
    """The fastest setting of each method that keeps 99% of full depth's quality; of a run, its figures.

    Where the page holds several data sets, cards name theirs.
    """
    where = f", {result.data}" if several else ""
    if result.kind == "run":
        return [run_card(result, where)]
    by_name = {setting.name: setting for setting in result.settings}
    chosen = {
        method: None if name is None else by_name.get(name) for method, name in result.fastest_99.items()
    }
    cards = [
        speed_card(result, method + where, setting)
        for method, setting in chosen.items()
        if setting is not None
        and method not in (BASELINE, HF_GENERATE)
        and setting.figures.get("speedup") is not None
    ]
    missing = [method for method, setting in chosen.items() if setting is None]
    if missing:
        detail = "no setting of theirs keeps 99% of full depth's quality"
        cards.append({"label": ", ".join(missing) + where, "figure": "–", "detail": detail, "kind": ""})
    return cards


def speed_card(result: ResultSet, label: str, setting: SettingResults) -> dict[str, str]:
    text, kind, hint = describe_speedup(setting.figures)
    detail = f"{setting.name}: {setting.figures['quality_share']:.1f}% of full depth's {score_name(result)}"
    return {
        "label": label,
        "figure": f"{text}×",
        "detail": f"{detail}; {hint}" if hint else detail,
        "kind": kind,
    }


def run_card(result: ResultSet, where: str) -> dict[str, str]:
    """A run's score; it was timed apart from others, so that it has no speed-up."""
    figures = result.settings[0].figures
    details = [f"{score_name(result)}{where}"]
    if figures.get("quality_share") is not None and result.settings[0].method != BASELINE:
        details.append(f"{figures['quality_share']:.1f}% of full depth's")
    if figures.get("average_layers") is not None:
        details.append(f"{format_figure(figures['average_layers'])} layers a token")
    figure = format_figure(figures.get(result.main_score))
    return {"label": result.label, "figure": figure, "detail": ", ".join(details), "kind": ""}


def source_section(result: ResultSet) -> dict[str, Any] | None:
    """Arguments and environment of a folder, as shown at the end of the page."""
    groups = {
        name: [(key, show_value(value)) for key, value in entries.items()]
        for name, entries in (("Environment", result.environment), ("Arguments", result.arguments))
        if entries
    }
    return {"label": result.label, "groups": groups} if groups else None


def show_value(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return "-" if value is None or value == "" else str(value)
