"""How far two judges, or two repeats of one judge, agree: share of equal verdicts and Cohen's kappa."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from gpt_eval.parsing import DIMENSIONS, RATINGS
from gpt_eval.verdicts import Judged

Rater = tuple[str, int]  # judge, repeat


def rating_of(dimension: str) -> Callable[[Judged], Any]:
    """What a judgement says of a dimension; None where it says nothing."""
    return lambda row: row.verdict and row.verdict[dimension]


def summarize_agreement(judged: list[Judged]) -> list[dict[str, Any]]:
    """A row for each two repeats of a judge, each two judges (same repeat), and each thing they judge."""
    items = [(name, rating_of(name)) for name in DIMENSIONS]
    rows = []
    for judgement, asked in (("likert", items), ("pairwise", [("preference", lambda row: row.preference)])):
        chosen = [row for row in judged if row.judgement == judgement]
        for item, read in asked:
            rows += compare_raters(item, collect_verdicts(chosen, read), ordinal=judgement == "likert")
    return rows


def collect_verdicts(judged: list[Judged], read: Callable[[Judged], Any]) -> dict[Rater, dict[Hashable, Any]]:
    """Verdicts of each rater by what was asked; those that could not be read are left out."""
    verdicts: dict[Rater, dict[Hashable, Any]] = defaultdict(dict)
    for row in judged:
        if row.verdict is not None:
            verdicts[row.judge, row.repeat][row.id, row.systems] = read(row)
    return verdicts


def compare_raters(
    item: str, verdicts: dict[Rater, dict[Hashable, Any]], ordinal: bool
) -> list[dict[str, Any]]:
    rows = []
    for one, other in combinations(verdicts, 2):
        if one[0] != other[0] and one[1] != other[1]:
            continue
        shared = [name for name in verdicts[one] if name in verdicts[other]]
        if not shared:
            continue
        first, second = ([verdicts[rater][name] for name in shared] for rater in (one, other))
        rows.append(
            {
                "between": "repeats" if one[0] == other[0] else "judges",
                "raters": [f"{judge} #{repeat}" for judge, repeat in (one, other)],
                "item": item,
                "count": len(shared),
                "agreement": sum(a == b for a, b in zip(first, second, strict=True)) / len(shared),
                "kappa": cohen_kappa(first, second),
                "weighted_kappa": cohen_kappa(first, second, RATINGS) if ordinal else None,
            }
        )
    return rows


def cohen_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], scale: Sequence[int] | None = None
) -> float | None:
    """Agreement beyond chance, from -1 to 1; None where chance alone would agree always.

    Args:
        scale: ordered ratings; disagreement then weighs by its square, else all of it weighs the same.
    """
    categories = list(scale or dict.fromkeys([*first, *second]))
    observed = np.zeros((len(categories), len(categories)))
    for a, b in zip(first, second, strict=True):
        observed[categories.index(a), categories.index(b)] += 1
    observed /= len(first)
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0))
    distance = np.abs(np.subtract.outer(np.arange(len(categories)), np.arange(len(categories))))
    weights = distance**2 if scale else distance > 0
    by_chance = float((weights * expected).sum())
    return None if by_chance == 0 else 1 - float((weights * observed).sum()) / by_chance
