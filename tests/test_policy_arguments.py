"""What policies and thresholds are made of: a number where one is meant, one line where nothing fits."""

from __future__ import annotations

import numpy as np
import pytest

from models import (
    AdaptiveThreshold,
    Calm,
    DecayingThreshold,
    FixedThreshold,
    Free,
    SoftmaxGap,
    StaticExit,
    UserError,
)

GAP = SoftmaxGap()
WRONG = {
    "no layer": (lambda: Free(None, GAP, 0.4), "Free: shallow_layer is None"),
    "layer as text": (lambda: StaticExit("2"), "StaticExit: layer .* got '2'"),
    "layer 0": (lambda: StaticExit(0), "StaticExit: layer .* from 1 on, got 0"),
    "half a layer": (lambda: Free(1.5, GAP, 0.4), "Free: shallow_layer .* got 1.5"),
    "layer True": (lambda: StaticExit(True), "StaticExit: layer .* got True"),
    "no min_layer": (lambda: Calm(GAP, 0.5, min_layer=None), "Calm: min_layer .* got None"),
    "one exit layer": (lambda: Calm(GAP, 0.5, exit_layers=2), "Calm: exit_layers must be a list of layers"),
    "exit layers as text": (lambda: Calm(GAP, 0.5, exit_layers="246"), "Calm: exit_layers must be a list"),
    "exit layer 0": (lambda: Calm(GAP, 0.5, exit_layers=[0, 2]), "Calm: exit_layers .* got 0"),
    "no exit layers": (lambda: Calm(GAP, 0.5, exit_layers=[]), "Calm: exit_layers: name at least one"),
    "class of a measure": (lambda: Free(2, SoftmaxGap, 0.4), r"such as SoftmaxGap\(\), got <class"),
    "swapped": (lambda: Free(2, 0.4, GAP), "Free: confidence must be an object"),
    "class of a threshold": (lambda: Calm(GAP, FixedThreshold), r"Calm: threshold .* FixedThreshold\(0.4\)"),
    "adaptive": (lambda: Calm(GAP, AdaptiveThreshold(0.9)), r"Calm: threshold: .* FixedThreshold\(0.9\)"),
    "threshold as text": (lambda: Free(2, GAP, "0.4"), "Free: threshold must be a number or an object"),
    "per cent": (lambda: FixedThreshold(40), r"FixedThreshold: value must lie in \[0, 1\] .* got 40"),
    "per cent in Free": (lambda: Free(2, GAP, 40), r"Free: threshold must lie in \[0, 1\] .* got 40"),
    "nan": (lambda: FixedThreshold(float("nan")), "FixedThreshold: value must be a number, got nan"),
    "rollback": (lambda: Free(2, GAP, 0.4, rollback_threshold=-1), "Free: rollback_threshold .* from 0 on"),
    "max_pending": (lambda: Free(2, GAP, 0.4, max_pending=0), "Free: max_pending .* from 1 on, got 0"),
    "decay form": (lambda: DecayingThreshold(0.9, 4.0, 10, "linear"), "DecayingThreshold: form"),
    "decay length": (lambda: DecayingThreshold(0.9, 4.0, 0), "DecayingThreshold: max_length .* got 0"),
    "decay rate": (lambda: DecayingThreshold(0.9, -4.0, 10), "DecayingThreshold: temperature .* got -4.0"),
    "zeta": (lambda: AdaptiveThreshold(0.9, zeta=1.4), r"AdaptiveThreshold: zeta .* in \[0, 1\], got 1.4"),
    "grid": (lambda: AdaptiveThreshold(0.9, low=0.8, high=0.5), r"AdaptiveThreshold: low .* in \[0, 0.5\]"),
    "capacity": (lambda: AdaptiveThreshold(0.9, capacity=0), "AdaptiveThreshold: capacity .* got 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_get_one_line(name):
    build, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0.4, 0, 1, np.float32(0.5)])
def test_numbers_are_fixed_thresholds(value):
    for policy in (Free(2, GAP, value), Calm(GAP, value)):
        assert isinstance(policy.threshold, FixedThreshold)
        assert policy.threshold.at(0) == policy.threshold.at(17) == value
    assert Free(np.int64(2), GAP, value).shallow_layer == 2


def test_objects_stay_what_they_are():
    threshold = AdaptiveThreshold(0.9)
    assert Free(2, GAP, threshold).threshold is threshold
    assert Calm(GAP, 0.9, exit_layers=np.array([2, 4])).exit_layers == {2, 4}
