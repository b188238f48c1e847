"""Lossless FREE: full depth's output at any threshold, whatever processors, criteria and streamers do."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from decoding_cases import LENGTH, MANY_ENDS, DraftRecorder, EveryThirdDeep, Recorder, decode, sometimes
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import QUICK, slow_but, thin
from scipy.stats import chisquare
from tiny_models import FAMILIES, SHAPES, padded_inputs, tiny_model
from transformers import PreTrainedModel, set_seed

from models import AdaptiveThreshold, DecodeStats, FixedThreshold, Free, SoftmaxGap, UserError, view_for

# LOSSLESS_EXAMPLES=6000 pytest tests/test_lossless.py -k no_setting  compares about 20,000 sequences.
MAX_EXAMPLES = int(os.environ.get("LOSSLESS_EXAMPLES", 60))
DRAWS = 300
THRESHOLDS = {"always": FixedThreshold(-1.0), "third": EveryThirdDeep(), "never": FixedThreshold(2.0)}
OPTIONS = {
    "plain": {},
    "many ends": MANY_ENDS,
    "min length": {"min_length": 10, **MANY_ENDS},
    "forced end": {"forced_eos_token_id": 7, "max_length": 12},
    "penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("shape", slow_but(QUICK, SHAPES))
def test_greedy_output_is_full_depths(shape):
    model, inputs, stats = tiny_model(shape).double(), padded_inputs(), DecodeStats()
    expected = decode(model, inputs)
    for name, threshold in THRESHOLDS.items():
        policy = Free(2, SoftmaxGap(), threshold, lossless=True)
        assert torch.equal(decode(model, inputs, policy, stats), expected)
        if name != "never":
            assert stats.rollbacks > 0  # random models disagree often


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seed", range(2))
def test_processors_and_criteria_hold(options, seed):
    model, inputs = tiny_model().double(), padded_inputs(seed=seed)
    expected, threshold = decode(model, inputs, **options), sometimes(model, inputs)
    for max_pending in (None, 1, 3):
        policy = Free(2, SoftmaxGap(), threshold, lossless=True, max_pending=max_pending)
        assert torch.equal(decode(model, inputs, policy, **options), expected)


def test_an_adaptive_threshold_learns_and_changes_nothing():
    model = tiny_model().double()
    policy = Free(2, SoftmaxGap(), AdaptiveThreshold(0.01), lossless=True)
    for seed in range(4):
        inputs = padded_inputs(seed=seed)
        assert torch.equal(decode(model, inputs, policy), decode(model, inputs))


def test_pending_tokens_are_capped():
    model, inputs, stats = tiny_model(), padded_inputs(), DecodeStats()
    policy = Free(2, SoftmaxGap(), FixedThreshold(-1.0), max_pending=3)
    decode(model, inputs, policy, stats)
    steps = LENGTH - 1
    assert stats.exit_layers[0] == ([2, 2, 2, 6] * steps)[:steps] and stats.deep_passes == steps // 4


def test_streamers_see_verified_tokens_once():
    model, inputs, recorder = tiny_model().double(), padded_inputs(), Recorder()
    policy = Free(2, SoftmaxGap(), EveryThirdDeep(), lossless=True)
    output = decode(model, inputs, policy, streamer=recorder)
    assert recorder.tokens == output[0].tolist() and recorder.ended


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize(
    "options", [{"lossless": True}, {"rollback_threshold": 3.0}], ids=["lossless", "rollback"]
)
def test_streamers_that_ask_for_drafts_see_them_come_and_go(options, always):
    """Also where only the pass at the end judges them, after which the sequence may go on."""
    model, inputs = agreeing_model("t5-tied", 5, deep_strength=1.0), padded_inputs(seed=5)
    recorder, stats = DraftRecorder(), DecodeStats()
    threshold = THRESHOLDS["always"] if always else EveryThirdDeep()
    output = decode(model, inputs, Free(2, SoftmaxGap(), threshold, **options), stats, streamer=recorder)
    assert recorder.tokens == output[0].tolist() and recorder.ended and not recorder.drafts
    assert recorder.taken_back == stats.retracted_tokens
    assert recorder.confirmed == sum(layer == 2 for layer in stats.exit_layers[0]) > 0
    assert recorder.taken_back > 0 or "rollback_threshold" in options


def test_statistics_count_every_token_once():
    model, inputs, stats = tiny_model().double(), padded_inputs(), DecodeStats()
    policy = Free(2, SoftmaxGap(), EveryThirdDeep(), lossless=True)
    output = decode(model, inputs, policy, stats)
    assert len(stats.exit_layers[0]) == output.shape[1] - 1
    assert stats.retracted_tokens >= stats.rollbacks > 0


@pytest.mark.slow
@pytest.mark.parametrize("batch", thin([1, 2], [2]))
def test_sampling_keeps_the_distribution(batch):
    """Three tokens, two candidates each: the frequencies of the last row's outcomes against full depth's."""
    model, inputs = tiny_model(num_layers=2), padded_inputs(batch)
    options = {"do_sample": True, "top_k": 2, "max_length": 4, "temperature": 0.7}
    policy = Free(1, SoftmaxGap(), FixedThreshold(-1.0), lossless=True)
    set_seed(0)
    lossless = Counter(tuple(decode(model, inputs, policy, **options)[-1].tolist()) for _ in range(DRAWS))
    copies = {name: tensor[-1:].repeat(DRAWS, 1) for name, tensor in inputs.items()}  # rows are independent
    full = Counter(map(tuple, decode(model, copies, **options).tolist()))
    outcomes = [outcome for outcome, count in full.items() if count >= 10]
    expected = [full[outcome] for outcome in outcomes]
    observed = [lossless[outcome] for outcome in outcomes]
    assert len(outcomes) >= 4
    scale = sum(observed) / sum(expected)
    # Both sides are samples: the variance of their difference is twice the multinomial's.
    statistic = chisquare(observed, [count * scale for count in expected]).statistic / 2
    assert statistic < 3 * len(outcomes)


def test_contradictions_are_refused():
    with pytest.raises(UserError):
        Free(2, SoftmaxGap(), FixedThreshold(0.5), copy_skipped=True, lossless=True)
    model, policy = tiny_model(), Free(2, SoftmaxGap(), FixedThreshold(0.5), rollback_threshold=1.0)
    with pytest.raises(UserError, match="one sequence"):
        decode(model, padded_inputs(2), policy)


def agreeing_model(shape: str, seed: int, deep_strength: float) -> PreTrainedModel:
    """A random model whose shallow and deep predictions agree more often, the weaker its deep layers."""
    model = tiny_model(shape, seed=seed).double()
    view = view_for(model)
    with torch.no_grad():
        for layer in view.layers[2:]:
            for name, weight in layer.named_parameters():
                if name.endswith(("o.weight", "out_proj.weight", "fc2.weight")):  # what layers add
                    weight.mul_(deep_strength)
    return model


AGREEING = {  # what `agreeing_model` is made of
    "shape": st.sampled_from(FAMILIES),
    "seed": st.integers(0, 9),
    "deep_strength": st.sampled_from([0.02, 0.1, 0.3, 1.0]),
}


@pytest.mark.slow
@settings(max_examples=MAX_EXAMPLES, deadline=None, derandomize=MAX_EXAMPLES < 1000)
@given(
    **AGREEING,
    batch=st.integers(1, 6),
    source_seed=st.integers(0, 10**6),
    threshold=st.sampled_from([-1.0, 0.0, 0.02, 0.05, 0.1, 0.3, 0.6, 2.0]),
    max_pending=st.sampled_from([None, 1, 2, 5]),
    options=st.sampled_from(list(OPTIONS.values())),
)
def test_no_setting_changes_a_greedy_sequence(
    shape, seed, deep_strength, batch, source_seed, threshold, max_pending, options
):
    model, inputs = agreeing_model(shape, seed, deep_strength), padded_inputs(batch, seed=source_seed)
    policy = Free(2, SoftmaxGap(), FixedThreshold(threshold), lossless=True, max_pending=max_pending)
    assert torch.equal(decode(model, inputs, policy, **options), decode(model, inputs, **options))
