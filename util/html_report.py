"""One HTML page from result folders, with the figures of its table as CSV and Markdown.

    write_report(read_folders(["save/sweep"]), Path("save/report"))

The page needs no network. A section appears if its input does: each `..._section` returns what the template
`report.html.jinja` shows, or None.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from util.analysis import (
    Reliability,
    exit_shares,
    first_agreeing_layers,
    oracle,
    reliability,
    settled_layers,
)
from util.comparison import BASELINE, HF_GENERATE
from util.report import format_figure, write_csv
from util.report_figures import (
    CSS_NAMES,
    Line,
    Point,
    inline_svg,
    line_figure,
    oracle_figure,
    reliability_figure,
    save_figure,
    throughput_figure,
    trade_off_figure,
)
from util.result_files import JudgeScores, Results, ResultSet, Setting
from util.token_heat_map import depth_shades, heat_section, shade_class

TEMPLATE = Path(__file__).with_name("report.html.jinja")
OPTIONAL_FILES = ("report.csv", "report.md", "trade_off.png", "trade_off.svg")
MAX_CURVES = 6  # in one calibration plot
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


def settings_of(sets: list[ResultSet]) -> list[tuple[ResultSet, Setting]]:
    """Every setting whose figures are known, with the set it belongs to."""
    return [(result, setting) for result in sets for setting in result.settings if setting.figures]


# Headline


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


def score_name(result: ResultSet) -> str:
    return {"bleu": "BLEU", "f1": "F1", "rougeLsum": "ROUGE-Lsum"}.get(result.main_score, result.main_score)


# The table and its files


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


def format_interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


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


# Trade-off


def trade_off_section(sets: list[ResultSet], output_dir: Path) -> dict[str, Any] | None:
    """Quality kept against measured speed-up; where no full depth is known, score against tokens/s."""
    relative = [
        (result, setting)
        for result, setting in plotted_settings(sets)
        if None not in (setting.figures.get("quality_share"), setting.figures.get("speedup"))
    ]
    related = len(relative) > 1
    chosen = relative if related else [pair for pair in plotted_settings(sets) if has_speed_and_score(*pair)]
    scores = {score_name(result) for result, _ in chosen}
    if not chosen or (not related and len(scores) > 1):
        return None
    points = [as_point(result, setting, related) for result, setting in chosen]
    quality = " or ".join(sorted(scores))
    labels = ("speed-up over full depth (measured)", f"{quality}, % of full depth")
    if not related:
        labels = ("tokens per second", quality)
    figure = trade_off_figure(points, *labels, 99.0 if related else None)
    for suffix in ("png", "svg"):
        save_figure(figure, output_dir / f"trade_off.{suffix}")
    summary = "; ".join(point.detail for point in points if point.pareto) or f"{len(points)} settings"
    description = f"Scatter plot of {labels[1]} against {labels[0]}. On the Pareto front: {summary}."
    return {
        "svg": inline_svg(figure, "trade-off", description, [point.detail for point in points]),
        "related": related,
        "batch_sizes": sorted({setting.batch_size for _, setting in chosen}),
        "auc": [(name, f"{value:.3f}") for result in sets for name, value in result.auc.items()],
    }


def plotted_settings(sets: list[ResultSet]) -> list[tuple[ResultSet, Setting]]:
    return [(result, setting) for result in sets for setting in result.main_settings if setting.figures]


def has_speed_and_score(result: ResultSet, setting: Setting) -> bool:
    return None not in (setting.figures.get("tokens_per_second"), setting.figures.get(result.main_score))


def as_point(result: ResultSet, setting: Setting, related: bool) -> Point:
    figures, method = setting.figures, setting.method
    keys = ("speedup", "quality_share") if related else ("tokens_per_second", result.main_score)
    intervals = ("speedup_interval", "quality_share_interval") if related else (None, "interval")
    x, y = (figures[key] for key in keys)
    bounds = [figures.get(key) for key in intervals]
    units = ("× speed-up", "% of full depth") if related else (" tokens/s", f" {score_name(result)}")
    detail = f"{setting.name}: {x:.2f}{units[0]} {format_interval(bounds[0])}, {y:.2f}{units[1]} "
    return Point(
        series=method if method == BASELINE or not setting.checkpoint else f"{method} ({setting.checkpoint})",
        order=setting.threshold if setting.threshold is not None else setting.shallow_layer or 0,
        x=x,
        y=y,
        x_interval=bounds[0],
        y_interval=bounds[1],
        pareto=setting.name in result.pareto,
        detail=(detail + format_interval(bounds[1])).strip(),
    )


def throughput_section(sets: list[ResultSet]) -> Markup | None:
    """Tokens per second over batch sizes, of one setting of each method on each checkpoint."""
    lines = list(throughput_lines(sets).values())
    if not lines:
        return None
    summary = "; ".join(
        f"{line.name}: " + ", ".join(f"{speed:.0f} at {size}" for size, speed in line.points)
        for line in lines
    )
    description = f"Tokens per second over batch sizes. {summary}."
    return inline_svg(throughput_figure(lines), "throughput", description)


def throughput_lines(sets: list[ResultSet]) -> dict[tuple[str, str], Line]:
    """Lines by method and checkpoint: its fastest good setting, or else the first, at several batch sizes."""
    series: dict[tuple[Any, ...], list[Setting]] = defaultdict(list)
    for _, setting in settings_of(sets):
        if setting.figures.get("tokens_per_second") is not None:
            kind = setting.method, setting.checkpoint
            series[(*kind, setting.threshold, setting.shallow_layer)].append(setting)
    good = {name for result in sets for name in result.fastest_99.values()}
    lines: dict[tuple[str, str], Line] = {}
    for (method, checkpoint, *_), members in series.items():
        members.sort(key=lambda setting: setting.batch_size)
        points = [(setting.batch_size, setting.figures["tokens_per_second"]) for setting in members]
        known = (method, checkpoint) in lines and members[0].name not in good
        if len(dict(points)) > 1 and not known:
            lines[method, checkpoint] = Line(members[0].name, points)
    return lines


# Exit depth


def depth_section(sets: list[ResultSet]) -> list[dict[str, Any]]:
    """Share of tokens for each exit layer: a bar for each setting whose tokens leave at several layers."""
    counted = [
        (setting, layers)
        for result in sets
        for setting in result.main_settings
        if setting.num_layers and (layers := setting.exit_layers)
    ]
    mixed = [(setting, layers) for setting, layers in counted if len(set(layers)) > 1]
    return [depth_bar(setting, layers) for setting, layers in mixed or counted]


def depth_bar(setting: Setting, layers: list[int]) -> dict[str, Any]:
    parts = [
        {
            "layer": layer,
            "percent": 100 * share,
            "shade": shade_class(layer, setting.num_layers),
            "detail": f"layer {layer}: {100 * share:.1f}% of {len(layers)} tokens",
        }
        for layer, share in exit_shares(layers).items()
    ]
    return {"setting": setting.name, "parts": parts, "mean": statistics.mean(layers), "count": len(layers)}


# Calibration and thresholds


def calibration_section(sets: list[ResultSet]) -> dict[str, Any] | None:
    """Shallow confidence against agreement with the last layer, from traces or calibration pairs."""
    curves: dict[str, Reliability] = {}
    for result in sets:
        for name, (confidences, agrees) in calibration_pairs(result).items():
            curve = reliability(confidences, agrees)
            if curve is not None:
                curves[prefix(result, sets) + name] = curve
    if not curves:
        return None
    headings = ["series", "tokens", "mean confidence", "agreement", "ECE"]
    rows = [
        [text_cell(name), *map(number_cell, calibration_figures(curve))] for name, curve in curves.items()
    ]
    summary = "; ".join(f"{name}: ECE {curve.ece:.3f}" for name, curve in curves.items())
    shown = dict(list(curves.items())[:MAX_CURVES])
    description = f"Reliability diagram. {summary}."
    svg = inline_svg(reliability_figure(shown), "calibration", description)
    return {"svg": svg, "table": TableData(headings, rows)}


def prefix(result: ResultSet, sets: list[ResultSet]) -> str:
    """Tells the sweeps of a page apart; runs are settings with names of their own."""
    several = sum(other.kind == "sweep" for other in sets) > 1
    return f"{result.label}: " if several and result.kind == "sweep" else ""


def calibration_figures(curve: Reliability) -> tuple[float, ...]:
    return curve.count, curve.confidence, curve.agreement, curve.ece


def number_cell(value: float) -> Cell:
    return Cell(f"{value:.3f}" if isinstance(value, float) else str(value), value=value)


def calibration_pairs(result: ResultSet) -> dict[str, tuple[list[float], list[float]]]:
    """Named (confidences, agreements) of all layers that exits of this folder can leave at."""
    pairs = {}
    for setting in traced_baselines(result):
        confidences, agrees = stack_traces(setting)  # (T, L) each
        for layer in possible_exits(result, setting):
            name = f"layer {layer} ({setting.checkpoint})" if setting.checkpoint else f"layer {layer}"
            pairs[name] = (confidences[:, layer - 1].tolist(), agrees[:, layer - 1].tolist())
    for setting in result.main_settings:
        own = [pair for record in setting.records.values() for pair in record.get("calibration") or ()]
        if own:
            confidences, agrees = zip(*own, strict=True)
            pairs[f"{setting.name}, its own pairs"] = (list(confidences), list(agrees))
    return pairs


def traced_baselines(result: ResultSet) -> list[Setting]:
    """Full depth at its smallest batch size for each checkpoint, where it was traced."""
    found: dict[str, Setting] = {}
    for setting in sorted(result.settings, key=lambda setting: setting.batch_size):
        if setting.method == BASELINE and setting.traces:
            found.setdefault(setting.checkpoint, setting)
    return list(found.values())


def possible_exits(result: ResultSet, baseline: Setting) -> list[int]:
    """FREE's shallow layers on this checkpoint; without FREE a quarter, half and three quarters deep."""
    mine = [setting for setting in result.settings if setting.checkpoint == baseline.checkpoint]
    shallow = {setting.shallow_layer for setting in mine if setting.method.startswith("FREE")} - {None}
    depth = baseline.num_layers
    return sorted(shallow or {max(1, depth * quarter // 4) for quarter in (1, 2, 3)})


def stack_traces(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Confidences and agreements of all traced tokens: (T, L), (T, L)."""
    traces = list(setting.traces.values())
    return np.concatenate([trace.confidences for trace in traces]), np.concatenate(
        [trace.agrees for trace in traces]
    )


def threshold_section(sets: list[ResultSet]) -> dict[str, Any] | None:
    """The adaptive threshold in force at each sample, in the order of decoding."""
    lines = []
    for result in sets:
        for setting in result.main_settings:
            points = [
                (row + 1, record["threshold"])
                for row, record in sorted(setting.records.items())
                if record.get("threshold") is not None
            ]
            if len({value for _, value in points}) > 1:
                lines.append(Line(setting.name, points))
    if not lines:
        return None
    summary = "; ".join(
        f"{line.name}: from {line.points[0][1]:.2f} to {line.points[-1][1]:.2f}" for line in lines
    )
    description = f"Threshold over samples. {summary}."
    figure = line_figure(lines, "sample", "threshold")
    return {"svg": inline_svg(figure, "thresholds", description), "summary": summary}


# Oracle


def oracle_section(sets: list[ResultSet]) -> dict[str, Any] | None:
    """The earliest layer that predicts what the last one does, from there on or at all."""
    bars, rows = {}, []
    for result in sets:
        for setting in traced_baselines(result):
            _, agrees = stack_traces(setting)
            place = prefix(result, sets) + setting.checkpoint
            for kind, layers in (
                ("from there on", settled_layers(agrees)),
                ("at all", first_agreeing_layers(agrees)),
            ):
                found = oracle(layers, setting.num_layers)
                name = f"{place}, {kind}" if place else kind
                bars[name] = found
                figures = (len(layers), found.mean, found.ideal_speedup, found.counts[-1] / len(layers))
                rows.append([text_cell(name), *map(number_cell, figures)])
    if not bars:
        return None
    headings = [
        "agrees with the last layer",
        "tokens",
        "mean oracle layer",
        "ideal speed-up",
        "only at the last",
    ]
    summary = "; ".join(f"{name}: mean {found.mean:.2f}" for name, found in bars.items())
    svg = inline_svg(oracle_figure(bars), "oracle", f"Share of tokens over oracle layers. {summary}.")
    return {"svg": svg, "table": TableData(headings, rows)}


# Judge


def judge_section(judge: JudgeScores) -> dict[str, Any]:
    """Ratings, and outcomes of the comparison of two systems with the bias of their places."""
    rows, comparisons, dimensions = [], [], []
    for model, scores in judge.scores["judges"].items():
        likert = scores.get("likert", {"systems": {}})
        entries = dict(likert["systems"])
        if "difference" in likert:
            entries[f"difference ({' – '.join(likert['systems'])})"] = likert["difference"]
        for name, entry in entries.items():
            dimensions += [key for key in entry if is_mean(entry[key]) and key not in dimensions]
            rows.append((name, model, entry))
        if scores.get("pairwise", {}).get("samples"):
            comparisons.append(comparison(model, scores["pairwise"]))
    table = TableData(
        ["system", "judge", "samples", *dimensions],
        [
            [text_cell(name), text_cell(model), number_cell(entry["samples"])]
            + [mean_cell(entry.get(key)) for key in dimensions]
            for name, model, entry in rows
        ],
    )
    return {"label": judge.label, "table": table if rows else None, "comparisons": comparisons}


def is_mean(value: Any) -> bool:
    return isinstance(value, dict) and "mean" in value


def mean_cell(entry: dict[str, Any] | None) -> Cell:
    if not entry:
        return Cell("-")
    return Cell(format_figure(entry["mean"]), format_interval(entry["interval"]), entry["mean"])


def comparison(model: str, pairwise: dict[str, Any]) -> dict[str, Any]:
    """Outcome bar of two systems and a bar of the place that answers preferred."""
    first, second = pairwise["systems"]
    counts = {"wins": f"{first} better", "ties": "tie", "losses": f"{second} better"}
    position = pairwise["position"]
    return {
        "judge": model,
        "outcomes": [
            {
                "label": label,
                "count": pairwise[key],
                "percent": 100 * pairwise[key] / pairwise["samples"],
                "kind": key,
            }
            for key, label in counts.items()
        ],
        "win_rate": with_certainty(pairwise["win_rate"], pairwise["interval"], pairwise["p_value"]),
        "first": first,
        "first_share": position["first_share"],
        "consistency": format_figure(position["consistency"]),
        "position_p": format_p(position["p_value"]),
        "incomplete": pairwise["incomplete_pairs"],
    }


def with_certainty(value: float | None, bounds: list[float] | None, p_value: float | None) -> str:
    return f"{format_figure(value)} {format_interval(bounds)}, p {format_p(p_value)}"


def format_p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


# Sources


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
