"""The sections of the page that draw figures: each function returns what the template shows, or None."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

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
from util.comparison import BASELINE
from util.report.figures import (
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
from util.report.heat_map import shade_class
from util.report.results import ResultSet, Setting
from util.report.table import TableData, format_interval, number_cell, score_name, settings_of, text_cell

MAX_CURVES = 6  # in one calibration plot


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
