"""Lookups: what they propose, and that proposals change no output, only the work."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import pytest
import torch
from decoding_cases import ALWAYS, NEVER, DraftRecorder, EveryThirdDeep, Recorder, decode, sometimes
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import QUICK, slow_but
from scipy.stats import chisquare
from test_comparison import read_records, run_script
from test_free_pairs import PROCESSORS, build_measures, build_model, new_processors, quantiles_of
from test_lossless import MAX_EXAMPLES, OPTIONS, agreeing_model
from tiny_causal import CAUSAL_FAMILIES, decode_causal, greedy_causal, prompts, tiny_causal
from tiny_models import FAMILIES, VOCABULARY, greedy, padded_inputs, tiny_model
from transformers import StoppingCriteria, set_seed

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
    UserError,
    prepare,
)
from models.exit_heads import ExitConfig
from scripts import sweep

LOOKUP = PromptLookup(4, longest=2, shortest=1)
LENGTH, DRAWS = 24, 400


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
    shape=st.sampled_from(FAMILIES),
    seed=st.integers(0, 9),
    deep_strength=st.sampled_from([0.02, 0.1, 0.3, 1.0]),
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
    options = options_for(model, inputs, source_seed, **options)
    looked_up = options.pop("lookup_ids")
    expected = decode(model, inputs, **options)
    assert torch.equal(decode(model, inputs, policy, **options, lookup_ids=looked_up), expected)


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("confidence", ["softmax", "shortlist", "meta"])
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
    known = Counter(tuple(decode(model, inputs, plain, **options)[0].tolist()) for _ in range(DRAWS))
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


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"copy_skipped": True}, "lookup excludes"),
        ({"rollback_threshold": 1.0}, "lookup excludes"),
        ({"causal_catch_up": False}, "lookup excludes"),
    ],
)
def test_contradictions_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        Free(2, SoftmaxGap(), 0.5, lookup=LOOKUP, **options)


def test_embeddings_of_the_prompt_stay():
    """The first step reads the embedding of the prompt's last token, and no lookup beside it."""
    model = tiny_causal().double()
    ids = greedy_causal(model, {name: tensor[:, 3:] for name, tensor in prompts().items()})
    embeds = model.get_input_embeddings()(ids).detach() * 1.5
    expected = greedy_causal(model, {"inputs_embeds": embeds})
    for policy in (FullDepth(LOOKUP), Free(2, SoftmaxGap(), EveryThirdDeep(), lossless=True, lookup=LOOKUP)):
        given = {"inputs_embeds": embeds, "lookup_ids": torch.cat([ids, expected], dim=1)}
        assert torch.equal(decode_causal(model, given, policy), expected)


@pytest.mark.parametrize("lookup", [None, PromptLookup(20, shortest=1)])
def test_texts_that_end_before_the_positions_do(lookup):
    """No draft goes beyond them: not of a lookup, nor of an exit."""
    length, end, positions = 30, 34, 36
    model = tiny_causal("gpt2-tied", n_positions=positions, max_position_embeddings=positions).double()
    ids = 2 + torch.randperm(VOCABULARY - 2, generator=torch.Generator().manual_seed(0))[None, :length]
    ids[0, -1] = ids[0, 0]  # what followed there is proposed: more tokens than there are positions
    options = {"max_new_tokens": 20, "no_repeat_ngram_size": 1}
    last = int(
        greedy_causal(model, {"input_ids": ids}, max_new_tokens=end - length, no_repeat_ngram_size=1)[0, -1]
    )
    assert last not in ids
    options["eos_token_id"] = last
    expected = greedy_causal(model, {"input_ids": ids}, **options)
    assert expected.shape[1] == end
    for threshold in (ALWAYS, NEVER):
        policy = Free(2, SoftmaxGap(), threshold, lossless=True, lookup=lookup)
        assert torch.equal(decode_causal(model, {"input_ids": ids}, policy, **options), expected)
    assert torch.equal(decode_causal(model, {"input_ids": ids}, FullDepth(lookup), **options), expected)


def test_a_source_may_be_told():
    """Where embeddings stand for the source's ids, or where it is another text that outputs repeat."""
    loaded, inputs, stats = LoadedModel(tiny_model(), None, ExitConfig()), padded_inputs(), DecodeStats()
    options = {"max_length": LENGTH, "do_sample": False}
    expected = loaded.generate(**inputs, **options)
    encoded = loaded.model.get_encoder()(**inputs)
    given = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]}
    for text in (inputs, given):
        output = loaded.generate(
            **text, **options, exit_policy=FullDepth(LOOKUP), lookup_ids=expected, decode_stats=stats
        )
        assert torch.equal(output, expected) and stats.accepted_proposals > 0


class EndsAt(StoppingCriteria):
    """Reads scores: of several tokens, as a lookup has none."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        ends = int(scores[-1].isfinite().sum()) > 1 and input_ids.shape[1] >= self.length
        return torch.full((len(input_ids),), ends, dtype=torch.bool)


@pytest.mark.parametrize("policy", [FullDepth(LOOKUP), Free(2, SoftmaxGap(), ALWAYS, lossless=True)])
def test_caches_end_before_the_last_token(policy):
    """Also where a criterion finds the end among drafts, which the cache holds all."""
    model = tiny_causal().double()
    ids = greedy_causal(model, {name: tensor[:, 3:] for name, tensor in prompts().items()})
    options = {"return_dict_in_generate": True, "output_scores": True}
    for length in range(ids.shape[1] + 1, ids.shape[1] + 8):
        given = options | {"stopping_criteria": [EndsAt(length)]}
        expected = greedy_causal(model, {"input_ids": ids}, **given)
        ours = decode_causal(model, {"input_ids": ids}, policy, **given)
        assert torch.equal(ours.sequences, expected.sequences)
        assert ours.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


class Arrivals(Recorder):
    """How many tokens there were at each."""

    def __init__(self, stats):
        super().__init__()
        self.stats, self.steps = stats, []

    def put(self, value):
        super().put(value)
        self.steps.append(self.stats.steps)


def test_free_streams_tokens_that_stand():
    """One by one where nothing is proposed, as without a lookup."""
    model, inputs, arrivals = tiny_model(), padded_inputs(), []
    for lookup in (None, PromptLookup(4, longest=20, shortest=20)):
        stats = DecodeStats()
        arrivals.append(Arrivals(stats))
        policy = Free(2, SoftmaxGap(), ALWAYS, lookup=lookup)
        decode(
            model,
            inputs,
            policy,
            stats,
            streamer=arrivals[-1],
            lookup_ids=None if lookup is None else inputs["input_ids"],
        )
    assert arrivals[0].steps == arrivals[1].steps and arrivals[0].tokens == arrivals[1].tokens


def test_what_cannot_be_looked_up_is_refused():
    model = tiny_model()
    for policy in (FullDepth(LOOKUP), Free(2, SoftmaxGap(), 0.5, lookup=LOOKUP)):
        for batch, text, match in (
            (2, padded_inputs(2)["input_ids"], "one sequence at a time"),
            (1, None, "give lookup_ids="),
            (1, torch.full((1, 3), VOCABULARY), "another vocabulary"),
            (1, torch.full((1, 3), -100), "another vocabulary"),
            (1, torch.zeros(3, dtype=torch.long), r"of shape \(3,\)"),
            (1, torch.zeros(2, 3, dtype=torch.long), r"of shape \(2, 3\)"),
            (1, torch.zeros(1, 3), "got torch.float32"),
        ):
            with pytest.raises(UserError, match=match):
                decode(model, padded_inputs(batch), policy, lookup_ids=text)
    with pytest.raises(UserError, match="no effect here: the policy has no lookup"):
        decode(model, padded_inputs(), FullDepth(), lookup_ids=padded_inputs()["input_ids"])
    apart = tiny_model("marian", share_encoder_decoder_embeddings=False, tie_word_embeddings=False)
    with pytest.raises(UserError, match="vocabularies of their own"):
        decode(apart, padded_inputs(), FullDepth(LOOKUP), lookup_ids=padded_inputs()["input_ids"])
    for wrong in (6, PromptLookup):
        for make in (FullDepth, functools.partial(Free, 2, SoftmaxGap(), 0.5)):
            with pytest.raises(UserError, match=r"lookup must be an object such as PromptLookup\(6\), got"):
                make(lookup=wrong)
    with pytest.raises(UserError, match="shortest 4 must not exceed"):
        PromptLookup(2, shortest=4)
    with pytest.raises(UserError, match="tokens must be a whole number"):
        PromptLookup(0)


@pytest.mark.parametrize(
    "policy", [FullDepth(LOOKUP), Free(2, SoftmaxGap(), 0.5, lossless=True, lookup=LOOKUP)]
)
def test_precisions_in_which_windows_mix_are_refused(policy):
    fast = prepare(LoadedModel(tiny_model("t5-tied"), None, ExitConfig()), "onnx", "w4")
    with pytest.raises(UserError, match="another precision: fp32"):
        fast.generate(**padded_inputs(), max_length=LENGTH, exit_policy=policy)


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
