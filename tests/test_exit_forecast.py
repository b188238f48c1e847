"""What an exit is taught by, and what it is forecast to bring, by hand and against decoding itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapted_models import SHALLOW, adapted, make_inputs

from models import DecodeStats, FixedThreshold, Free, FullDepth, SoftmaxGap, early_exit_decode
from models.replay import replay
from util.exit_training.forecast import (
    ExitCosts,
    ExitTrace,
    as_decoded,
    forecast,
    predict,
    time_decoding,
)
from util.exit_training.objectives import Teacher, acceptance_loss, distillation_loss


def test_objectives_by_hand():
    p, q = torch.tensor([[0.5, 0.2, 0.3]]), torch.tensor([[0.25, 0.5, 0.25]])
    teacher, logits = Teacher(p[:, :2], p[:, 2:]), q.log()
    kl = 0.5 * np.log(0.5 / 0.25) + 0.2 * np.log(0.2 / 0.5) + 0.3 * np.log(0.3 / 0.25)
    assert distillation_loss(logits, teacher).item() == pytest.approx(kl, abs=1e-6)
    assert acceptance_loss(logits, teacher).item() == pytest.approx(-np.log(0.25 + 0.2), abs=1e-6)


def bools(text):
    return np.array([letter == "1" for letter in text])


@pytest.mark.parametrize(
    ("sure", "agrees", "cap", "steps", "windows"),
    [
        ("0000", "1111", None, 4, [1, 1, 1, 1]),  # each token runs all layers
        ("1110", "1111", None, 4, [4]),  # three drafts and the unsure token
        ("1110", "1011", None, 6, [4, 2]),  # the second draft is wrong: two tokens won, then one draft more
        ("1111", "1111", 2, 4, [3, 1]),  # a third may not wait; the last is verified at the end
        ("1111", "1111", None, 4, [4]),  # verified at the end
    ],
)
def test_lossless_decisions_by_hand(sure, agrees, cap, steps, windows):
    assert replay(bools(sure), bools(agrees), cap, lossless=True) == (steps, windows)


def test_decisions_of_free_by_hand():
    assert replay(bools("110100"), bools("000000"), None, lossless=False) == (6, [3, 2, 1])
    assert replay(bools("00"), bools("11"), None, lossless=False) == (2, [1, 1])
    assert replay(bools("111"), bools("111"), None, lossless=False) == (3, [])  # what waits at the end stays


def test_a_forecast_adds_up():
    costs = ExitCosts(1.0, 10.0, 4.0, (7.0, 8.0, 9.0, 11.0, 15.0), (6.0, 7.0, 8.0, 10.0, 14.0))
    traces = [ExitTrace(np.array([0.9, 0.9, 0.1]), bools("111")), ExitTrace(np.array([0.1]), bools("1"))]
    one = predict(costs, traces, 0.5, 3, True)
    full = (1 + 3 * 10) + (1 + 10)
    ours = (1 + 3 * 4 + 9) + (1 + 4 + 7)
    assert one.speedup == pytest.approx(full / ours) and one.exit_share == 0.5 and one.agreement == 1
    free = predict(costs, traces, 0.5, None, False)
    assert free.speedup == pytest.approx(full / ((1 + 3 * 4 + 8) + (1 + 4 + 6)))
    assert (
        costs.deep_pass(4, True) == 10 and costs.deep_pass(11, True) == 17
    )  # between and beyond the measured
    assert max(forecast(costs, traces), key=lambda one: one.speedup).speedup >= one.speedup


def test_the_forecast_counts_what_decoding_does():
    """A token of another mind is drafted nowhere: windows and steps are those of `Free`."""
    loaded = adapted("llama-tied")
    inputs = make_inputs("llama-tied")
    policy = Free(SHALLOW, SoftmaxGap(), FixedThreshold(0.3))
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    stats = DecodeStats()
    loaded.model.generate(
        **inputs, **options, custom_generate=early_exit_decode, exit_policy=policy, decode_stats=stats
    )
    sure = np.array([test[0][0] > 0.3 for test in stats.confidences])
    steps, windows = replay(sure, np.ones(16, bool), None, lossless=False)
    assert (steps, len(windows)) == (stats.steps, stats.deep_passes)
    assert stats.layer_tokens == steps * (SHALLOW + 1) + sum(windows) * (6 - SHALLOW)


def test_one_beam_is_timed_whatever_the_checkpoints_beams():
    loaded = adapted("t5-tied")
    loaded.model.generation_config.update(num_beams=4, num_return_sequences=2)
    step, sample = time_decoding(loaded, [make_inputs("t5-tied")], FullDepth())
    assert step >= 0 and sample >= 0


def test_a_pass_takes_as_long_as_the_loop_around_it():
    assert as_decoded([3.0, 4.0, 6.0], 5.0) == (5.0, 6.0, 8.0)
    assert as_decoded([3.0, 4.0], 2.0) == (3.0, 4.0), "noise makes nothing faster than its layers"
