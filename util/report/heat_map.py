"""Decoded samples with each token in the colour of its exit layer, for the HTML report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from util.comparison import BASELINE
from util.report.results import ResultSet, Setting, Trace

DEPTH_SHADES = 21  # colours between the first and the last layer
HEAT_SAMPLES, HEAT_SETTINGS, HEAT_TOKENS = 4, 5, 60  # most samples a folder, settings a sample, tokens shown
MAX_HEAT_SAMPLES = 12  # on the page


@dataclass
class Token:
    text: str
    space: bool  # before it
    shade: str  # CSS class
    differs: bool
    detail: str


@dataclass
class HeatRow:
    setting: str
    tokens: list[Token]
    cut: bool


@dataclass
class HeatSample:
    id: str
    references: list[str]
    full_depth: list[tuple[str, str]]  # (heading, prediction)
    rows: list[HeatRow]


def heat_section(sets: list[ResultSet]) -> dict[str, Any] | None:
    """A few samples whose tokens left at different layers, as several settings decoded them."""
    samples = [sample for result in sets for sample in heat_samples(result)][:MAX_HEAT_SAMPLES]
    if not samples:
        return None
    depths = {setting.num_layers for result in sets for setting in result.settings if setting.num_layers}
    depth = max(depths)
    legend = [(layer, shade_class(layer, depth)) for layer in legend_layers(depth)]
    return {"samples": samples, "legend": legend, "mixed_depths": len(depths) > 1}


def legend_layers(depth: int) -> list[int]:
    """All layers of a shallow model, else a handful."""
    if depth <= 12:
        return list(range(1, depth + 1))
    return sorted({round(1 + (depth - 1) * step / 6) for step in range(7)})


def heat_samples(result: ResultSet) -> list[HeatSample]:
    shown = heat_settings(result)
    scores: dict[int, tuple[int, int]] = {}
    for setting in shown:
        for row, record in setting.records.items():
            if is_mixed(record) and record["tokens"] <= HEAT_TOKENS:
                mixed, traced = scores.get(row, (0, 0))
                scores[row] = (mixed + 1, traced + (row in setting.traces))
    # Traced samples first, then those that most settings decoded at several depths; ties in order.
    best = sorted(scores, key=lambda row: (-scores[row][1], -scores[row][0], row))[:HEAT_SAMPLES]
    return [heat_sample(result, shown, row) for row in sorted(best)]


def heat_settings(result: ResultSet) -> list[Setting]:
    """One setting a method, if its tokens leave at several layers: the fastest good one, else the first."""
    by_method: dict[str, Setting] = {}
    for setting in result.main_settings:
        if any(map(is_mixed, setting.records.values())) and setting.num_layers:
            chosen = result.fastest_99.get(setting.method) == setting.name
            if chosen or setting.method not in by_method:
                by_method[setting.method] = setting
    return list(by_method.values())[:HEAT_SETTINGS]


def is_mixed(record: dict[str, Any]) -> bool:
    return len(set(record["exit_layers"] or ())) > 1


def heat_sample(result: ResultSet, shown: list[Setting], row: int) -> HeatSample:
    having = [setting for setting in shown if row in setting.records]
    record = having[0].records[row]
    references = record["reference"] if isinstance(record["reference"], list) else [record["reference"]]
    full = full_depth_outputs(result, having, row)
    return HeatSample(str(record["id"]), references, full, [heat_row(setting, row) for setting in having])


def full_depth_outputs(result: ResultSet, shown: list[Setting], row: int) -> list[tuple[str, str]]:
    """What full depth makes of the sample, once for each checkpoint shown."""
    checkpoints = {setting.checkpoint for setting in shown}
    candidates = [*result.settings, *([result.baseline] if result.baseline else [])]
    found = {}
    for setting in candidates:
        if setting.method == BASELINE and setting.checkpoint in checkpoints and row in setting.records:
            found.setdefault(setting.checkpoint, setting.records[row]["prediction"])
    return [(f"full depth ({name})" if name else "full depth", text) for name, text in found.items()]


def heat_row(setting: Setting, row: int) -> HeatRow:
    """Tokens of a record, with what its trace knows of them; the trace must be of the same tokens."""
    record, trace = setting.records[row], setting.traces.get(row)
    if trace is not None and trace.pieces != record["pieces"]:
        trace = None
    count = min(len(record["pieces"]), len(record["exit_layers"]), HEAT_TOKENS)
    tokens = [heat_token(setting, record, trace, index) for index in range(count)]
    return HeatRow(setting.name, tokens, len(record["pieces"]) > count)


def heat_token(setting: Setting, record: dict[str, Any], trace: Trace | None, index: int) -> Token:
    layer, piece = record["exit_layers"][index], record["pieces"][index]
    parts = [f"“{readable(piece).strip(' ')}” left after layer {layer} of {setting.num_layers}"]
    if trace is not None:
        layers = sorted({layer, setting.shallow_layer or layer})
        sure = ", ".join(f"{trace.confidences[index, at - 1]:.2f} at layer {at}" for at in layers)
        parts += [f"confidence {sure}", f"deep model: “{readable(trace.deep[index]).strip(' ')}”"]
    differs = trace is not None and trace.deep[index] != piece
    shown = readable(piece)
    space = shown.startswith(" ") and index > 0
    return Token(shown.lstrip(" "), space, shade_class(layer, setting.num_layers), differs, "; ".join(parts))


def readable(piece: str) -> str:
    """A piece of SentencePiece or byte-level BPE with its space as a space; a lone space stays visible."""
    text = piece.replace("▁", " ").replace("Ġ", " ")
    return text if text.strip() else "␣"


def shade_class(layer: int, num_layers: int) -> str:
    """CSS class of an exit layer: `d0` for the first layer, `d20` for the last."""
    return f"d{round((DEPTH_SHADES - 1) * (layer - 1) / max(1, num_layers - 1))}"


def depth_shades() -> list[dict[str, str]]:
    """Background and text colour of each shade of cividis, a map made for colour-blind readers."""
    shades = []
    for index in range(DEPTH_SHADES):
        red, green, blue, _ = colormaps["cividis"](1 - index / (DEPTH_SHADES - 1))
        light = relative_luminance(red, green, blue) > 0.19  # where dark text has as much contrast as white
        shades.append({"back": to_hex((red, green, blue)), "text": "#0b0b0b" if light else "#ffffff"})
    return shades


def relative_luminance(*channels: float) -> float:
    """WCAG's luminance of an sRGB colour with channels in [0, 1]."""
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
