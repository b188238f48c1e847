"""FREE that chooses its settings: outputs that stay, choices that follow from what was seen."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from tiny_causal import decode_causal, greedy_causal, prompts, tiny_causal

from models import AutoExit, DecodeStats, SoftmaxGap, UserError
from models.auto_exit import NEVER, Watch, fit_costs
from models.confidence import Measured
from models.exit_heads import ExitConfig
from models.exit_policy import StepResult
from models.loading import LoadedModel
from util.exit_arguments import ExitArguments
from util.policies import build_policy


def watched(layer, pairs, shallow=1.0, deep=((1, 5.0), (3, 7.0))):
    return Watch(layer, list(pairs), [shallow] * 3, list(deep), lossless=True)


def auto(**options):
    return AutoExit([2], SoftmaxGap(), **options)


@pytest.mark.slow
def test_lossless_outputs_are_full_depths_whatever_is_chosen():
    policy, model = AutoExit([1, 2, 4], SoftmaxGap(), requests=3), tiny_causal()
    choices = []
    for seed in range(12):
        inputs = prompts(1, seed=seed)
        assert torch.equal(decode_causal(model, inputs, policy), greedy_causal(model, inputs))
        choices.append(policy.choice)
    assert choices[:2] == [None, None] and choices[2] is not None  # each layer is tried once, then one chosen
    assert {watch.layer for own in policy.watches.values() for watch in own} == {1, 2, 4}


@pytest.mark.parametrize("lossless", [False, True])
def test_answers_shorter_than_a_window_are_learnt_from(lossless):
    """Where every token is sure, the only deep pass is the one at the end."""
    policy = AutoExit(
        [2], lambda *given: Measured(torch.ones(1), None), lossless, requests=2, min_agreement=0.0
    )
    model = tiny_causal()
    for seed in range(4):
        inputs = prompts(1, seed=seed)
        output = decode_causal(model, inputs, policy, max_new_tokens=3)
        if lossless:
            assert torch.equal(output, greedy_causal(model, inputs, max_new_tokens=3))
    windows = [window for watch in policy.watches[2] for window, _ in watch.deep]
    assert policy.choice is not None and set(windows) <= {1, 2, 3}


def test_what_agrees_is_drafted_and_what_does_not_is_not():
    right, wrong = [(0.9, True)] * 40, [(0.9, False)] * 40
    for pairs, drafts in ((right, True), (wrong, False)):
        policy = auto(requests=1)
        policy._learn(watched(2, pairs))
        assert (policy.choice.threshold < 0.9) == drafts
    assert policy.choice.threshold in (0.9, NEVER)


def test_the_cap_follows_acceptance():
    """Every fourth draft is wrong: more than four tokens in a pass are seldom worth their shallow steps."""
    policy, deep = auto(requests=1), ((1, 15.0), (3, 17.0))
    policy._learn(watched(2, [(0.9, place % 4 != 3) for place in range(80)], 4.0, deep))
    moderate = policy.choice.max_pending
    policy = auto(requests=1)
    policy._learn(watched(2, [(0.9, True)] * 80, 4.0, deep))
    assert moderate < policy.choice.max_pending == 8


def test_the_faster_layer_is_chosen():
    policy = AutoExit([1, 3], SoftmaxGap(), requests=2)
    policy._learn(watched(1, [(0.9, True)] * 20, shallow=1.0))
    policy._learn(watched(3, [(0.9, True)] * 20, shallow=3.0))
    assert policy.choice.layer == 1


def test_seconds_of_a_choice_by_hand():
    """Four tokens, all drafted but the last: four shallow steps and a pass of four."""
    watch = watched(2, [(0.9, True), (0.9, True), (0.9, True), (0.1, True)])
    assert fit_costs([watch]) == pytest.approx((1.0, 3.0, 1.0))  # 5 and 7 seconds, a shallow step among them
    policy = auto()
    policy.watches[2].append(watch)
    assert policy._rate(2, 0.5, 8).seconds == pytest.approx((4 * 1.0 + 3.0 + 4 * 1.0) / 4)


def test_a_layer_that_is_named_twice_is_one():
    policy = AutoExit([2, 2], SoftmaxGap())
    assert policy.layers == [2] and policy.exit_layer == 2


def test_tokens_after_a_wrong_draft_are_not_learnt_from():
    watch = Watch(2, lossless=True)
    watch.observe([(0.9, True), (0.8, False), (0.7, True)])
    assert watch.pairs == [(0.9, True), (0.8, False)]
    watch.time(StepResult(torch.zeros(1, 3), [6], 6, 2 + 4 * 3, deep_pass=True), 0.5)
    assert watch.deep == [(3, 0.5)]


def test_free_keeps_to_the_agreement_asked_for():
    pairs = [(confidence, confidence > 0.55) for confidence in np.linspace(0, 1, 50)]
    policy = auto(lossless=False, min_agreement=1.0, requests=1)
    policy._learn(Watch(2, pairs, [1.0], [(1, 5.0)]))
    assert policy.choice.threshold == 0.6
    model, inputs, stats = tiny_causal(), prompts(), DecodeStats()
    decode_causal(model, inputs, policy, stats)  # nothing verifies any more: the choice stays
    assert policy.seen == 1


@pytest.mark.slow
def test_one_object_serves_several_threads():
    policy, model, found = auto(requests=2), tiny_causal(), {}

    def decode(seed):
        found[seed] = decode_causal(model, prompts(1, seed=seed), policy)

    threads = [threading.Thread(target=decode, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], greedy_causal(model, prompts(1, seed=seed))) for seed in range(8))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UserError, match="one sequence at a time"):
        decode_causal(tiny_causal(), prompts(2), auto())
    with pytest.raises(UserError, match="name at least one"):
        AutoExit([], SoftmaxGap())
    with pytest.raises(UserError, match=r"must lie in 1\.\.5, got 9"):
        decode_causal(tiny_causal(), prompts(), AutoExit([9], SoftmaxGap()))


def test_the_flag_makes_one_of_the_checkpoints_exit():
    flags = ExitArguments(use_shallow_deep=True, shallow_exit_layer=2, auto_exit=True, lossless=True)
    policy = build_policy(flags, LoadedModel(tiny_causal(), None, ExitConfig()), max_length=10)
    assert isinstance(policy, AutoExit) and policy.layers == [2] and policy.retracts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_adapt_threshold", True),
        ("max_pending_tokens", 3),
        ("lookup_tokens", 3),
        ("shallow2deep_conf_threshold", 0.77),
        ("copy_skipped_hidden_states", True),
        ("rollback_conf_threshold", 1.0),
        ("parallel_causal_mask", False),
    ],
)
def test_what_it_settles_by_itself_is_not_given(name, value):
    with pytest.raises(UserError, match=f"--auto_exit contradicts --{name}"):
        ExitArguments(use_shallow_deep=True, shallow_exit_layer=2, auto_exit=True, **{name: value})
