"""How sure a score is: bootstrap confidence intervals, and the paired bootstrap between two systems.

Samples are drawn with replacement from the rows of a metric's sufficient statistics (Koehn, 2004); corpus
metrics such as BLEU are recomputed for each draw.
"""

from __future__ import annotations

import numpy as np

from util.evaluation.metrics import Measured

RESAMPLES = 1000
CONFIDENCE = 0.95


Draws = dict[str, np.ndarray]
"""By score: its value on every resample, (RESAMPLES,)."""


def draw_scores(corpus: Measured, seed: int = 0) -> Draws:
    """Each score on every resample. Equal sizes and seeds draw equal samples."""
    draws = [corpus.scores(rows) for rows in resamples(len(corpus.statistics), seed)]
    return {name: np.array([draw[name] for draw in draws]) for name in corpus.metric.names}


def confidence_intervals(draws: Draws) -> dict[str, list[float]]:
    """95% interval [low, high] of each score."""
    return {name: interval(values) for name, values in draws.items()}


def paired_bootstrap(
    system: Measured, ours: Draws, baseline: Measured
) -> dict[str, dict[str, float | list[float]]]:
    """Difference to a baseline on the same samples: its value, 95% interval and two-sided p-value; `ours` are
    the system's draws."""
    theirs = draw_scores(baseline)
    our_score, their_score = system.scores(), baseline.scores()
    results: dict[str, dict[str, float | list[float]]] = {}
    for name in ours:
        differences = ours[name] - theirs[name]
        results[name] = {
            "difference": our_score[name] - their_score[name],
            "interval": interval(differences),
            "p_value": p_value(differences),
        }
    return results


def sum_ratio_interval(numerators: list[float], denominators: list[float], seed: int = 0) -> list[float]:
    """95% interval of sum(numerators) / sum(denominators) over paired samples, such as a speed-up's."""
    rows = resamples(len(numerators), seed)
    return interval(np.array(numerators)[rows].sum(1) / np.array(denominators)[rows].sum(1))


def resamples(size: int, seed: int) -> np.ndarray:
    """Row numbers of each draw: (RESAMPLES, size)."""
    return np.random.default_rng(seed).integers(size, size=(RESAMPLES, size))


def interval(values: np.ndarray) -> list[float]:
    tail = 50 * (1 - CONFIDENCE)
    return np.percentile(values, [tail, 100 - tail]).tolist()


def p_value(differences: np.ndarray) -> float:
    """Share of draws on the rarer side of zero, doubled; ties count on both sides."""
    rarer = min((differences <= 0).mean(), (differences >= 0).mean())
    return float(min(1.0, 2 * (rarer * len(differences) + 1) / (len(differences) + 1)))
