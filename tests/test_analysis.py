"""What the report computes: reliability, oracle layers, exit shares, Pareto front, legible colours."""

from __future__ import annotations

import numpy as np
import pytest

from util.analysis import (
    exit_shares,
    first_agreeing_layers,
    oracle,
    pareto_front,
    reliability,
    settled_layers,
)
from util.report.heat_map import depth_shades, relative_luminance


def test_reliability_by_hand():
    # Bins of a half: [0, 0.5) holds 0.1 and 0.3, [0.5, 1] holds 0.5, 0.7 and 1.0.
    found = reliability([0.1, 0.3, 0.5, 0.7, 1.0], [0, 1, 1, 0, 1], num_bins=2)
    assert [entry.count for entry in found.bins] == [2, 3]
    assert [entry.agreement for entry in found.bins] == pytest.approx([1 / 2, 2 / 3])
    assert [entry.confidence for entry in found.bins] == pytest.approx([0.2, 2.2 / 3])
    assert found.ece == pytest.approx((2 * abs(0.2 - 0.5) + 3 * abs(2.2 / 3 - 2 / 3)) / 5)
    assert found.agreement == pytest.approx(0.6) and found.confidence == pytest.approx(0.52)


def test_reliability_leaves_empty_bins_out():
    assert [entry.low for entry in reliability([0.95, 0.05], [1, 0]).bins] == [0.0, 0.9]
    assert reliability([], []) is None


def test_oracle_layers_by_hand():
    agrees = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 1]])
    assert first_agreeing_layers(agrees).tolist() == [1, 1, 4, 2]
    assert settled_layers(agrees).tolist() == [1, 3, 4, 4]
    found = oracle(settled_layers(agrees), 4)
    assert found.counts == [1, 0, 1, 2] and found.mean == 3 and found.ideal_speedup == pytest.approx(4 / 3)


def test_exit_shares_and_pareto_front():
    assert exit_shares([4, 2, 2, 4, 4, 1, 4, 4]) == {1: 0.125, 2: 0.25, 4: 0.625}
    assert pareto_front([(1, 100), (2, 99), (1.5, 98), (2, 99), (0.9, 100)]) == [0, 1, 3]


def test_every_shade_is_legible():
    for shade in depth_shades():
        first, second = (
            relative_luminance(*(int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)))
            for color in shade.values()
        )
        assert (max(first, second) + 0.05) / (min(first, second) + 0.05) >= 4.5  # WCAG AA
