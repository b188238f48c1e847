"""What per-token records say about exits: calibration, oracle layers, exit shares, Pareto front.

Pure functions of numbers and arrays; layers are counted from 1, T tokens, L layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CALIBRATION_BINS = 10
GOOD_SHARE = 99.0  # per cent of full depth's quality


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions with a confidence in [low, high): their number, mean confidence and share of agreement."""

    low: float
    high: float
    count: int
    confidence: float
    agreement: float


@dataclass(frozen=True)
class Reliability:
    """`bins` lists those with predictions; `ece` is the expected calibration error (Guo et al., 2017)."""

    bins: list[ReliabilityBin]
    count: int
    confidence: float
    agreement: float
    ece: float


def reliability(
    confidences: Sequence[float], agrees: Sequence[float], num_bins: int = CALIBRATION_BINS
) -> Reliability | None:
    """Reliability over bins of equal width on [0, 1], the last one closed; None without predictions."""
    values, right = np.asarray(confidences, dtype=float), np.asarray(agrees, dtype=float)
    if len(values) == 0:
        return None
    index = np.clip((values * num_bins).astype(int), 0, num_bins - 1)
    bins = [
        ReliabilityBin(
            low=number / num_bins,
            high=(number + 1) / num_bins,
            count=int(np.count_nonzero(index == number)),
            confidence=float(values[index == number].mean()),
            agreement=float(right[index == number].mean()),
        )
        for number in np.unique(index).tolist()
    ]
    gaps = sum(entry.count * abs(entry.confidence - entry.agreement) for entry in bins)
    return Reliability(bins, len(values), float(values.mean()), float(right.mean()), gaps / len(values))


def first_agreeing_layers(agrees: np.ndarray) -> np.ndarray:
    """Earliest layer whose prediction is the last layer's: (T, L) -> (T,)."""
    return np.asarray(agrees, dtype=bool).argmax(axis=1) + 1


def settled_layers(agrees: np.ndarray) -> np.ndarray:
    """Earliest layer from which on every layer predicts what the last one does: (T, L) -> (T,)."""
    agrees = np.asarray(agrees, dtype=int)
    settled = np.cumprod(agrees[:, ::-1], axis=1).sum(axis=1)  # agreeing layers at the end: (T,)
    return agrees.shape[1] - settled + 1


@dataclass(frozen=True)
class Oracle:
    """Tokens whose oracle layer is 1..L: `counts` (L,), their mean, and the speed-up L / mean allows."""

    counts: list[int]
    mean: float
    ideal_speedup: float


def oracle(layers: np.ndarray, num_layers: int) -> Oracle:
    """Sum up the oracle layers (T,) of a model's tokens; T at least 1."""
    counts = np.bincount(layers, minlength=num_layers + 1)[1:]
    mean = float(np.mean(layers))
    return Oracle(counts.tolist(), mean, num_layers / mean)


def exit_shares(exit_layers: Iterable[int]) -> dict[int, float]:
    """Share of the tokens that left after each layer, shallowest first."""
    counts = Counter(exit_layers)
    total = sum(counts.values())
    return {layer: counts[layer] / total for layer in sorted(counts)}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in one coordinate without losing in the other."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other[0] >= point[0] and other[1] >= point[1] and tuple(other) != tuple(point) for other in points
        )

    return [index for index, point in enumerate(points) if not beaten(point)]
