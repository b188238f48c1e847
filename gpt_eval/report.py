"""Scores as a table, JSON and a plot.

Layout of scores.json (figures that cannot be computed are null; every interval is a 95% interval [low, high];
`answers` counts requests: {"strict", "lenient", "unparsable", "refused", "missing"}; only the first two are
scored):

    {"requests": int, "distinct_requests": int,       # requests with equal text share one answer
     "judges": {"<model>": {
        "answers": {...},
        "usage": {"prompt_tokens": int, "completion_tokens": int},
        "likert": {                                    # where Likert was asked
          "systems": {"<system>": {
            "answers": {...}, "samples": int,
            "relevance": {"mean": float, "interval": [float, float]},
            "informativeness": {...}, "fluency": {...}, "coherence": {...},
            "average": {...}}},                        # of the four
          "difference": {"samples": int, "relevance": {...}, ...}},   # first - second; two systems only
        "pairwise": {                                  # where pairs were asked
          "systems": ["<first>", "<second>"], "answers": {...},
          "samples": int,                              # with at least one complete pair of orders
          "incomplete_pairs": int,                     # left out: an order missing or unparsable
          "wins": int, "losses": int, "ties": int,     # of the first system, in samples
          "win_rate": float, "interval": [...],        # wins / (wins + losses), exact interval
          "p_value": float,                            # two-sided binomial test against 1/2
          "position": {
            "first_share": float,                      # of decided answers, those for the summary shown first
            "consistency": float,                      # pairs whose two orders agree
            "always_first": int, "always_second": int, # samples in which the place decided
            "p_value": float}}}},                      # binomial test between these two
     "agreement": [                                    # each two repeats of a judge, each two judges
        {"between": "repeats" | "judges", "raters": ["<model> #<repeat>", ...],
         "item": "relevance" | ... | "preference", "count": int, "agreement": float,
         "kappa": float, "weighted_kappa": float}]}    # weighted: quadratic, Likert only

Without readable Likert answers a system has no dimensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt_eval.parsing import DIMENSIONS
from util.files import write_json
from util.tables import WholeTable, comparison_table, print_report

FIGURES = (*DIMENSIONS, "average")
LIKERT_COLUMNS = {"samples": "samples", **{name: name for name in FIGURES}}
AGREEMENT_COLUMNS = {
    "raters": "raters",
    "item": "item",
    "count": "count",
    "agreement": "equal",
    "kappa": "kappa",
    "weighted_kappa": "weighted",
}
OUTCOME_COLORS = {"wins": "C0", "ties": "0.8", "losses": "C1"}


def write_report(folder: Path, scores: dict[str, Any]) -> None:
    """Print tables; write scores.json and scores.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "scores.json", scores)
    plot_scores(folder / "scores.png", scores)
    print_report(*tables(scores), f"Wrote scores.json and scores.png to {folder}")


def tables(scores: dict[str, Any]) -> list[WholeTable]:
    judges = scores["judges"]
    columns = {"name": "figure", **{judge: judge for judge in judges}}
    likert = [row for judge, results in judges.items() for row in likert_rows(judge, results)]
    pairwise = {
        judge: pairwise_figures(results) for judge, results in judges.items() if "pairwise" in results
    }
    agreement = [row | {"raters": ", ".join(row["raters"])} for row in scores["agreement"]]
    answers = {judge: results["answers"] for judge, results in judges.items()}
    found = [
        ("Likert, 1 to 5 (95% interval)", {"system": "system", "judge": "judge"} | LIKERT_COLUMNS, likert),
        ("Pairwise", columns, transpose(pairwise)),
        ("Agreement", AGREEMENT_COLUMNS, agreement),
        ("Answers", columns, transpose(answers)),
    ]
    return [comparison_table(title, headings, rows) for title, headings, rows in found if rows]


def transpose(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a figure, with a column for each judge."""
    names = next(iter(figures.values()), {})
    return [{"name": name, **{judge: row[name] for judge, row in figures.items()}} for name in names]


def likert_rows(judge: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    likert = results.get("likert", {"systems": {}})
    systems = dict(likert["systems"])
    if "difference" in likert:
        systems["difference"] = likert["difference"]
    return [
        {"system": name, "judge": judge, "samples": row["samples"]}
        | {figure: with_interval(**row[figure]) for figure in FIGURES if figure in row}
        for name, row in systems.items()
    ]


def pairwise_figures(results: dict[str, Any]) -> dict[str, Any]:
    pairwise = results["pairwise"]
    first, second = pairwise["systems"]
    position = pairwise["position"]
    return {
        f"{first} wins": pairwise["wins"],
        f"{second} wins": pairwise["losses"],
        "ties": pairwise["ties"],
        f"win rate of {first}": with_interval(pairwise["win_rate"], pairwise["interval"]),
        "p (binomial)": as_probability(pairwise["p_value"]),
        "incomplete pairs": pairwise["incomplete_pairs"],
        "orders agree": position["consistency"],
        "answers for the one shown first": position["first_share"],
        "p (position)": as_probability(position["p_value"]),
    }


def with_interval(mean: float | None, interval: list[float] | None) -> str | None:
    return None if mean is None or interval is None else f"{mean:.2f}\n({interval[0]:.2f}, {interval[1]:.2f})"


def as_probability(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def plot_scores(path: Path, scores: dict[str, Any]) -> None:
    """One row a judge: mean ratings with intervals, and the outcome of the comparison."""
    judges = scores["judges"]
    figure = Figure(figsize=(10, 3.2 * len(judges)), layout="constrained")
    grid = figure.subplots(len(judges), 2, squeeze=False, width_ratios=(3, 2))
    for (judge, results), (left, right) in zip(judges.items(), grid, strict=True):
        plot_likert(left, results.get("likert"))
        plot_pairwise(right, results.get("pairwise"))
        left.set_title(judge, loc="left", parse_math=False)
    figure.savefig(path, dpi=150)


def plot_likert(axes: Axes, likert: dict[str, Any] | None) -> None:
    systems = {name: row for name, row in (likert or {"systems": {}})["systems"].items() if row["samples"]}
    if not systems:
        axes.set_axis_off()
        return
    width = 0.8 / len(systems)
    for index, (name, row) in enumerate(systems.items()):
        places = [place + (index - (len(systems) - 1) / 2) * width for place in range(len(FIGURES))]
        means = [row[figure]["mean"] for figure in FIGURES]
        bounds = [row[figure]["interval"] for figure in FIGURES]
        errors = [
            [max(0.0, mean - low) for mean, (low, _) in zip(means, bounds, strict=True)],
            [max(0.0, high - mean) for mean, (_, high) in zip(means, bounds, strict=True)],
        ]
        axes.bar(places, means, width, yerr=errors, label=name.lstrip("_"), capsize=2)
    axes.set_xticks(range(len(FIGURES)), FIGURES, fontsize=9)
    axes.set_ylim(1, 5)
    axes.set_ylabel("mean rating")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)


def plot_pairwise(axes: Axes, pairwise: dict[str, Any] | None) -> None:
    if pairwise is None or not pairwise["samples"]:
        axes.set_axis_off()
        return
    first, second = pairwise["systems"]
    labels = f"{first} better", "tie", f"{second} better"
    start = 0
    for (outcome, color), label in zip(OUTCOME_COLORS.items(), labels, strict=True):
        axes.barh([0], [pairwise[outcome]], left=start, color=color, label=f"{label}: {pairwise[outcome]}")
        start += pairwise[outcome]
    axes.set_yticks([])
    axes.set_xlabel("samples")
    axes.set_ylim(-1, 1)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
    axes.spines[["top", "right", "left"]].set_visible(False)
