"""The sections of the page that draw figures: each function returns what the template shows, or None."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from util.analysis import (
    GOOD_SHARE,
    Reliability,
    exit_shares,
    first_agreeing_layers,
    oracle,
    reliability,
    settled_layers,
)
from util.methods import BASELINE, FREE
from util.report.figures import (
    Line,
    Point,
    inline_svg,
    line_figure,
    near_points,
    oracle_figure,
    reliability_figure,
    save_figure,
    throughput_figure,
    trade_off_figure,
)
from util.report.heat_map import shade_class
from util.report.results import ResultSet, SettingResults
from util.report.table import TableData, format_interval, number_cell, score_name, text_cell

MAX_CURVES = 6  # in one calibration plot


@dataclass
class Measure:
    """What an axis shows: a key of the figures, its interval's key or "", its label, the unit of a value."""

    key: str
    interval: str
    label: str
    unit: str


def trade_off_section(sets: list[ResultSet], output_dir: Path) -> dict[str, Any] | None:
    """Quality kept against measured speed-up; where none was measured, against the ideal one."""
    found = choose_measures(plotted_settings(sets))
    if found is None:
        return None
    pairs, x, y = found
    several = len({result.data for result, _ in pairs}) > 1
    points = [as_point(result, setting, x, y, several) for result, setting in pairs]
    line = GOOD_SHARE if y.key == "quality_share" else None
    near = near_points(points, line)
    panels = [points, near] if near else [points]
    both = trade_off_figure(points, panels, x.label, y.label, line)
    save_figure(both, output_dir / "trade_off.png", output_dir / "trade_off.svg")
    details = [point.detail for point in points]
    front = "; ".join(point.detail for point in points if point.pareto)
    descriptions = [f"Scatter plot of {y.label} against {x.label}, {len(points)} settings."]
    descriptions[0] += f" On the Pareto front: {front}." if front else ""
    descriptions += [f"The same near {line:.0f}%."] if near else []
    figures = [
        trade_off_figure(points, [panel], x.label, y.label, line, legend=panel is points) for panel in panels
    ]
    return {
        "svgs": [
            inline_svg(figure, f"trade-off-{number}", description, details)
            for number, (figure, description) in enumerate(zip(figures, descriptions, strict=True))
        ],
        "near": line if near else None,
        "line": line,
        "measured": x.key == "speedup",
        "pareto": any(point.pareto for point in points),
        "intervals": any(point.x_interval or point.y_interval for point in points),
        "batch_sizes": sorted({setting.batch_size for _, setting in pairs}),
        "auc": [(name, f"{value:.3f}") for result in sets for name, value in result.auc.items()],
    }


def plotted_settings(sets: list[ResultSet]) -> list[tuple[ResultSet, SettingResults]]:
    return [(result, setting) for result in sets for setting in result.main_settings if setting.figures]


def choose_measures(
    pairs: list[tuple[ResultSet, SettingResults]],
) -> tuple[list[tuple[ResultSet, SettingResults]], Measure, Measure] | None:
    """The first pair of axes that tells at least two settings apart, and the settings that have it."""
    scores = dict(sorted((score_name(result), result.main_score) for result, _ in pairs))
    of_full = f"{' or '.join(scores)}, % of full depth"
    qualities = [Measure("quality_share", "quality_share_interval", of_full, "% of full depth")]
    if len(scores) == 1:
        qualities += [Measure(key, "interval", name, f" {name}") for name, key in scores.items()]
    speeds = [
        Measure("speedup", "speedup_interval", "speed-up over full depth (measured)", "× speed-up"),
        Measure("ideal_speedup", "", "ideal speed-up (by layers run, not by time)", "× ideal speed-up"),
    ]
    for x, y in product(speeds, qualities):
        chosen = [
            pair for pair in pairs if None not in (pair[1].figures.get(x.key), pair[1].figures.get(y.key))
        ]
        if len(chosen) > 1:
            return chosen, x, y
    return None


def as_point(result: ResultSet, setting: SettingResults, x: Measure, y: Measure, several: bool) -> Point:
    """A setting as a point; where the page holds several data sets, it names its own."""
    figures, method = setting.figures, setting.method
    parameters = setting.zeta, setting.threshold, setting.shallow_layer
    series = method if method == BASELINE or not setting.checkpoint else f"{method} ({setting.checkpoint})"
    bounds = [figures.get(measure.interval) for measure in (x, y)]
    parts = [
        f"{figures[measure.key]:.2f}{measure.unit} {format_interval(interval)}".strip()
        for measure, interval in zip((x, y), bounds, strict=True)
    ]
    where = f" ({result.data})" if several else ""
    return Point(
        series=f"{series}, {result.data}" if several else series,
        order=next((value for value in parameters if value is not None), 0),
        x=figures[x.key],
        y=figures[y.key],
        x_interval=bounds[0],
        y_interval=bounds[1],
        pareto=setting.name in result.pareto and x.key == "speedup",
        detail=f"{setting.name}{where}: {', '.join(parts)}",
    )


def throughput_section(sets: list[ResultSet]) -> Markup | None:
    """Tokens per second over batch sizes, of one setting of each method on each checkpoint."""
    lines = throughput_lines(sets)
    if not lines:
        return None
    summary = "; ".join(
        f"{line.name}: " + ", ".join(f"{speed:.0f} at {size}" for size, speed in line.points)
        for line in lines
    )
    description = f"Tokens per second over batch sizes. {summary}."
    return inline_svg(throughput_figure(lines), "throughput", description)


def throughput_lines(sets: list[ResultSet]) -> list[Line]:
    """One for each method, checkpoint and folder: its fastest good setting, or else the first, at several
    batch sizes."""
    lines: dict[tuple[str, str, str], Line] = {}
    for result in sets:
        series: dict[tuple[Any, ...], list[SettingResults]] = defaultdict(list)
        for setting in result.settings:
            if setting.figures.get("tokens_per_second") is not None:
                kind = setting.method, setting.checkpoint
                parameters = setting.threshold, setting.zeta, setting.shallow_layer
                series[(*kind, *parameters)].append(setting)
        for (method, checkpoint, *_), members in series.items():
            members.sort(key=lambda setting: setting.batch_size)
            points = [(setting.batch_size, setting.figures["tokens_per_second"]) for setting in members]
            key = (result.label, method, checkpoint)
            known = key in lines and members[0].name not in result.fastest_99.values()
            if len(dict(points)) > 1 and not known:
                lines[key] = Line(members[0].name, points)
    return list(lines.values())


def depth_section(sets: list[ResultSet]) -> list[dict[str, Any]]:
    """Share of tokens for each exit layer: a bar for each setting whose tokens leave at several layers."""
    counted = [
        (setting, layers)
        for result in sets
        for setting in result.main_settings
        if setting.num_layers and (layers := setting.exit_layers)
    ]
    return [depth_bar(setting, layers) for setting, layers in counted if len(set(layers)) > 1]


def depth_bar(setting: SettingResults, layers: list[int]) -> dict[str, Any]:
    parts = [
        {
            "layer": layer,
            "percent": 100 * share,
            "shade": shade_class(layer, setting.depth),
            "detail": f"layer {layer}: {100 * share:.1f}% of {len(layers)} tokens",
        }
        for layer, share in exit_shares(layers).items()
    ]
    return {"setting": setting.name, "parts": parts, "mean": statistics.mean(layers), "count": len(layers)}


def calibration_section(sets: list[ResultSet]) -> dict[str, Any] | None:
    """Shallow confidence against agreement with the last layer, from traces or calibration pairs."""
    curves: dict[str, Reliability] = {}
    for result in sets:
        for name, (confidences, agrees) in calibration_pairs(result).items():
            curve = reliability(confidences, agrees)
            if curve is not None:
                curves[sweep_label(result, sets) + name] = curve
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
    return {"svg": svg, "table": TableData("Calibration", headings, rows)}


def sweep_label(result: ResultSet, sets: list[ResultSet]) -> str:
    """Tells the sweeps of a page apart; runs are settings with names of their own."""
    several = sum(other.kind == "sweep" for other in sets) > 1
    return f"{result.label}: " if several and result.kind == "sweep" else ""


def calibration_figures(curve: Reliability) -> tuple[float, ...]:
    return curve.count, curve.confidence, curve.agreement, curve.ece


def calibration_pairs(result: ResultSet) -> dict[str, tuple[list[float], list[float]]]:
    """Named (confidences, agreements) of all layers that exits of this folder can leave at."""
    pairs = {}
    for setting in traced_baselines(result):
        confidences, agrees = stack_traces(setting)  # (T, L) each
        for layer in possible_exits(result, setting):
            name = f"layer {layer} ({setting.checkpoint})" if setting.checkpoint else f"layer {layer}"
            pairs[name] = (confidences[:, layer - 1].tolist(), agrees[:, layer - 1].tolist())
    for setting in result.main_settings:
        own = [pair for record in setting.records for pair in record.calibration or ()]
        if own:
            pairs[f"{setting.name}, its own pairs"] = ([pair[0] for pair in own], [pair[1] for pair in own])
    return pairs


def traced_baselines(result: ResultSet) -> list[SettingResults]:
    """Full depth at its smallest batch size for each checkpoint, where it was traced."""
    found: dict[str, SettingResults] = {}
    for setting in sorted(result.settings, key=lambda setting: setting.batch_size):
        if setting.method == BASELINE and setting.traces:
            found.setdefault(setting.checkpoint, setting)
    return list(found.values())


def possible_exits(result: ResultSet, baseline: SettingResults) -> list[int]:
    """FREE's shallow layers on this checkpoint; without FREE a quarter, half and three quarters deep."""
    mine = [setting for setting in result.settings if setting.checkpoint == baseline.checkpoint]
    shallow = {setting.shallow_layer for setting in mine if setting.method.startswith(FREE)}
    known = {layer for layer in shallow if layer is not None}
    return sorted(known or {max(1, baseline.depth * quarter // 4) for quarter in (1, 2, 3)})


def stack_traces(setting: SettingResults) -> tuple[np.ndarray, np.ndarray]:
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
            points = sorted(
                (record.row + 1, record.threshold)
                for record in setting.records
                if record.row is not None and record.threshold is not None
            )
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


def oracle_section(sets: list[ResultSet]) -> dict[str, Any] | None:
    """The earliest layer that predicts what the last one does, from there on or at all."""
    bars, rows = {}, []
    for result in sets:
        for setting in traced_baselines(result):
            _, agrees = stack_traces(setting)
            place = sweep_label(result, sets) + setting.checkpoint
            for kind, layers in (
                ("from there on", settled_layers(agrees)),
                ("at all", first_agreeing_layers(agrees)),
            ):
                found = oracle(layers, setting.depth)
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
    return {"svg": svg, "table": TableData("Oracle layers", headings, rows)}
