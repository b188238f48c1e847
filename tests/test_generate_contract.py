"""What `generate` promises besides tokens: caches, masks, streamers, criteria, outputs; or a refusal."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from decoding_cases import LENGTH, MANY_ENDS, EveryThirdDeep, decode
from pairs import QUICK, slow_but
from tiny_models import FAMILIES, SHAPES, empty_cache, greedy, padded_inputs, tiny_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import BaseStreamer

from models import (
    AdaptiveThreshold,
    Calm,
    DecodeStats,
    ExitConfig,
    FixedThreshold,
    Free,
    FullDepth,
    LoadedModel,
    SoftmaxGap,
    StaticExit,
    UserError,
    early_exit_decode,
    generate,
    load_model,
    view_for,
)

CHECKPOINT = "checkpoints/debian-t5-free"
SEEDS = 3


def lossless(max_pending=None):
    return Free(2, SoftmaxGap(), EveryThirdDeep(), lossless=True, max_pending=max_pending)


def prompts(batch, padding):
    """Decoder prompts, padded on the left, each row by one more."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 90, (batch, 5), generator=generator)
    ids[:, 0] = 0
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : min(row * padding, 3)] = 0
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


@pytest.mark.parametrize("shape", slow_but(QUICK, SHAPES))
def test_padded_decoder_prompts_are_masked(shape):
    model, inputs = tiny_model(shape, seed=1).double(), padded_inputs(3)
    never = Free(2, SoftmaxGap(), FixedThreshold(2.0))
    inputs |= prompts(3, padding=1)
    expected = greedy(model, inputs, max_length=LENGTH, **MANY_ENDS)
    for policy in (FullDepth(), never, lossless()):
        assert torch.equal(decode(model, inputs, policy, **MANY_ENDS), expected)
    unmasked = {name: tensor for name, tensor in inputs.items() if name != "decoder_attention_mask"}
    first = {"return_dict_in_generate": True, "output_logits": True, "max_length": 6}
    masked, blind = (decode(model, given, never, **first).logits[0] for given in (inputs, unmasked))
    assert torch.equal(masked[0], blind[0]) and not torch.allclose(masked[1:], blind[1:])


@pytest.mark.parametrize("length", ["all ids", "new ids"])
@pytest.mark.parametrize("shape", slow_but(QUICK, FAMILIES))
def test_a_cache_of_an_earlier_call_is_continued(shape, length):
    """Hugging Face's loop goes on from its own cache, ours from its own and from Hugging Face's."""
    model, inputs = tiny_model(shape, seed=1).double(), padded_inputs(2)
    options = {"min_new_tokens": 7, "no_repeat_ngram_size": 2}

    def begun(start):
        cache = empty_cache()
        ids = start(inputs, cache=cache, max_length=7, min_length=7)
        assert cache.get_seq_length() == 6
        return ids, cache

    def continued(ids, cache, go_on):
        if length == "all ids":
            prompt = {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
        else:
            prompt = {"decoder_input_ids": ids[:, -1:]}
        return go_on(inputs | prompt, cache=copy.deepcopy(cache), max_new_tokens=9, **options)

    def theirs(inputs, **settings):
        return model.generate(**inputs, do_sample=False, **settings)

    def ours(policy):
        def run(inputs, **settings):
            settings |= {"custom_generate": early_exit_decode, "exit_policy": policy, "do_sample": False}
            return model.generate(**inputs, **settings)

        return run

    by_them, by_us = begun(theirs), begun(ours(FullDepth()))
    expected = continued(*by_them, theirs)
    never = Free(2, SoftmaxGap(), FixedThreshold(2.0))
    for policy in (FullDepth(), never, lossless(), lossless(max_pending=1)):
        assert torch.equal(continued(*by_them, ours(policy)), expected)
    assert torch.equal(continued(*by_us, ours(lossless())), expected)


@pytest.mark.parametrize("shape", slow_but(QUICK, FAMILIES))
def test_the_delivered_cache_is_generates(shape):
    model, inputs = tiny_model(shape).double(), padded_inputs(2)
    options = {"return_dict_in_generate": True, "max_length": 9, "min_length": 9}
    theirs = model.generate(**inputs, cache=empty_cache(), do_sample=False, **options)
    ours = decode(model, inputs, **options)
    assert ours.cache.get_seq_length() == 8
    for ours_layer, theirs_layer in zip(ours.cache, theirs.cache, strict=True):
        for mine, other in zip(ours_layer, theirs_layer, strict=True):
            if mine is not None:
                torch.testing.assert_close(mine, other)


def test_a_cache_holds_only_tokens_that_all_layers_have():
    model, inputs = tiny_model().double(), padded_inputs()
    always = FixedThreshold(-1.0)
    lengths = {"static": (StaticExit(2), 0), "calm": (Calm(SoftmaxGap(), always), 8),
               "free": (Free(2, SoftmaxGap(), EveryThirdDeep()), 6)}  # fmt: skip
    for policy, expected in lengths.values():
        cache = empty_cache()
        decode(model, inputs, policy, cache=cache, max_length=9, min_length=9)
        assert cache.get_seq_length() == expected


def test_an_uneven_or_foreign_cache_is_refused():
    model, inputs, cache = tiny_model(), padded_inputs(), empty_cache()
    greedy_cache = {"cache": cache, "max_length": 6}
    model.generate(**inputs, do_sample=False, **greedy_cache)
    cache.self_attention_cache.layers[3].crop(-2)
    with pytest.raises(UserError, match="not of one call"):
        decode(model, inputs, cache=cache)
    with pytest.raises(UserError, match="cache_implementation"):
        decode(model, inputs, cache_implementation="static")


REFUSED = {
    "num_beams": {"num_beams": 2},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "assistant_early_exit": {"assistant_early_exit": 2},
    "leave out use_mtp ": {"use_mtp": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "decoder_inputs_embeds": {"decoder_inputs_embeds": torch.zeros(1, 1, 32)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loop_cannot_do_is_refused_by_name(name):
    with pytest.raises(UserError, match=name) as raised:
        decode(tiny_model(), padded_inputs(), **REFUSED[name])
    assert "\n" not in str(raised.value)


def test_an_assistant_is_refused():
    with pytest.raises(UserError, match="assistant_model"):
        decode(tiny_model(), padded_inputs(), assistant_model=tiny_model(seed=1))


@pytest.mark.slow
def test_a_text_streamer_prints_what_generates_does(capsys):
    loaded = load_model(CHECKPOINT)
    inputs = loaded.tokenizer("Werkzeuge zur Verwaltung von Paketen", return_tensors="pt")
    for skip_prompt in (False, True):
        streamer = TextStreamer(loaded.tokenizer, skip_prompt=skip_prompt)
        loaded.model.generate(**inputs, do_sample=False, max_length=20, streamer=streamer)
        expected = capsys.readouterr().out
        for policy in (FullDepth(), Free(2, SoftmaxGap(), FixedThreshold(0.3), lossless=True)):
            decode(loaded.model, inputs, policy, streamer=streamer)
            assert capsys.readouterr().out == expected


def test_an_iterator_streamer_ends():
    loaded = load_model(CHECKPOINT)
    inputs = loaded.tokenizer("Werkzeuge zur Verwaltung von Paketen", return_tensors="pt")
    streamer = TextIteratorStreamer(loaded.tokenizer, skip_special_tokens=True, timeout=60)
    policy = Free(2, SoftmaxGap(), FixedThreshold(0.3))
    thread = threading.Thread(
        target=decode, args=(loaded.model, inputs, policy), kwargs={"streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = decode(loaded.model, inputs, policy)
    assert text == loaded.tokenizer.decode(expected[0], skip_special_tokens=True)


class Received(BaseStreamer):
    """What a streamer is given."""

    def __init__(self):
        self.tokens, self.ends = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("ours", [True, False])
def test_a_streamer_sees_nothing_of_calls_that_are_made_meanwhile(ours):
    """In a processor of the call that it streams, on the same model."""
    loaded, inputs = LoadedModel(tiny_model(), None, ExitConfig()), padded_inputs()
    options = {"max_length": 6}
    loaded.generate(**inputs, **options)  # prepared: from now on the loop is called without `generate`

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            loaded.generate(**inputs, **options)
            return scores

    received = Received()
    outer = {"streamer": received, "logits_processor": LogitsProcessorList([Asks()]), **options}
    output = decode(loaded.model, inputs, **outer) if ours else greedy(loaded.model, inputs, **outer)
    assert (received.tokens, received.ends) == (output[0].tolist(), 1)


def test_stop_strings_stop():
    loaded = load_model(CHECKPOINT)
    inputs = loaded.tokenizer("Werkzeuge zur Verwaltung von Paketen", return_tensors="pt")
    options = {"do_sample": False, "max_length": 20}
    whole = loaded.tokenizer.decode(loaded.model.generate(**inputs, **options)[0], skip_special_tokens=True)
    options |= {"stop_strings": [whole.split()[1]], "tokenizer": loaded.tokenizer}
    expected = loaded.model.generate(**inputs, **options)
    policy = Free(2, SoftmaxGap(), FixedThreshold(0.3), lossless=True)
    assert torch.equal(generate(loaded.model, **inputs, exit_policy=policy, **options), expected)
    with pytest.raises(UserError, match="tokenizer"):
        generate(loaded.model, **inputs, stop_strings=["x"])


@pytest.mark.parametrize(
    ("shape", "batch"), [*((shape, 3) for shape in FAMILIES), ("t5-tied", 1), ("bart-tied", 1)]
)
def test_lossless_returns_full_depths_scores(shape, batch):
    model, inputs = tiny_model(shape, seed=4).double(), padded_inputs(batch)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **MANY_ENDS}
    expected = decode(model, inputs, **options)
    for max_pending in (None, 1):
        ours = decode(model, inputs, lossless(max_pending), **options)
        assert torch.equal(ours.sequences, expected.sequences)
        for name in ("scores", "logits"):
            assert len(ours[name]) == len(expected[name])
            for mine, other in zip(ours[name], expected[name], strict=True):
                torch.testing.assert_close(mine, other)


class StopAtSureToken(StoppingCriteria):
    """Reads the newest score."""

    def __call__(self, input_ids, scores, **kwargs):
        return scores[-1].softmax(-1).amax(-1) > 0.4


class StopAtManyScores(StoppingCriteria):
    """Reads how many scores there are: as many as new tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([(len(scores) * int(row[-1])) % 5 == 1 for row in input_ids])


class StopAfterCalls(StoppingCriteria):
    """Keeps state: stops rows whose tokens so far had an even id seven times."""

    def __init__(self):
        self.even = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.even = self.even + (input_ids[:, -1] % 2 == 0)
        return self.even >= 3


class CountCalls:
    """A processor whose scores depend on how many tokens it has seen."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + torch.arange(scores.shape[-1]) % (2 + self.calls)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", [StopAtSureToken, StopAtManyScores, StopAfterCalls])
@pytest.mark.parametrize("batch", [1, 3])
def test_criteria_that_read_scores_or_keep_state_stop_where_generates_do(criterion, batch):
    stopped_early = False
    for seed in range(SEEDS):
        model, inputs = tiny_model(seed=seed).double(), padded_inputs(batch, seed=seed)
        options = {"return_dict_in_generate": True, "output_scores": True, "no_repeat_ngram_size": 1}
        fresh = {"stopping_criteria": StoppingCriteriaList([criterion()])}
        expected = greedy(model, inputs, max_length=LENGTH, **options, **fresh).sequences
        stopped_early |= expected.shape[1] < LENGTH or bool((expected[:, -1] == 0).any())
        for policy in (FullDepth(), lossless(), lossless(max_pending=1)):
            fresh = {"stopping_criteria": StoppingCriteriaList([criterion()])}
            assert torch.equal(decode(model, inputs, policy, **options, **fresh).sequences, expected)
    assert stopped_early


@pytest.mark.slow
def test_a_processor_that_keeps_state_sees_each_token_once():
    for seed in range(SEEDS):
        model, inputs = tiny_model(seed=seed).double(), padded_inputs(seed=seed)
        expected = greedy(
            model, inputs, max_length=LENGTH, logits_processor=LogitsProcessorList([CountCalls()])
        )
        for policy in (FullDepth(), lossless(), lossless(max_pending=1)):
            processors = LogitsProcessorList([CountCalls()])
            assert torch.equal(decode(model, inputs, policy, logits_processor=processors), expected)
            assert processors[0].calls == expected.shape[1] - 1  # the caller's own, not a copy


def test_a_processor_that_cannot_be_copied_is_named():
    class Locked(CountCalls):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    processors = LogitsProcessorList([Locked()])
    with pytest.raises(UserError, match="Locked cannot be copied"):
        decode(tiny_model(), padded_inputs(), lossless(), logits_processor=processors)
    decode(tiny_model(), padded_inputs(), logits_processor=processors)  # nothing to take back


def test_a_processor_with_slots_is_copied_or_named():
    class Slotted:
        __slots__ = ("state",)

        def __init__(self, state):
            self.state = state

        def __call__(self, input_ids, scores):
            return scores

    inputs, expected = padded_inputs(), greedy(tiny_model(), padded_inputs(), max_length=LENGTH)
    processors = LogitsProcessorList([Slotted([0])])
    assert torch.equal(decode(tiny_model(), inputs, lossless(), logits_processor=processors), expected)
    with pytest.raises(UserError, match="Slotted cannot be copied"):
        decode(tiny_model(), inputs, lossless(), logits_processor=[Slotted(threading.Lock())])


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_one_policy_object_serves_several_threads(adaptive):
    model = tiny_model().double()
    threshold = AdaptiveThreshold(0.02, max_sequences=10**6) if adaptive else EveryThirdDeep()
    policy = Free(2, SoftmaxGap(), threshold, lossless=adaptive)
    sources = [padded_inputs(seed=seed) for seed in range(8)]
    expected = [decode(model, inputs, FullDepth() if adaptive else policy) for inputs in sources]
    outputs = [None] * 8

    def work(start):
        for index in range(start, 8, 4):
            outputs[index] = decode(model, sources[index], policy)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


def test_a_view_serves_many_calls():
    model, inputs = tiny_model(), padded_inputs()
    view = view_for(model)
    outputs = [decode(model, inputs, decoder_view=view) for _ in range(2)]
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], greedy(model, inputs, max_length=LENGTH))


def test_rollback_leaves_a_finished_sequence_alone():
    """An adaptive threshold learns from a last pass, which must not take tokens back."""
    loaded = load_model(CHECKPOINT)
    threshold = AdaptiveThreshold(0.3, zeta=0.8)
    policy = Free(2, SoftmaxGap(), threshold, rollback_threshold=0.0)
    inputs, stats = loaded.tokenizer("Bibliothek", return_tensors="pt"), DecodeStats()
    output = loaded.model.generate(
        **inputs, max_length=40, custom_generate=early_exit_decode, exit_policy=policy, decode_stats=stats
    )
    assert output[0, -1] == loaded.tokenizer.eos_token_id
    assert len(stats.exit_layers[0]) == output.shape[1] - 1
