"""Distribution-free risk control: which candidates keep the expected loss within a tolerance?

`certify("ltt", losses, delta, epsilon)` judges K candidates by their losses on n samples, (n, K) in [0, 1],
ordered from the most conservative candidate to the most liberal. Samples must be independent draws of what
the guarantee is for; nothing is assumed of their distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import rel_entr
from scipy.stats import binom

from models.errors import UserError

BISECTIONS = 40  # of [0, 1]: far below any difference that matters
TRACE = 1e-9  # by which rounding may carry a loss out of [0, 1]
ROUNDING = 1e-15  # relative entropies below it are noise
BLOCK = 1000
SCANNED = 10**5  # numbers of samples that `needed_samples` tries one by one


@dataclass(frozen=True)
class Certification:
    """`figures` are p-values under ltt, else upper bounds of the risk; both say more the lower they are."""

    figures: np.ndarray  # (K,)
    certified: np.ndarray  # (K,) bool: all candidates before the first that fails


def hoeffding_bentkus(risk: np.ndarray | float, n: np.ndarray | int, delta: np.ndarray | float) -> np.ndarray:
    """P-value of "the mean of losses in [0, 1] exceeds delta", given their mean `risk` over n samples.

    The smaller of Hoeffding's (in its tight form, by relative entropy) and Bentkus' inequality: Bates et al.,
    "Distribution-free, risk-controlling prediction sets" (2021), section 3.1; Angelopoulos et al., "Learn
    then test" (2021), "Hoeffding-Bentkus inequality p-values"; used by CALM (Schuster et al., 2022),
    section 4.
    """
    # Step 1. Hoeffding's bound: exp(-n KL(risk || delta)).
    below = np.minimum(risk, delta)
    hoeffding = np.exp(-n * (rel_entr(below, delta) + rel_entr(1 - below, 1 - delta)))
    # Step 2. Bentkus': e times the chance of as few losses. Means of k / n come back as k + 1e-13, which must
    # not count as k + 1.
    losses = np.ceil(np.round(n * np.asarray(risk), 9))
    bentkus = math.e * binom.cdf(losses, n, delta)
    # Step 3. Both bound the chance of so low a mean under the null: so does the smaller.
    return np.minimum(np.minimum(hoeffding, bentkus), 1.0)


def betting(losses: np.ndarray, delta: np.ndarray | float, epsilon: float) -> np.ndarray:
    """P-values (K,) of the same null hypothesis by betting against it, sample after sample.

    Capital grows when losses (n, K) stay below `delta`; under the null it is a supermartingale, so that by
    Ville's inequality one over its maximum is a p-value. Bets are aimed at level `epsilon`. Waudby-Smith and
    Ramdas, "Estimating means of bounded random variables by betting" (2024); Bates et al. (2021),
    section 3.1, the Waudby-Smith-Ramdas bound. It adapts to the losses' variance, as Hoeffding-Bentkus does
    not.
    """
    # Step 1. Mean and variance as they are known before each sample, from the earlier ones alone.
    n = len(losses)
    count = np.arange(2, n + 2)[:, None]
    means = (0.5 + np.cumsum(losses, axis=0)) / count
    variances = (0.25 + np.cumsum((losses - means) ** 2, axis=0)) / count
    known = np.concatenate([np.full((1, losses.shape[1]), 0.25), variances[:-1]])  # before each sample
    # Step 2. The less the losses vary, the more is staked; at most 1, so that no loss makes capital negative.
    bets = np.minimum(1.0, np.sqrt(2 * math.log(1 / epsilon) / (n * known)))
    # Step 3. Each sample multiplies the capital by 1 - bet (loss - delta).
    with np.errstate(divide="ignore"):  # all capital may be lost
        log_capital = np.cumsum(np.log1p(-bets * (losses - delta)), axis=0)
    # Step 4. One over the largest capital so far, with that at the start (Ville's inequality).
    return np.exp(-np.maximum(log_capital.max(axis=0), 0.0))


PValue = Callable[[np.ndarray, "np.ndarray | float", float], np.ndarray]
"""(n, K) losses, delta, epsilon -> (K,) p-values."""

P_VALUES: dict[str, PValue] = {
    "hoeffding_bentkus": lambda losses, delta, _: hoeffding_bentkus(losses.mean(axis=0), len(losses), delta),
    "betting": betting,
}


def fixed_sequence(passes: np.ndarray) -> np.ndarray:
    """Every candidate before the first that fails: (K,) -> (K,).

    Testing in an order fixed beforehand keeps the probability of any false certificate at the level of one
    test (Angelopoulos et al., 2021, "fixed sequence testing"; CALM, section 4 and appendix E).
    """
    return np.logical_and.accumulate(passes)


def learn_then_test(losses: np.ndarray, delta: float, epsilon: float, p_value: PValue) -> Certification:
    """Learn then test: with probability 1 - epsilon no certified candidate's risk exceeds delta."""
    # Step 1. For each candidate, the p-value of "its risk exceeds delta".
    p_values = p_value(losses, delta, epsilon)
    # Step 2. Reject these in their fixed order, each at level epsilon, until one stands.
    return Certification(p_values, fixed_sequence(p_values <= epsilon))


def risk_controlling(losses: np.ndarray, delta: float, epsilon: float, p_value: PValue) -> Certification:
    """Risk-controlling prediction sets: upper confidence bounds, all down to the chosen one below delta.

    Bates et al. (2021), section 2.2. Bounds invert the p-value, so that decisions are those of
    `learn_then_test`; what they add is how large the risk may be.
    """
    # Step 1. For each candidate, the bound that its risk exceeds with probability at most epsilon.
    bounds = upper_bounds(losses, epsilon, p_value)
    # Step 2. Go on to more liberal candidates until a bound exceeds delta.
    return Certification(bounds, fixed_sequence(bounds <= delta))


def upper_bounds(losses: np.ndarray, epsilon: float, p_value: PValue) -> np.ndarray:
    """The smallest risk of each candidate that the p-value refutes at level epsilon: (n, K) -> (K,)."""
    low, high = np.zeros(losses.shape[1]), np.ones(losses.shape[1])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        refuted = p_value(losses, middle, epsilon) <= epsilon
        low, high = np.where(refuted, low, middle), np.where(refuted, middle, high)
    return high


def conformal_risk_control(
    losses: np.ndarray, delta: float, epsilon: float, p_value: PValue
) -> Certification:
    """Conformal risk control: the loss of a new sample is at most delta in expectation (not with confidence).

    n / (n + 1) risk + 1 / (n + 1) <= delta: Angelopoulos et al., "Conformal risk control" (2024), eq. 4. It
    needs losses that never fall from a candidate to a more liberal one, so their running maximum is taken.
    """
    # Step 1. Make losses monotone, and take their mean as if one more sample had the largest loss, 1.
    bounds = (len(losses) * monotone(losses).mean(axis=0) + 1) / (len(losses) + 1)
    # Step 2. Go on to more liberal candidates until a bound exceeds delta.
    return Certification(bounds, fixed_sequence(bounds <= delta))


def monotone(losses: np.ndarray) -> np.ndarray:
    """Each sample's largest loss up to each candidate: (n, K) -> (n, K)."""
    return np.maximum.accumulate(losses, axis=1)


METHODS: dict[str, Callable[[np.ndarray, float, float, PValue], Certification]] = {
    "ltt": learn_then_test,
    "crc": conformal_risk_control,
    "ucb": risk_controlling,
}


def certify(
    method: str, losses: np.ndarray, delta: float, epsilon: float, p_value: str = "hoeffding_bentkus"
) -> Certification:
    """Judge candidates by their losses (n, K), conservative ones first; crc ignores epsilon and p_value.

    Raises:
        UserError: what the guarantee does not cover, as losses outside [0, 1] or none at all.
    """
    losses = check_losses(losses)
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0 < value < 1:
            raise UserError(f"{name} must lie between 0 and 1, got {value}.")
    return METHODS[method](losses, delta, epsilon, P_VALUES[p_value])


def check_losses(losses: np.ndarray) -> np.ndarray:
    """Losses (n, K) as floats in [0, 1], where rounding may have left them by a trace.

    Raises:
        UserError: they are no such table.
    """
    losses = np.asarray(losses)
    if losses.ndim != 2 or 0 in losses.shape or losses.dtype.kind not in "biuf":
        raise UserError(f"Losses must be a table of numbers, samples x candidates; got shape {losses.shape}.")
    inside = (losses >= -TRACE) & (losses <= 1 + TRACE)  # false for nan
    if not inside.all():
        row, column = np.argwhere(~inside)[0]
        place = f"sample {row + 1} of candidate {column + 1}"
        raise UserError(f"Losses must lie in [0, 1], but {place} has {losses[row, column]}.")
    return np.clip(losses.astype(float), 0.0, 1.0)


def needed_samples(method: str, risk: float, delta: float, epsilon: float) -> int | None:
    """The fewest samples that would certify a candidate of mean loss `risk`; None if no number does.

    Under ltt and ucb by the Hoeffding-Bentkus p-value: how bets fare depends on more than the mean. It rises
    wherever one more loss must be counted, so that every number is tried; where Hoeffding's inequality needs
    more than `SCANNED`, that is the answer.
    """
    if risk >= delta:
        return None
    if method == "crc":  # eq. 4, solved for n
        return max(1, math.ceil(round((1 - delta) / (delta - risk), 9)))
    entropy = rel_entr(risk, delta) + rel_entr(1 - risk, 1 - delta)
    if entropy < ROUNDING:
        return None
    enough = math.ceil(math.log(1 / epsilon) / entropy)  # Hoeffding's alone passes
    for start in range(1, min(enough, SCANNED) + 1, BLOCK):
        sizes = np.arange(start, min(start + BLOCK, enough + 1))
        passes = hoeffding_bentkus(np.full(len(sizes), risk), sizes, delta) <= epsilon
        if passes.any():
            return int(sizes[passes.argmax()])
    return enough


def fastest(certified: np.ndarray, speedups: np.ndarray) -> int | None:
    """Index of the fastest certified candidate, the first of equals; None if none is certified."""
    return int(np.argmax(np.where(certified, speedups, -np.inf))) if certified.any() else None


@dataclass(frozen=True)
class Simulation:
    """What calibrating over and over led to. Without a certified candidate the full model decodes."""

    violation_rate: float  # how often the chosen candidate's true risk exceeded delta
    mean_risk: float
    mean_speedup: float
    certified_share: float  # how often any candidate was certified


def simulate(
    population: np.ndarray,
    speedups: np.ndarray,
    method: str,
    delta: float,
    epsilon: float,
    p_value: str = "hoeffding_bentkus",
    size: int | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Simulation:
    """Calibrate on samples drawn with replacement from a population whose risks are therefore known.

    `population` are losses (N, K), `speedups` (K,); each calibration set has `size` rows (default: N). Equal
    seeds draw equal sets, whatever the method.
    """
    generator = np.random.default_rng(seed)
    risks, chosen = population.mean(axis=0), []
    for _ in range(resamples):
        rows = generator.integers(len(population), size=size or len(population))
        certified = certify(method, population[rows], delta, epsilon, p_value).certified
        chosen.append(fastest(certified, speedups))
    found = [index for index in chosen if index is not None]
    return Simulation(
        violation_rate=float(np.mean([index is not None and risks[index] > delta for index in chosen])),
        mean_risk=float(risks[found].sum() / resamples),
        mean_speedup=float((speedups[found].sum() + resamples - len(found)) / resamples),
        certified_share=len(found) / resamples,
    )
