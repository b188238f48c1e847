"""Certified risks: losses, p-values, bounds and procedures against formulas by hand and against draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu
from p_values import p_value_by_hand
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import beta, binom

from models.errors import UserError
from util.calibration.consistency import consistency_losses, sample_scores
from util.calibration.risk_control import (
    METHODS,
    P_VALUES,
    Certification,
    betting,
    certify,
    fastest,
    fixed_sequence,
    hoeffding_bentkus,
    needed_samples,
    simulate,
    upper_bounds,
)

EPSILON = 0.1
DELTA = 0.2
CONTROLLING = [(method, p_value) for method in ("ltt", "ucb") for p_value in P_VALUES]


def test_p_value_without_losses_is_the_binomial_one():
    assert hoeffding_bentkus(0.0, 30, 0.1) == pytest.approx(0.9**30)


def test_p_value_follows_its_two_formulas():
    entropy = 0.1 * math.log(0.1 / 0.2) + 0.9 * math.log(0.9 / 0.8)
    expected = min(math.exp(-40 * entropy), math.e * binom.cdf(4, 40, 0.2))
    assert hoeffding_bentkus(0.1, 40, 0.2) == pytest.approx(expected)
    assert expected < math.exp(-40 * entropy)  # Bentkus' is the smaller here


@pytest.mark.parametrize("n", [5, 40, 200])
@pytest.mark.parametrize("delta", [0.02, 0.2, 0.5])
def test_p_value_is_super_uniform_for_bernoulli_losses_at_the_boundary(n, delta):
    counts = np.arange(n + 1)
    p_values = hoeffding_bentkus(counts / n, n, delta)
    probabilities = binom.pmf(counts, n, delta)
    for level in p_values:
        assert probabilities[p_values <= level].sum() <= level + 1e-12


@pytest.mark.parametrize("name", P_VALUES)
@pytest.mark.parametrize("concentration", [0.02, 1.0, 20.0])
def test_p_values_are_super_uniform_for_beta_losses_at_the_boundary(name, concentration):
    generator, draws = np.random.default_rng(0), 4000
    losses = generator.beta(concentration * DELTA, concentration * (1 - DELTA), size=(60, draws))
    p_values = P_VALUES[name](losses, DELTA, EPSILON)
    assert p_values.shape == (draws,) and p_values.max() <= 1
    for level in (0.01, 0.05, 0.1, 0.3):
        assert (p_values <= level).sum() <= binom.ppf(0.9999, draws, level)


def test_p_values_fall_with_samples_and_rise_with_risk():
    risks = np.linspace(0, DELTA, 21)
    for n in (20, 100):
        assert (np.diff(hoeffding_bentkus(risks, n, DELTA)) >= 0).all()
        assert (hoeffding_bentkus(risks, 20 * n, DELTA)[:-1] < hoeffding_bentkus(risks, n, DELTA)[:-1]).all()
    assert hoeffding_bentkus(0.3, 1000, DELTA) == 1.0
    few = np.tile([[0.0, 0.1, 0.15]], (50, 1))
    bets = betting(few, DELTA, EPSILON)
    assert (np.diff(bets) > 0).all() and (betting(np.tile(few, (2, 1)), DELTA, EPSILON) < bets).all()


def test_betting_sample_by_sample():
    losses = np.random.default_rng(0).beta(1, 6, size=30)
    capital, highest = 1.0, 1.0
    for index, loss in enumerate(losses):
        # Means and variances so far, with half a loss of one half; a bet is laid before its sample is seen.
        means = [(0.5 + losses[: seen + 1].sum()) / (seen + 2) for seen in range(index)]
        squares = [(losses[seen] - means[seen]) ** 2 for seen in range(index)]
        variance = (0.25 + sum(squares)) / (index + 1)
        capital *= 1 - min(1, math.sqrt(2 * math.log(1 / EPSILON) / (30 * variance))) * (loss - DELTA)
        highest = max(highest, capital)
    assert highest > 2
    assert betting(losses[:, None], DELTA, EPSILON)[0] == pytest.approx(1 / highest)


def test_betting_wins_where_losses_vary_little():
    steady = np.full((200, 1), 0.1)
    assert betting(steady, 0.13, EPSILON)[0] < EPSILON < hoeffding_bentkus(0.1, 200, 0.13)


def test_fixed_sequence_stops_at_the_first_failure():
    assert fixed_sequence(np.array([True, True, False, True])).tolist() == [True, True, False, False]
    losses = np.tile([[0.0, 0.0, 0.9, 0.0]], (50, 1))  # the last would pass by itself
    for method in METHODS:
        assert certify(method, losses, DELTA, EPSILON).certified.tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", P_VALUES)
def test_bounds_invert_p_values(name):
    losses = np.random.default_rng(0).beta(1, 6, size=(80, 5))
    bounds = upper_bounds(losses, EPSILON, P_VALUES[name])
    assert (bounds > losses.mean(axis=0)).all()
    assert P_VALUES[name](losses, bounds, EPSILON) == pytest.approx(np.full(5, EPSILON), rel=1e-6)
    for delta in np.linspace(0.1, 0.3, 41):
        decisions = [certify(method, losses, delta, EPSILON, name).certified for method in ("ltt", "ucb")]
        assert (decisions[0] == decisions[1]).all()
        passes = P_VALUES[name](losses, delta, EPSILON) <= EPSILON
        assert (decisions[0] == fixed_sequence(passes)).all()


def test_conformal_risk_control_by_hand():
    losses = np.array([[0.0, 0.2, 0.1], [0.0, 0.0, 0.4], [0.1, 0.0, 0.0]])
    result = certify("crc", losses, delta=0.4, epsilon=EPSILON)
    # running maxima: rows (0, .2, .2), (0, 0, .4), (.1, .1, .1); bounds (sum + 1) / 4
    assert result.figures == pytest.approx([1.1 / 4, 1.3 / 4, 1.7 / 4])
    assert result.certified.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([[0.1, 1.5]], r"in \[0, 1\], but sample 1 of candidate 2 has 1.5"),
        ([[0.1], [-0.2]], "sample 2 of candidate 1 has -0.2"),
        ([[0.1], [math.nan]], "sample 2 of candidate 1 has nan"),
        ([[math.inf]], "has inf"),
        ([0.1, 0.2], r"table of numbers, samples x candidates; got shape \(2,\)"),
        (np.zeros((0, 3)), r"got shape \(0, 3\)"),
        ([["a"]], "table of numbers"),
    ],
)
def test_losses_that_no_guarantee_covers_are_refused(losses, message):
    for method in METHODS:
        with pytest.raises(UserError, match=message):
            certify(method, np.array(losses), DELTA, EPSILON)
    with pytest.raises(UserError, match=r"delta must lie between 0 and 1, got 1\.5"):
        certify("ltt", np.zeros((5, 1)), 1.5, EPSILON)
    traces = np.array([[-1e-16, 1 + 1e-14]] * 50)  # of rounding
    assert certify("ltt", traces, DELTA, EPSILON).certified.tolist() == [True, False]


def test_fastest_is_among_the_certified():
    speedups = np.array([1.0, 2.0, 2.0, 3.0])
    assert fastest(np.array([True, True, True, False]), speedups) == 1
    assert fastest(np.zeros(4, dtype=bool), speedups) is None


@pytest.mark.parametrize(
    ("risk", "delta", "needed"),
    [(0.0, 0.1, 29), (0.05, 0.1, 160), (0.07, 0.1, 442), (0.1, 0.2, 78), (0.125, 0.25, 56)],
)
def test_needed_samples_are_the_fewest(risk, delta, needed):
    """The p-value rises with each loss that must be counted: 160 samples pass, some of 161 to 172 do not."""
    by_hand = next(n for n in range(1, 1000) if p_value_by_hand(risk, n, delta) <= 0.05)
    assert needed_samples("ltt", risk, delta, 0.05) == by_hand == needed


def test_needed_samples():
    assert needed_samples("ucb", 0.0, 0.1, 0.05) == 29  # 0.9^28 > 0.05 >= 0.9^29
    assert needed_samples("ltt", DELTA, DELTA, EPSILON) is None
    assert needed_samples("ltt", DELTA - 1e-6, DELTA, EPSILON) > 1e6
    assert needed_samples("ltt", np.nextafter(DELTA, 0), DELTA, EPSILON) is None
    assert needed_samples("crc", 0.1, 0.2, EPSILON) == 8  # 8 / 9 * 0.1 + 1 / 9 = 0.2
    assert needed_samples("crc", 0.3, 0.2, EPSILON) is None


def draw_population(kind):
    """Losses (N, K) whose risks pass DELTA by a hair at the fifth candidate; the speed-ups rise with them."""
    ranks = np.random.default_rng(1).permutation(2000)[:, None]
    quantiles = (ranks + 0.5) / 2000  # stratified, so that risks are as asked for
    just_above = DELTA + 0.0005
    risks = np.array([0.001, 0.05, 0.1, 0.15, just_above, just_above, 0.25, 0.4])
    losses = (
        beta.ppf(quantiles, risks, 1 - risks) if kind == "beta" else (quantiles > 1 - risks).astype(float)
    )
    assert losses.mean(axis=0) == pytest.approx(risks, abs=4e-4)
    assert (losses.mean(axis=0) > DELTA).tolist() == [False] * 4 + [True] * 4
    return losses, np.linspace(1, 4, len(risks))


def naive(losses, delta, epsilon, p_value):
    """What the guarantee is better than: the observed risk taken at its word."""
    risks = losses.mean(axis=0)
    return Certification(risks, fixed_sequence(risks <= delta))


@pytest.mark.slow
@pytest.mark.parametrize("size", [40, 150])
@pytest.mark.parametrize("kind", ["bernoulli", "beta"])
def test_violations_are_as_rare_as_promised(kind, size, monkeypatch):
    population, speedups = draw_population(kind)
    allowed = binom.ppf(0.999, 200, EPSILON) / 200
    settings = {"size": size, "resamples": 200}
    for method, p_value in CONTROLLING:
        if (method, p_value) == ("ucb", "betting") and size > 40:
            continue  # the same decisions as ltt, at forty times the work
        result = simulate(population, speedups, method, DELTA, EPSILON, p_value, **settings)
        assert result.violation_rate <= allowed
        assert result.certified_share == 1 and result.mean_speedup > 1.2  # it is not safe by idleness
    result = simulate(population, speedups, "crc", DELTA, EPSILON, **settings)
    assert 0.05 < result.mean_risk <= DELTA
    monkeypatch.setitem(METHODS, "naive", naive)
    assert simulate(population, speedups, "naive", DELTA, EPSILON, **settings).violation_rate > 2 * EPSILON


def test_simulation_falls_back_on_the_full_model():
    population, speedups = draw_population("bernoulli")
    result = simulate(population, speedups, "ltt", 0.01, EPSILON, size=20, resamples=5)
    assert (result.violation_rate, result.mean_risk, result.mean_speedup) == (0, 0, 1)
    assert result.certified_share == 0


@pytest.mark.parametrize("task", ["translation", "summarization", "question_answering"])
def test_losses_of_texts(task):
    full = ["a small library", "", "the wrong words", "same"]
    early = ["a small library", "", "right words", "other text"]
    references = ["a large library", "x", "right words", "same"]
    if task == "question_answering":
        references = [[text, "unused"] for text in references]
    scores = sample_scores(task, full, references)
    losses = consistency_losses(task, early, full, references, scores)
    assert losses["textual"][:2].tolist() == [0, 0] == losses["risk"][:2].tolist()
    assert 0 < losses["textual"][2] < 1 and losses["risk"][2] == 0  # another text, but a better one
    assert losses["textual"][3] == pytest.approx(losses["risk"][3], abs=0.05)  # the full text is right
    assert losses["risk"][3] > 0.5
    assert losses["textual"][2:] == pytest.approx([1 - score_alone(task, *pair) for pair in REWRITTEN])


REWRITTEN = (("right words", "the wrong words"), ("other text", "same"))


def score_alone(task, text, reference):
    """By the library that others use; for answers, 2PR / (P + R) by hand: articles do not count."""
    if task == "translation":
        return sacrebleu.sentence_chrf(text, [reference]).score / 100
    if task == "summarization":
        return RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"].fmeasure
    return {"right words": 0.5, "other text": 0.0}[text]  # one word of two in both
