"""What a language model as judge said: mean ratings, and two systems compared."""

from __future__ import annotations

from typing import Any

from util.report.results import JudgeScores
from util.report.table import Cell, TableData, format_interval, number_cell, text_cell
from util.tables import format_figure


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
        "Mean ratings, 1 to 5",
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
