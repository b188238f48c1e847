"""How sure a score is: bootstrap confidence intervals, and the paired bootstrap between two systems.

Samples are drawn with replacement from the rows of a metric's sufficient statistics (Koehn, 2004); corpus
metrics such as BLEU are recomputed for each draw.
"""

from __future__ import annotations

import numpy as np

from util.metrics import METRICS, Reference
from util.tasks import TASKS

RESAMPLES = 1000
CONFIDENCE = 0.95


def confidence_intervals(
    task: str, predictions: list[str], references: list[Reference], seed: int = 0
) -> dict[str, list[float]]:
    """95% interval [low, high] of each of the task's scores."""
    metric = METRICS[TASKS[task].metric]()
    statistics = metric.statistics(predictions, references)
    draws = [metric.scores(statistics[rows]) for rows in resamples(len(statistics), seed)]
    return {name: interval([draw[name] for draw in draws]) for name in metric.names}


def paired_bootstrap(
    task: str,
    predictions: list[str],
    baseline: list[str],
    references: list[Reference],
    seed: int = 0,
) -> dict[str, dict[str, float | list[float]]]:
    """Difference to a baseline on the same samples: its value, 95% interval and two-sided p-value."""
    metric = METRICS[TASKS[task].metric]()
    ours, theirs = (metric.statistics(texts, references) for texts in (predictions, baseline))
    draws = [(metric.scores(ours[rows]), metric.scores(theirs[rows])) for rows in resamples(len(ours), seed)]
    whole = metric.scores(ours), metric.scores(theirs)
    results = {}
    for name in metric.names:
        differences = np.array([first[name] - second[name] for first, second in draws])
        results[name] = {
            "difference": whole[0][name] - whole[1][name],
            "interval": interval(differences),
            "p_value": p_value(differences),
        }
    return results


def resamples(size: int, seed: int) -> np.ndarray:
    """Row numbers of each draw: (RESAMPLES, size)."""
    return np.random.default_rng(seed).integers(size, size=(RESAMPLES, size))


def interval(values: list[float] | np.ndarray) -> list[float]:
    tail = 50 * (1 - CONFIDENCE)
    return np.percentile(values, [tail, 100 - tail]).tolist()


def p_value(differences: np.ndarray) -> float:
    """Share of draws on the rarer side of zero, doubled; ties count on both sides."""
    rarer = min((differences <= 0).mean(), (differences >= 0).mean())
    return float(min(1.0, 2 * (rarer * len(differences) + 1) / (len(differences) + 1)))
