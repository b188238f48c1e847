"""Decoded samples with each token in the colour of its exit layer, for the HTML report.

A card holds one sample: its source, its reference, and what every method made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from util.evaluation.records import Record, Trace
from util.methods import BASELINE, HF_GENERATE, without_lookup
from util.pieces import readable
from util.report.results import ResultSet, SettingResults

DEPTH_SHADES = 21  # colours between the first and the last layer
HEAT_SAMPLES, MAX_HEAT_SAMPLES = 4, 12  # of a data set, on the page
HEAT_TOKENS = 60  # more are not shown
SHORT_SOURCE = 400  # characters; longer ones unfold


@dataclass
class Token:
    text: str
    space: bool  # before it
    shade: str  # CSS class
    differs: bool
    detail: str


@dataclass
class HeatRow:
    """What a setting made of a sample: tokens in colour, or where they tell nothing, the text."""

    setting: str
    tokens: list[Token]
    cut: bool = False
    text: str = ""


@dataclass
class HeatSample:
    id: str
    data: str
    source: str | None
    references: list[str]
    rows: list[HeatRow]


@dataclass
class Shown:
    """A setting and its samples."""

    setting: SettingResults
    records: dict[str, Record]  # by the sample's id; the first of several windows


def heat_section(sets: list[ResultSet]) -> dict[str, Any] | None:
    """A few samples whose tokens left at different layers, as one setting of each method decoded them."""
    groups: dict[tuple[str, str | None], list[ResultSet]] = {}
    for result in sets:
        groups.setdefault((result.origin, result.split), []).append(result)
    samples = [sample for group in groups.values() for sample in heat_samples(group)][:MAX_HEAT_SAMPLES]
    if not samples:
        return None
    depths = {setting.num_layers for result in sets for setting in result.settings if setting.num_layers}
    depth = max(depths)
    legend = [(layer, shade_class(layer, depth)) for layer in legend_layers(depth)]
    return {
        "samples": samples,
        "legend": legend,
        "mixed_depths": len(depths) > 1,
        "several": len(groups) > 1,
        "short_source": SHORT_SOURCE,
    }


def legend_layers(depth: int) -> list[int]:
    """All layers of a shallow model, else a handful."""
    if depth <= 12:
        return list(range(1, depth + 1))
    return sorted({round(1 + (depth - 1) * step / 6) for step in range(7)})


def heat_samples(group: list[ResultSet]) -> list[HeatSample]:
    """Samples of one data set, whichever folders decoded them."""
    shown = [Shown(setting, first_records(setting)) for result in group for setting in heat_settings(result)]
    scores: dict[str, tuple[int, int]] = {}
    for one in shown:
        for name, record in one.records.items():
            if is_mixed(record) and record.tokens <= HEAT_TOKENS:
                mixed, traced = scores.get(name, (0, 0))
                scores[name] = (mixed + 1, traced + (record.row in one.setting.traces))
    # Traced samples first, then those that most settings decoded at several depths; ties in order.
    places = {name: place for place, name in enumerate(scores)}
    best = sorted(scores, key=lambda name: (-scores[name][1], -scores[name][0], places[name]))[:HEAT_SAMPLES]
    return [heat_sample(group[0].data, shown, name) for name in sorted(best, key=places.__getitem__)]


def first_records(setting: SettingResults) -> dict[str, Record]:
    records: dict[str, Record] = {}
    for record in setting.records:
        records.setdefault(record.id, record)
    return records


def heat_settings(result: ResultSet) -> list[SettingResults]:
    """One setting of each method on each checkpoint: its fastest good one, else the one of best quality."""

    def preference(setting: SettingResults) -> tuple[bool, float]:
        return setting.name in good, setting.figures.get("quality_share") or 0.0

    good = set(result.fastest_99.values())
    chosen: dict[tuple[str, str], SettingResults] = {}
    for setting in result.main_settings:
        best = chosen.setdefault((setting.method, setting.checkpoint), setting)
        if preference(setting) > preference(best):
            chosen[setting.method, setting.checkpoint] = setting
    return list(chosen.values())


def is_mixed(record: Record) -> bool:
    return len(set(record.exit_layers or ())) > 1


def heat_sample(data: str, shown: list[Shown], name: str) -> HeatSample:
    having = [(one.setting, one.records[name]) for one in shown if name in one.records]
    reference = having[0][1].reference
    same = [(setting, record) for setting, record in having if record.reference == reference]
    sources = [record.source for _, record in same if record.source]
    return HeatSample(
        id=name,
        data=data,
        source=sources[0] if sources else None,
        references=reference if isinstance(reference, list) else [reference],
        rows=[*plain_rows(same), *(heat_row(*pair) for pair in same if not is_plain(pair[0]))],
    )


def is_plain(setting: SettingResults) -> bool:
    """Whether all tokens leave at the last layer anyway."""
    return without_lookup(setting.method) in (BASELINE, HF_GENERATE)


def plain_rows(pairs: list[tuple[SettingResults, Record]]) -> list[HeatRow]:
    """What full depth makes of the sample: a row for each text, named after all who say so."""
    names: dict[str, list[str]] = {}
    for setting, record in pairs:
        if is_plain(setting):
            names.setdefault(record.prediction, []).append(setting.name)
    return [HeatRow(", ".join(who), [], text=text) for text, who in names.items()]


def heat_row(setting: SettingResults, record: Record) -> HeatRow:
    """Tokens of a record, with what its trace knows of them; the trace must be of the same tokens."""
    trace = None if record.row is None else setting.traces.get(record.row)
    if not record.exit_layers or not setting.num_layers:
        return HeatRow(setting.name, [], text=record.prediction)
    if trace is not None and trace.pieces != record.pieces:
        trace = None
    pairs = list(zip(record.pieces, record.exit_layers, strict=False))[:HEAT_TOKENS]
    tokens = [heat_token(setting, trace, index, *pair) for index, pair in enumerate(pairs)]
    return HeatRow(setting.name, tokens, len(record.pieces) > len(pairs))


def heat_token(
    setting: SettingResults, trace: Trace | None, index: int, piece: str | None, layer: int
) -> Token:
    parts = [f"“{visible(piece).strip(' ')}” left after layer {layer} of {setting.num_layers}"]
    if trace is not None:
        layers = sorted({layer, setting.shallow_layer or layer})
        sure = ", ".join(f"{trace.confidences[index, at - 1]:.2f} at layer {at}" for at in layers)
        parts += [f"confidence {sure}", f"deep model: “{visible(trace.deep[index]).strip(' ')}”"]
    differs = trace is not None and trace.deep[index] != piece
    shown = visible(piece)
    space = shown.startswith(" ") and index > 0
    return Token(shown.lstrip(" "), space, shade_class(layer, setting.depth), differs, "; ".join(parts))


def visible(piece: str | None) -> str:
    """A lone space stays visible, as does a token without a text."""
    text = readable(piece)
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
