"""Lookups: what they propose, and that proposals change no output, only the work."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from decoding_cases import ALWAYS, NEVER, DraftRecorder, EveryThirdDeep, decode, sometimes
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import QUICK, covering, slow_but
from scipy.stats import chisquare
from test_comparison import read_records, run_script
from test_free_pairs import PROCESSORS, build_measures, build_model, new_processors, quantiles_of
from test_lossless import AGREEING, MAX_EXAMPLES, OPTIONS, agreeing_model
from tiny_causal import CAUSAL_FAMILIES, decode_causal, greedy_causal, prompts, tiny_causal
from tiny_models import FAMILIES, VOCABULARY, greedy, padded_inputs, tiny_model
from transformers import set_seed

from models import (
    AdaptiveThreshold,
    DecayingThreshold,
    DecodeStats,
    FixedThreshold,
    Free,
    FullDepth,
    LoadedModel,
    PromptLookup,
    SoftmaxGap,
    prepare,
)
from models.exit_heads import ExitConfig
from scripts import sweep

LOOKUP = PromptLookup(4, longest=2, shortest=1)
LENGTH, DRAWS = 24, 400
MEASURES = ("softmax", "shortlist", "meta")


def continuation(ids, most, longest, shortest):
    """By the definition: of the last tokens, as many as possible, where they last stood before."""
    for length in range(longest, shortest - 1, -1):
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == ids[-length:]:
                return ids[start + length :][:most]
    return []


@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    most=st.integers(0, 6),
    tokens=st.integers(1, 6),
    sizes=st.sampled_from([(1, 1), (2, 1), (3, 2), (5, 5)]),
)
def test_proposals_follow_the_newest_earlier_occurrence(ids, most, tokens, sizes):
    longest, shortest = sizes
    proposed = PromptLookup(tokens, longest, shortest).propose(torch.tensor([ids]), most)
    assert proposed[0].tolist() == continuation(ids, min(most, tokens), longest, shortest)


def text_for(expected, seed):
    """What an output is likely to repeat: the output itself, with some tokens changed."""
    generator = torch.Generator().manual_seed(seed)
    changed = torch.rand(expected.shape, generator=generator) < 0.15
    others = torch.randint(2, VOCABULARY, expected.shape, generator=generator)
    return torch.where(changed, others, expected)


def options_for(model, inputs, seed=0, **options):
    """How to decode with lookups that often find what comes."""
    options = {"max_length": LENGTH} | options
    return options | {"lookup_ids": text_for(decode(model, inputs, **options), seed)}


@pytest.mark.parametrize("shape", slow_but(QUICK, FAMILIES))
def test_verified_output_is_hugging_faces(shape):
    model, inputs, stats = agreeing_model(shape, 3, deep_strength=0.3), padded_inputs(), DecodeStats()
    options = options_for(model, inputs, no_repeat_ngram_size=1)
    expected = greedy(model, inputs, max_length=LENGTH, no_repeat_ngram_size=1)
    policies = [
        Free(2, SoftmaxGap(), threshold, lossless=True, lookup=LOOKUP)
        for threshold in (ALWAYS, EveryThirdDeep(), NEVER, AdaptiveThreshold(0.01))
    ]
    for policy in (FullDepth(LOOKUP), *policies):
        assert torch.equal(decode(model, inputs, policy, stats, **options), expected)
        assert 0 < stats.accepted_proposals <= stats.proposed_tokens
        if policy.exit_layer is None:  # then nothing else is ever taken back
            assert stats.retracted_tokens == stats.proposed_tokens - stats.accepted_proposals
        assert stats.deep_passes < expected.shape[1] - 1  # some passes gave several tokens


@pytest.mark.parametrize("shape", slow_but(QUICK, CAUSAL_FAMILIES))
def test_prompts_are_looked_up(shape):
    model, stats = tiny_causal(shape).double(), DecodeStats()
    first = {name: tensor[:, 3:] for name, tensor in prompts().items()}
    ids = greedy_causal(model, first)  # ends in a repetition, as random models do
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = greedy_causal(model, inputs)
    for policy in (FullDepth(LOOKUP), Free(2, SoftmaxGap(), NEVER, lossless=True, lookup=LOOKUP)):
        assert torch.equal(decode_causal(model, inputs, policy, stats), expected)
        assert 0 < stats.proposed_tokens >= stats.retracted_tokens
        assert stats.tokens == expected.shape[1] - ids.shape[1]


@pytest.mark.slow
@settings(max_examples=MAX_EXAMPLES, deadline=None, derandomize=MAX_EXAMPLES < 1000)
@given(
    **AGREEING,
    source_seed=st.integers(0, 10**6),
    threshold=st.sampled_from([-1.0, 0.0, 0.05, 0.3, 2.0, None]),
    max_pending=st.sampled_from([None, 1, 2, 5]),
    tokens=st.sampled_from([1, 3, 8]),
    options=st.sampled_from(list(OPTIONS.values())),
)
def test_no_setting_changes_a_greedy_sequence(
    shape, seed, deep_strength, source_seed, threshold, max_pending, tokens, options
):
    model, inputs = agreeing_model(shape, seed, deep_strength), padded_inputs(seed=source_seed)
    lookup = PromptLookup(tokens, shortest=1)
    policy = FullDepth(lookup)
    if threshold is not None:
        settings = {"lossless": True, "max_pending": max_pending, "lookup": lookup}
        policy = Free(2, SoftmaxGap(), FixedThreshold(threshold), **settings)
    options = {"max_length": LENGTH} | options
    expected = decode(model, inputs, **options)
    looked_up = text_for(expected, source_seed)
    assert torch.equal(decode(model, inputs, policy, **options, lookup_ids=looked_up), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("confidence", "processors"), covering(MEASURES, list(PROCESSORS)))
def test_free_decodes_what_it_does_without(confidence, processors):
    """Also where processors make the exit choose another token than its most probable one."""
    proposed = overruled = 0
    for seed in range(3):
        case = {"family": FAMILIES[seed], "shallow_layer": 2}
        model, inputs = build_model(case, seed), padded_inputs(seed=seed)
        measure, _ = build_measures(model, confidence)
        low, middle = quantiles_of(model, case, measure, inputs)
        for threshold in (FixedThreshold(low), DecayingThreshold(middle, 4.0, LENGTH)):
            stats, plain = DecodeStats(), DecodeStats()
            options = {"max_length": LENGTH, "eos_token_id": list(range(1, 5))}
            free = Free(2, measure, threshold)
            expected = decode(
                model, inputs, free, plain, logits_processor=new_processors(processors), **options
            )
            looking = Free(2, measure, threshold, lookup=LOOKUP)
            options |= {"lookup_ids": text_for(expected, seed)}
            output = decode(
                model, inputs, looking, stats, logits_processor=new_processors(processors), **options
            )
            assert torch.equal(output, expected)
            assert stats.exit_layers == plain.exit_layers  # a lookup is no exit
            proposed, overruled = proposed + stats.proposed_tokens, overruled + stats.retracted_tokens
    assert proposed > 0 and overruled > 0


def test_scores_and_logits_are_full_depths():
    model, inputs = agreeing_model("bart-tied", 1, deep_strength=0.3), padded_inputs()
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options = options_for(model, inputs, repetition_penalty=1.3)
    expected = greedy(model, inputs, max_length=LENGTH, repetition_penalty=1.3, **kept)
    for policy in (FullDepth(LOOKUP), Free(2, SoftmaxGap(), EveryThirdDeep(), lossless=True, lookup=LOOKUP)):
        ours = decode(model, inputs, policy, **options, **kept)
        assert torch.equal(ours.sequences, expected.sequences)
        for mine, theirs in zip(
            (*ours.scores, *ours.logits), (*expected.scores, *expected.logits), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


def test_streamers_see_proposals_come_and_go():
    model, inputs, stats = agreeing_model("t5-tied", 5, deep_strength=1.0), padded_inputs(), DecodeStats()
    recorder, policy = DraftRecorder(), Free(2, SoftmaxGap(), EveryThirdDeep(), lossless=True, lookup=LOOKUP)
    output = decode(model, inputs, policy, stats, streamer=recorder, **options_for(model, inputs))
    assert recorder.tokens == output[0].tolist() and recorder.ended and not recorder.drafts
    assert recorder.taken_back == stats.retracted_tokens > 0 and stats.proposed_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lossless", "free"])
def test_sampling_keeps_the_distribution(kind):
    """Four tokens, two candidates each, where lookups propose one of them: the frequencies of outcomes
    against those without lookups."""
    model, inputs = tiny_model(num_layers=2), padded_inputs()
    options = {"do_sample": True, "top_k": 2, "max_length": 5, "temperature": 0.7}
    likely = decode(model, inputs, max_length=5)
    threshold = sometimes(model, inputs, layer=1)
    policies = {
        "full": (FullDepth(LOOKUP), FullDepth()),
        "lossless": (Free(1, SoftmaxGap(), threshold, lossless=True, lookup=LOOKUP), FullDepth()),
        "free": (Free(1, SoftmaxGap(), threshold, lookup=LOOKUP), Free(1, SoftmaxGap(), threshold)),
    }
    looking, plain = policies[kind]
    set_seed(0)
    drawn, stats, proposed = Counter(), DecodeStats(), 0
    for _ in range(DRAWS):
        output = decode(model, inputs, looking, stats, lookup_ids=likely, **options)
        drawn[tuple(output[0].tolist())] += 1
        proposed += stats.proposed_tokens
    copies = {name: tensor.repeat(DRAWS, 1) for name, tensor in inputs.items()}  # rows are independent
    known = Counter(map(tuple, decode(model, copies, plain, **options).tolist()))
    outcomes = [outcome for outcome, count in known.items() if count >= 10]
    observed, expected = ([each[outcome] for outcome in outcomes] for each in (drawn, known))
    assert proposed > DRAWS and len(outcomes) >= 4
    scale = sum(observed) / sum(expected)
    # Both sides are samples: the variance of their difference is twice the multinomial's.
    statistic = chisquare(observed, [count * scale for count in expected]).statistic / 2
    assert statistic < 3 * len(outcomes)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_generate_of_a_loaded_model_looks_its_source_up(backend):
    """Encoder-decoder: without being told what the encoder reads; a second call, prepared by the first."""
    loaded = LoadedModel(tiny_model("t5-tied"), None, ExitConfig())
    fast, stats = loaded if backend == "torch" else prepare(loaded, backend), DecodeStats()
    options = {"max_length": LENGTH, "do_sample": False}
    for seed in (1, 2):
        inputs = padded_inputs(seed=seed)
        output = loaded.generate(**inputs, **options, exit_policy=FullDepth())
        inputs["input_ids"][0, : len(output[0]) - 1] = output[0, 1 : 1 + inputs["input_ids"].shape[1]]
        expected = loaded.generate(**inputs, **options, exit_policy=FullDepth())
        for policy in (
            FullDepth(LOOKUP),
            Free(2, SoftmaxGap(), EveryThirdDeep(), lossless=True, lookup=LOOKUP),
        ):
            assert torch.equal(
                fast.generate(**inputs, **options, exit_policy=policy, decode_stats=stats), expected
            )
            assert stats.proposed_tokens > 0


@pytest.mark.slow
def test_sweep_compares_lookups(tmp_path):
    flags = ["--free", "checkpoints/debian-t5-free", "--num_samples", "4", "--lookup_tokens", "3", "6"]
    flags += [
        "--methods",
        "FREE",
        "FREE lossless",
        "--free_thresholds",
        "0.4",
        "--lossless_thresholds",
        "0.3",
    ]
    run_script(sweep, tmp_path, *flags)
    settings = {"Full depth": "", "FREE": " 0.4", "FREE lossless": " 0.3"}
    records = read_records(tmp_path)
    assert len(records) == 4 * 3 * 3
    for method, value in settings.items():
        for row, tokens in itertools.product(range(4), (3, 6)):
            looking = records[f"{method}, lookup {tokens}{value}", row]
            assert looking["prediction"] == records[method + value, row]["prediction"]
