"""Thresholds of the confidence test: fixed, decaying with position, and adaptive (a beta mixture).

A threshold answers `at(position)`; `start_sequence()` is called before each new sequence. The adaptive one
learns from `observe(...)`, outlives single generations on purpose, and can be saved, loaded and reset.
Arguments out of range raise UserError.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.special import expit

from models.checks import as_count, as_number, as_share
from models.errors import UserError
from models.json_files import check_keys, read_mapping

CLIP = 1e-4  # beta densities are unstable at 0 and 1


class Threshold(Protocol):
    def start_sequence(self) -> None:
        """Get ready for a new sequence."""

    def at(self, position: int) -> float:
        """Threshold of the token at `position`, counted from 0; it exits if its confidence exceeds it."""


def as_threshold(name: str, value: Any) -> Threshold:
    """A threshold object as it is, a number as a FixedThreshold.

    Raises:
        UserError: anything else, or a number that is no threshold; `name` says whose it is.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        return FixedThreshold(as_level(name, value))
    if isinstance(value, type) or not (hasattr(value, "at") and hasattr(value, "start_sequence")):
        raise UserError(f"{name} must be a number or an object such as FixedThreshold(0.4), got {value!r}.")
    return value


def as_level(name: str, value: Any) -> float:
    """A threshold's value: in [0, 1] like confidences, or up to 1 beyond, for all tokens or none to exit."""
    level = as_number(name, value, low=-math.inf)
    if not -1 <= level <= 2:
        raise UserError(f"{name} must lie in [0, 1] like confidences (-1: all exit, 2: none), got {value!r}.")
    return level


def without_nan(pairs: list[tuple[float, bool]]) -> list[tuple[float, bool]]:
    """Those whose confidence says something: NaN exceeds no threshold, and teaches none."""
    return [pair for pair in pairs if not math.isnan(pair[0])]


def countable(pairs: list[tuple[float, bool]]) -> list[tuple[float, bool]]:
    """What a threshold learns of pairs: confidences of any measure taken into [0, 1]."""
    return [(min(max(sure, 0.0), 1.0), right) for sure, right in without_nan(pairs)]


class FixedThreshold:
    """The same at every position; -1 lets every token exit, 2 none."""

    def __init__(self, value: float) -> None:
        self.value = as_level("FixedThreshold: value", value)

    def start_sequence(self) -> None:
        pass

    def at(self, position: int) -> float:
        return self.value


class DecayingThreshold:
    """CALM's threshold, lower for later tokens, whose errors disturb fewer others.

    `form="released"`: thr * (0.9 + 0.1 exp(-T t / N)), as in FREE's code; `form="paper"`:
    clip(0.9 thr + 0.1 exp(-T t / N), 0, 1), CALM's eq. 5. T is `temperature`, N `max_length`, and t counts
    tokens from 1.
    """

    def __init__(self, value: float, temperature: float, max_length: int, form: str = "released") -> None:
        if form not in ("released", "paper"):
            raise UserError(f"DecayingThreshold: form must be 'released' or 'paper', got {form!r}.")
        self.value = as_level("DecayingThreshold: value", value)
        self.temperature = as_number("DecayingThreshold: temperature", temperature)
        self.max_length = as_count("DecayingThreshold: max_length", max_length)
        self.form = form

    def start_sequence(self) -> None:
        pass

    def at(self, position: int) -> float:
        decay = math.exp(-self.temperature * (position + 1) / self.max_length)
        if self.form == "released":
            return self.value * (0.9 + 0.1 * decay)
        return min(max(0.9 * self.value + 0.1 * decay, 0.0), 1.0)


class BetaMixture:
    """Two beta densities over confidence, one for wrong and one for right shallow predictions.

    `fit(confidences, right)` matches moments of each class (FREE, section 4.3 and appendix C).
    `as_released=True` repeats the original's code: every sample leaks into the other class with weight 5e-4,
    class priors stay at one half, and the component with the higher mean counts as "right".
    """

    LEAK = 5e-4
    PRIOR_STRENGTH = 2.0  # pseudo-observations of the corrected mode, drawn from the initial densities

    def __init__(self, as_released: bool = False) -> None:
        self.as_released = as_released
        self.alphas = [1.0, 2.0]
        self.betas = [2.0, 1.0]
        self.weights = [0.5, 0.5]

    def fit(self, confidences: np.ndarray, right: np.ndarray) -> None:
        """Estimate both components from (n,) confidences and (n,) 0/1 labels."""
        x = np.clip(np.asarray(confidences, dtype=np.float64), CLIP, 1 - CLIP)
        y = np.asarray(right)
        for label in (0, 1):
            if self.as_released:
                fitted = weighted_beta_moments(x, np.where(y == label, 1.0, self.LEAK))
            else:
                fitted = self._smoothed_moments(x[y == label], label)
            self.alphas[label], self.betas[label] = fitted
        if not self.as_released:
            share = (np.count_nonzero(y) + self.PRIOR_STRENGTH / 2) / (len(y) + self.PRIOR_STRENGTH)
            self.weights = [1 - share, share]

    def _smoothed_moments(self, x: np.ndarray, label: int) -> tuple[float, float]:
        """Method of moments with a few pseudo-observations, so that few or equal samples do no harm."""
        initial_alpha, initial_beta = ((1.0, 2.0), (2.0, 1.0))[label]
        prior = beta_distribution().ppf([0.25, 0.75], initial_alpha, initial_beta)
        samples = np.concatenate([x, prior])
        weights = np.concatenate([np.ones(len(x)), np.full(2, self.PRIOR_STRENGTH / 2)])
        return weighted_beta_moments(samples, weights)

    def posterior_right(self, confidences: np.ndarray) -> np.ndarray:
        """P(shallow prediction is right | confidence): (n,) -> (n,)."""
        if self.as_released:
            return self._released_posterior(confidences)
        wrong, right = (  # in logarithms, since both densities may underflow
            np.log(self.weights[k]) + beta_distribution().logpdf(confidences, self.alphas[k], self.betas[k])
            for k in (0, 1)
        )
        return expit(right - wrong)

    def _released_posterior(self, confidences: np.ndarray) -> np.ndarray:
        """Share of the component with the higher mean; nan where the densities are not finite."""
        with np.errstate(invalid="ignore", divide="ignore"):
            alphas, betas = np.array(self.alphas), np.array(self.betas)
            densities = [
                weight * beta_distribution().pdf(confidences, alpha, beta)
                for weight, alpha, beta in zip(self.weights, alphas, betas, strict=True)
            ]
            return densities[np.argmax(alphas / (alphas + betas))] / (densities[0] + densities[1])


def beta_distribution() -> Any:
    """SciPy's, which takes a third of a second to import: only thresholds that learn need it."""
    from scipy import stats

    return stats.beta


def weighted_beta_moments(x: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Alpha and beta of the beta density with `x`'s weighted mean and variance; inf or nan if undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.sum(weights)
        mean = np.sum(weights * x) / total
        variance = np.sum(weights * (x - mean) ** 2) / total
        alpha = mean * (mean * (1 - mean) / variance - 1)
        return float(alpha), float(alpha * (1 - mean) / mean)


SAVED = {"settings": dict[str, Any], "observed": dict[str, Any]}
SAVED_SETTINGS = {
    "initial": float,
    "zeta": float,
    "low": float,
    "high": float,
    "max_sequences": int,
    "capacity": int,
    "as_released": bool,
}
OBSERVED = {"num_sequences": int, "confidences": list[float], "right": list[int], "value": float}


class AdaptiveThreshold:
    """FREE's adaptive threshold (section 4.3): the smallest confidence that is right often enough.

    Refitted before each of the first `max_sequences` sequences (a batch counts as one), as the smallest of
    `GRID_POINTS` values in [`low`, `high`] from which on the posterior of being right exceeds `zeta`. Only
    the newest `capacity` observations are kept. With `as_released=True` estimates follow the original's code
    (see `BetaMixture`), which counts the grid points that pass, wherever they lie.
    """

    GRID_POINTS = 10

    def __init__(
        self,
        initial: float,
        zeta: float = 0.4,
        low: float = 0.3,
        high: float = 0.9,
        max_sequences: int = 300,
        capacity: int = 20_000,
        as_released: bool = False,
    ) -> None:
        self.initial = as_level("AdaptiveThreshold: initial", initial)
        self.zeta = as_share("AdaptiveThreshold: zeta", zeta)
        self.high = as_share("AdaptiveThreshold: high", high)
        self.low = as_number("AdaptiveThreshold: low", low, 0.0, self.high)
        self.max_sequences = as_count("AdaptiveThreshold: max_sequences", max_sequences, low=0)
        self.capacity = as_count("AdaptiveThreshold: capacity", capacity)
        self.as_released = as_released
        self.lock = threading.Lock()  # one threshold may learn from several generations at once
        self.reset()

    def reset(self) -> None:
        """Forget everything that was observed."""
        with self.lock:
            self.value = self.initial
            self.mixture = BetaMixture(self.as_released)
            self.num_sequences = 0
            self.pairs: deque[tuple[float, bool]] = deque(maxlen=self.capacity)

    @property
    def learning(self) -> bool:
        """Whether observations can still change the threshold."""
        return self.num_sequences <= self.max_sequences

    def start_sequence(self) -> None:
        with self.lock:
            if self.pairs and self.learning:
                self._refit()
            self.num_sequences += 1

    def at(self, position: int) -> float:
        return self.value

    def observe(self, pairs: list[tuple[float, bool]]) -> None:
        """Add pairs of shallow confidence, taken into [0, 1], and agreement with the deep prediction, but for
        those that `without_nan` leaves out."""
        with self.lock:
            if self.learning:
                self.pairs += countable(pairs)

    def counts(self, tokens: int) -> bool:
        """Whether what a pass over so many tokens shows is counted: the original wants them in company."""
        return not (self.as_released and tokens == 1)

    def _refit(self) -> None:
        self._fit()
        self.value = self.best_threshold()

    def _fit(self) -> None:
        confidences, right = (np.array(column) for column in zip(*self.pairs, strict=True))
        self.mixture.fit(confidences, right)

    def best_threshold(self) -> float:
        """Smallest grid point from which on the posterior exceeds zeta; `high` if there is none."""
        grid = np.linspace(self.low, self.high, self.GRID_POINTS)
        passes = self.mixture.posterior_right(grid) > self.zeta
        count = passes.sum() if self.as_released else np.cumprod(passes[::-1]).sum()
        return float(grid[-max(int(count), 1)])

    def save(self, path: str | Path) -> None:
        """Write settings and observations as JSON."""
        state = {name: getattr(self, name) for name in SAVED_SETTINGS}
        with self.lock:
            observed = {
                "num_sequences": self.num_sequences,
                "confidences": [confidence for confidence, _ in self.pairs],
                "right": [int(right) for _, right in self.pairs],
                "value": self.value,
            }
        Path(path).write_text(json.dumps({"settings": state, "observed": observed}), encoding="utf8")

    @classmethod
    def load(cls, path: str | Path) -> AdaptiveThreshold:
        """Read what `save` wrote; goes on exactly where the saved one stood.

        Raises:
            UserError: the file holds something else.
        """
        state = read_mapping(Path(path))
        check_keys(state, SAVED, str(path))
        check_keys(state["settings"], SAVED_SETTINGS, f"{path}, settings")
        check_keys(state["observed"], OBSERVED, f"{path}, observed")
        observed = state["observed"]
        if len(observed["confidences"]) != len(observed["right"]):
            raise UserError(f"{path}: confidences and right must be of one length.")
        threshold = cls(**state["settings"])
        threshold.num_sequences = as_count(f"{path}: num_sequences", observed["num_sequences"], low=0)
        if {*observed["right"]} - {0, 1}:
            raise UserError(f"{path}: right must hold 0 and 1 alone.")
        pairs = zip(observed["confidences"], map(bool, observed["right"]), strict=True)
        threshold.pairs += countable([*pairs])
        if threshold.pairs:
            threshold._fit()
        threshold.value = as_level(f"{path}: value", observed["value"])
        return threshold
