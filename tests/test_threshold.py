"""The corrected adaptive threshold: sane on degenerate data, bounded, persistent."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from models.threshold import AdaptiveThreshold, BetaMixture, DecayingThreshold


def fitted(confidences, right, **settings):
    threshold = AdaptiveThreshold(0.9, **settings)
    threshold.observe(list(zip(confidences, right, strict=True)))
    threshold.start_sequence()
    return threshold


# Before any data the posterior of being right is the confidence itself: 2c / (2c + 2(1 - c)). Of ten grid
# points from 0.3 to 0.9, the first above zeta = 0.4 is 0.3 + 2 * 0.6 / 9.
PRIOR = pytest.approx(13 / 30)
ALIKE = np.linspace(0.99, 0.35, 60), [True, False] * 30  # confidence says nothing: the posterior is a half
ONE_VALUE = [0.5] * 40, [True, False] * 20


@pytest.mark.parametrize(
    ("confidences", "right", "expected"),
    [
        ([0.7] * 50, [False] * 50, 0.9),  # always wrong: exit as little as possible
        (np.linspace(0.35, 0.99, 50), [True] * 50, 0.3),  # always right: exit as much as possible
        (*ALIKE, 0.3),
        ([1.0] * 40, [True] * 40, PRIOR),  # no variance, at an end where a beta density has none either
        ([0.8], [True], PRIOR),
    ],
)
def test_degenerate_data(confidences, right, expected):
    assert fitted(confidences, right).value == expected


def test_what_confidence_does_not_tell_apart_passes_below_a_half():
    assert fitted(*ALIKE, zeta=0.6).value == 0.9
    assert fitted(*ONE_VALUE).value < 0.5 < fitted(*ONE_VALUE, zeta=0.6).value
    assert fitted([0.0] * 40, [False] * 40).value > 13 / 30  # errors raise what was known before


def test_threshold_separates_right_from_wrong():
    generator = np.random.default_rng(0)
    wrong, right = generator.beta(2, 5, 600), generator.beta(6, 2, 600)
    threshold = fitted([*wrong, *right], [False] * 600 + [True] * 600)
    assert 0.3 < threshold.value < 0.6
    strict = fitted([*wrong, *right], [False] * 600 + [True] * 600, zeta=0.95)
    assert strict.value > threshold.value


def test_class_priors_count():
    generator = np.random.default_rng(0)
    wrong, right = generator.beta(2, 4, 2000), generator.beta(4, 2, 2000)
    balanced = fitted([*wrong, *right], [False] * 2000 + [True] * 2000)
    mostly_wrong = fitted([*wrong, *right[:100]], [False] * 2000 + [True] * 100)
    assert mostly_wrong.value > balanced.value


def test_confident_errors_keep_the_threshold_high():
    generator = np.random.default_rng(1)
    wrong, right = generator.beta(9, 1.5, 300), generator.beta(2, 6, 300)
    assert fitted([*wrong, *right], [False] * 300 + [True] * 300).value == 0.9


def test_posterior_is_defined_where_densities_underflow():
    mixture = BetaMixture()
    mixture.fit(np.full(5000, 0.95), np.ones(5000, dtype=int))
    assert np.isfinite(mixture.posterior_right(np.linspace(0.0001, 0.9999, 101))).all()


def test_memory_is_bounded_and_learning_ends():
    threshold = AdaptiveThreshold(0.9, max_sequences=3, capacity=10)
    for _ in range(5):
        threshold.start_sequence()
        threshold.observe([(0.5, True)] * 4)
    assert len(threshold.pairs) == 10
    learnt = threshold.value
    threshold.observe([(0.9, False)] * 100)
    threshold.start_sequence()
    assert threshold.value == learnt and not threshold.learning


def test_confidences_of_any_measure_are_loaded_as_they_are_observed(tmp_path):
    path = tmp_path / "threshold.json"
    AdaptiveThreshold(0.8).save(path)
    content = json.loads(path.read_text())
    content["observed"] |= {"confidences": [1.5, -0.5, 0.4], "right": [1, 0, 1]}
    path.write_text(json.dumps(content))
    loaded = AdaptiveThreshold.load(path)
    assert [*loaded.pairs] == [(1.0, True), (0.0, False), (0.4, True)]


def test_save_and_load_continue_exactly(tmp_path):
    generator = np.random.default_rng(2)
    batches = [(generator.uniform(size=20), generator.uniform(size=20) > 0.4) for _ in range(6)]

    def feed(threshold, part):
        values = []
        for confidences, right in part:
            threshold.start_sequence()
            values.append(threshold.value)
            threshold.observe(list(zip(confidences, right, strict=True)))
        return values

    whole, first = AdaptiveThreshold(0.8), AdaptiveThreshold(0.8)
    expected = feed(whole, batches)
    seen = feed(first, batches[:3])
    first.save(tmp_path / "threshold.json")
    second = AdaptiveThreshold.load(tmp_path / "threshold.json")
    assert seen + feed(second, batches[3:]) == expected
    second.reset()
    assert second.value == 0.8 and not second.pairs


def test_what_is_no_confidence_teaches_nothing(tmp_path):
    threshold = fitted(
        [0.7, float("nan"), 0.4, float("-inf"), float("inf")], [True, True, False, False, True]
    )
    assert [*threshold.pairs] == [(0.7, True), (0.4, False), (0.0, False), (1.0, True)]
    assert threshold.value == fitted([0.7, 0.4, 0.0, 1.0], [True, False, False, True]).value
    threshold.save(tmp_path / "threshold.json")
    assert AdaptiveThreshold.load(tmp_path / "threshold.json").pairs == threshold.pairs


@pytest.mark.parametrize("way", ["save", "reset"])
def test_nobody_saves_or_resets_while_another_observes(tmp_path, way):
    threshold = AdaptiveThreshold(0.9)
    act = threshold.reset if way == "reset" else lambda: threshold.save(tmp_path / "threshold.json")
    thread = threading.Thread(target=act)
    with threshold.lock:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
    thread.join()


def test_decay_forms():
    released = DecayingThreshold(0.8, 4.0, 10)
    paper = DecayingThreshold(0.8, 4.0, 10, form="paper")
    # e^-0.4 = 0.670320, e^-0.8 = 0.449329, e^-2 = 0.135335: tokens 1, 2 and 5 of 10.
    tokens = (0, 1, 4)
    assert [released.at(token) for token in tokens] == pytest.approx([0.7736256, 0.7559463, 0.7308268])
    assert [paper.at(token) for token in tokens] == pytest.approx([0.7870320, 0.7649329, 0.7335335])
    assert released.at(500) == pytest.approx(0.72) == paper.at(500)
    assert DecayingThreshold(1.0, 0.0, 10, form="paper").at(3) == 1.0
    with pytest.raises(ValueError, match="form"):
        DecayingThreshold(0.8, 4.0, 10, form="other")
