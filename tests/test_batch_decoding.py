"""Rows of a batch, what a decoding reports and leaves behind, and the policies that are refused."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
from decoding_cases import (
    MANY_ENDS,
    NEVER,
    POLICIES,
    ROWS,
    DeepLogits,
    EveryThirdDeep,
    Recorder,
    decode,
    sometimes,
)
from pairs import QUICK, slow_but
from tiny_models import FAMILIES, padded_inputs, tiny_model

from models.confidence import Measured, SoftmaxGap
from models.decode_stats import DecodeStats
from models.errors import UserError
from models.exit_policy import FullDepth, StaticExit, check_policy
from models.families import view_for
from models.free import Free
from models.threshold import AdaptiveThreshold, FixedThreshold

EXITING = ("calm", "free", "lossless", "free-copy")
ROW_CASES = slow_but(itertools.product(QUICK, EXITING), itertools.product(FAMILIES, EXITING))


@functools.cache
def batch_of(shape):
    """A model, sources that end at different steps, and a threshold that splits the first one's tokens."""
    model, inputs = tiny_model(shape, seed=5).double(), padded_inputs(batch=ROWS)
    return model, inputs, sometimes(model, inputs)


@pytest.mark.parametrize(("shape", "name"), ROW_CASES)
def test_rows_of_a_batch_decode_as_they_do_alone(shape, name):
    model, inputs, threshold = batch_of(shape)
    policy, stats = POLICIES[name](threshold), DecodeStats()
    together = decode(model, inputs, policy, stats, **MANY_ENDS)
    assert len(set(map(len, stats.exit_layers))) > 1
    depths = {layer for row in stats.exit_layers for layer in row}
    assert name in ("full", "static", "lossless") or len(depths) > 1
    for row in range(ROWS):
        source = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = decode(model, source, policy, **MANY_ENDS)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()
        assert (together[row, alone.shape[1] :] == model.config.pad_token_id).all()


def test_finished_rows_trigger_no_deep_pass():
    model, inputs = tiny_model(), padded_inputs(batch=2)
    view = view_for(model)
    memory = {"encoder_outputs": model.get_encoder()(**inputs), "attention_mask": inputs["attention_mask"]}
    state, measure = view.begin(None, **memory), SoftmaxGap()

    def first_row_is_sure(*states):
        return measure(*states)._replace(confidence=torch.tensor([0.9, 0.1]))

    policy = Free(2, first_row_is_sure, FixedThreshold(0.5))
    tokens = torch.tensor([[0], [0]])
    assert not policy.step(view, state, tokens, 0, [True, False]).deep_pass
    assert policy.step(view, state, tokens, 1, [True, True]).deep_pass


class Sure:
    """Of everything, and never asked for less."""

    def __call__(self, view, hidden, layer):
        return Measured(torch.ones(len(hidden)), None)


def test_rows_that_ended_are_charged_no_catch_up():
    """Every token exits, and all are caught up on at the end, for the threshold to learn: each has run every
    layer once."""
    model, inputs, _ = batch_of("t5-tied")
    stats = DecodeStats()
    decode(model, inputs, Free(2, Sure(), AdaptiveThreshold(0.5, 0.4)), stats, **MANY_ENDS)
    assert len(set(map(len, stats.exit_layers))) > 1 and stats.exit_share == 1
    assert stats.deep_passes == 1 and stats.average_layers == 6


def test_rows_that_exit_by_copying_teach_nothing():
    """They ran no deep layers that could agree: only the other row does, as it would alone."""
    model, inputs = tiny_model().double(), padded_inputs(2)

    def first_row_is_sure(view, hidden, layer):
        return Measured(torch.tensor([0.9, 0.1])[-len(hidden) :], None)

    learnt = []
    for rows in (slice(None), slice(1, 2)):
        given, stats = {name: tensor[rows] for name, tensor in inputs.items()}, DecodeStats()
        threshold = AdaptiveThreshold(0.5)
        policy = Free(2, first_row_is_sure, threshold, copy_skipped=True)
        decode(model, given, policy, stats, min_length=14)
        learnt.append(stats.calibration)
        assert [*threshold.pairs] == stats.calibration
    assert learnt[0] == learnt[1] and len(learnt[1]) == 13


def test_stats_count_the_work_that_ran():
    model, inputs = tiny_model(), padded_inputs()
    stats = DecodeStats()
    policy = DeepLogits([True, True, False, True, False, True])
    decode(model, inputs, policy, stats, max_length=7, min_length=7)
    assert stats.exit_layers == [[2, 2, 6, 2, 6, 2]]
    assert (stats.steps, stats.deep_passes) == (6, 2)
    assert stats.layer_calls == 6 * 2 + 2 * 4
    assert stats.layer_tokens == 6 * 2 + (3 + 2) * 4
    assert stats.average_layers == pytest.approx(32 / 6)
    assert stats.ideal_speedup == pytest.approx(36 / 20)
    assert stats.exit_share == pytest.approx(4 / 6)


@pytest.mark.parametrize("rollback", [None, 0.0, 1.0])
def test_streamer_sees_exactly_the_output(rollback):
    model, inputs = tiny_model(), padded_inputs()
    policy = Free(2, SoftmaxGap(), EveryThirdDeep(), rollback_threshold=rollback)
    streamer, stats = Recorder(), DecodeStats()
    sequence = decode(model, inputs, policy, stats, streamer=streamer)
    assert streamer.tokens == sequence[0].tolist() and streamer.ended
    assert len(stats.exit_layers[0]) == len(streamer.tokens) - 1
    assert (stats.rollbacks > 0) == (rollback is not None)


def test_stats_can_be_used_again():
    model, stats = tiny_model(), DecodeStats()
    for batch in (1, 3):
        sequence = decode(model, padded_inputs(batch), FullDepth(), stats, max_length=6)
        assert stats.tokens == batch * (sequence.shape[1] - 1) == 5 * batch
        assert stats.average_layers == 6


def test_nothing_survives_on_the_model():
    model, inputs = tiny_model(), padded_inputs()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    decode(model, inputs, Free(2, SoftmaxGap(), EveryThirdDeep()))
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("policy", "layers"), [(StaticExit(7), "1..6"), *((Free(n, SoftmaxGap(), NEVER), "1..5") for n in (6, 9))]
)
def test_layers_the_decoder_lacks_or_that_leave_none_to_skip_are_refused(policy, layers):
    with pytest.raises(ValueError, match=re.escape(f"must lie in {layers}")):
        decode(tiny_model(), padded_inputs(), policy)


def test_beam_search_is_refused():
    with pytest.raises(ValueError, match="num_beams"):
        decode(tiny_model(), padded_inputs(), num_beams=3)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Free, r"give an object, Free\(\.\.\.\), not the class Free"),
        (FullDepth, r"give an object, FullDepth\(\.\.\.\)"),
        ("free", "'free' is no policy; it lacks begin, step, finish, retracts"),
        (NEVER, "is no policy; it lacks begin"),
    ],
)
def test_what_is_no_policy_is_refused(policy, message):
    with pytest.raises(UserError, match=message):
        check_policy(policy)
    check_policy(FullDepth())
