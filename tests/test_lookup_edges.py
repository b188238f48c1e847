"""Lookups where texts, caches and positions end, and what they refuse."""

from __future__ import annotations

import functools

import pytest
import torch
from decoding_cases import ALWAYS, NEVER, EveryThirdDeep, Recorder, decode
from test_prompt_lookup import LENGTH, LOOKUP
from tiny_causal import decode_causal, greedy_causal, prompts, tiny_causal
from tiny_models import VOCABULARY, padded_inputs, tiny_model
from transformers import StoppingCriteria

from models import (
    DecodeStats,
    Free,
    FullDepth,
    LoadedModel,
    PromptLookup,
    SoftmaxGap,
    UserError,
    prepare,
)
from models.exit_heads import ExitConfig


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


@pytest.mark.slow
def test_precisions_in_which_windows_mix_are_refused():
    fast = prepare(LoadedModel(tiny_model(), None, ExitConfig()), "onnx", "w4")
    for policy in (FullDepth(LOOKUP), Free(2, SoftmaxGap(), 0.5, lossless=True, lookup=LOOKUP)):
        with pytest.raises(UserError, match="another precision: fp32"):
            fast.generate(**padded_inputs(), max_length=LENGTH, exit_policy=policy)
