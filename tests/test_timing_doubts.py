"""When measured times are not believed; right values by arithmetic."""

from __future__ import annotations

import pytest

from util.evaluation.comparison import compare_speed
from util.evaluation.records import Record
from util.evaluation.timing_doubts import doubt_prediction, doubt_speedup, possible_speedup, untrusted_timing


def record(seconds, layer_calls, full_layer_calls):
    work = {"layer_calls": layer_calls, "full_layer_calls": full_layer_calls}
    return Record("s0", "", reference="", tokens=10, pieces=[], exit_layers=None, seconds=seconds, **work)


FULL = [record(seconds, 80, 80) for seconds in (1.0, 1.2, 0.9, 1.1)]  # 10 tokens through 8 layers


def test_more_than_the_work_saved_is_not_believed():
    quarter = [record(full.seconds / 8.13, 20, 80) for full in FULL]
    figures = compare_speed(quarter, FULL)
    assert figures["timing_doubt"] == "measured 8.13x, the work saved allows 4.00x"
    believed = [record(full.seconds / 3.9, 20, 80) for full in FULL]
    assert compare_speed(believed, FULL)["timing_doubt"] is None


def test_noise_is_no_doubt():
    # One sample in four was lucky: 4.6x in total, but its interval reaches below 4x.
    lucky = [record(seconds, 20, 80) for seconds in (0.25, 0.3, 0.225, 0.05)]
    figures = compare_speed(lucky, FULL)
    assert figures["speedup"] > 4.5 and figures["speedup_interval"][0] < 4.2
    assert figures["timing_doubt"] is None


def test_shorter_outputs_take_less_time():
    # All layers, but 5 tokens instead of 10: twice as fast is possible.
    half = [record(full.seconds / 2, 40, 40) for full in FULL]
    assert possible_speedup(half, FULL) == 2
    assert compare_speed(half, FULL)["timing_doubt"] is None
    assert compare_speed(half, half)["timing_doubt"] is None


def test_more_layers_need_not_take_longer_than_full_depth():
    # Rollbacks: the encoder and the head may be what takes the time.
    assert possible_speedup([record(1.0, 100, 80)], [record(1.0, 80, 80)]) == 1


def test_unknown_work_is_not_judged():
    plain = [record(0.01, 0, 0)] * 4  # Hugging Face's loop counts no layers
    assert possible_speedup(plain, FULL) is None and compare_speed(plain, FULL)["timing_doubt"] is None


@pytest.mark.parametrize(
    ("predicted", "measured", "doubted"),
    [(1.25, 1.0, False), (1.26, 1.0, True), (0.75, 1.0, False), (0.74, 1.0, True), (3.0, 2.0, True)],
)
def test_predictions_may_miss_by_a_quarter(predicted, measured, doubted):
    assert (doubt_prediction(predicted, measured) is not None) == doubted


def test_slack_is_small():
    assert doubt_speedup(4.3, [4.21, 4.4], 4.0) and not doubt_speedup(4.3, [4.19, 4.4], 4.0)


def test_one_sentence_names_all():
    rows = [
        {"name": "a", "timing_doubt": "measured 8.13x, the work saved allows 4.00x"},
        {"name": "b", "timing_doubt": None},
        {"name": "c"},
        {"name": "d", "timing_doubt": "predicted 1.00x, measured 2.00x"},
    ]
    doubts = "a measured 8.13x, the work saved allows 4.00x; d predicted 1.00x, measured 2.00x."
    assert untrusted_timing(rows).startswith(f"This timing cannot be trusted: {doubts}")
    assert untrusted_timing(rows[1:3]) is None
