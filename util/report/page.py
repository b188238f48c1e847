"""One HTML page from result folders, with the figures of its table as CSV and Markdown.

    write_report(read_folders(["save/sweep"]), Path("save/report"))

The page needs no network. A section appears if its input does: each `..._section` returns what the template
`page.html.jinja` shows, or None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from util.comparison import BASELINE, HF_GENERATE
from util.report.figures import CSS_NAMES
from util.report.heat_map import depth_shades, heat_section
from util.report.judge import judge_section
from util.report.results import Results, ResultSet
from util.report.sections import (
    calibration_section,
    depth_section,
    oracle_section,
    threshold_section,
    throughput_section,
    trade_off_section,
)
from util.report.table import TableData, as_markdown, flat_figures, results_table, score_name, settings_of
from util.tables import format_figure, write_csv

TEMPLATE = Path(__file__).with_name("page.html.jinja")
OPTIONAL_FILES = ("report.csv", "report.md", "trade_off.png", "trade_off.svg")


def write_report(results: Results, output_dir: Path) -> list[Path]:
    """Write report.html, trade_off.png, trade_off.svg, report.csv and report.md; returns what was written."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in OPTIONAL_FILES:  # an older report's must not pass for this one's
        (output_dir / name).unlink(missing_ok=True)
    table = results_table(results.sets)
    if table is not None:
        write_csv(output_dir / "report.csv", [flat_figures(*pair) for pair in settings_of(results.sets)])
        (output_dir / "report.md").write_text(as_markdown(table), encoding="utf8")
    page = output_dir / "report.html"
    page.write_text(render_page(results, table, output_dir), encoding="utf8")
    return [page, *(path for name in OPTIONAL_FILES if (path := output_dir / name).is_file())]


def render_page(results: Results, table: TableData | None, output_dir: Path) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    sets = results.sets
    return environment.get_template(TEMPLATE.name).render(
        headline=headline(results),
        trade_off=trade_off_section(sets, output_dir),
        table=table,
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
    """What the page is about in a line, and its most important figures."""
    about = []
    for result in results.sets:
        what = f"{result.dataset or 'local data'}, {result.samples} {result.split} samples"
        about.append(f"{result.label}: {what}")
    about += [f"judge: {judge.label}" for judge in results.judges]
    return {"about": about, "cards": [card for result in results.sets for card in cards_of(result)]}


def cards_of(result: ResultSet) -> list[dict[str, str]]:
    """The fastest setting of each method that keeps 99% of full depth's quality; of a run, its figures."""
    if result.kind == "run":
        return [run_card(result)]
    by_name = {setting.name: setting for setting in result.settings}
    cards = []
    for method, name in result.fastest_99.items():
        if method in (BASELINE, HF_GENERATE) or name is None:
            continue
        figures = by_name[name].figures
        detail = f"{name}: {figures['quality_share']:.1f}% of full depth's {score_name(result)}"
        cards.append(
            {"label": method, "figure": f"{format_figure(figures.get('speedup'))}×", "detail": detail}
        )
    missing = [method for method, name in result.fastest_99.items() if name is None]
    if missing:
        detail = "no setting of theirs keeps 99% of full depth's quality"
        cards.append({"label": ", ".join(missing), "figure": "–", "detail": detail})
    return cards


def run_card(result: ResultSet) -> dict[str, str]:
    figures = result.settings[0].figures
    quality = f"{score_name(result)} {format_figure(figures.get(result.main_score))}"
    detail = f"{quality}, {format_figure(figures.get('tokens_per_second'))} tokens/s"
    if figures.get("speedup") is None or result.settings[0].method == BASELINE:
        return {
            "label": result.label,
            "figure": format_figure(figures.get(result.main_score)),
            "detail": detail,
        }
    return {"label": result.label, "figure": f"{format_figure(figures['speedup'])}×", "detail": detail}


def source_section(result: ResultSet) -> dict[str, Any] | None:
    """Arguments and environment of a folder, as shown at the end of the page."""
    groups = {
        name: [(key, as_text(value)) for key, value in entries.items()]
        for name, entries in (("Environment", result.environment), ("Arguments", result.arguments))
        if entries
    }
    return {"label": result.label, "groups": groups} if groups else None


def as_text(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return "-" if value is None or value == "" else str(value)
