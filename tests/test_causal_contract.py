"""What `generate` promises for decoder-only models: caches, embeddings, streamers, outputs; or a refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from decoding_cases import EveryThirdDeep, Recorder
from pairs import QUICK, covering, slow_but, thin
from tiny_causal import CAUSAL_FAMILIES, LAYERS, decode_causal, greedy_causal, prompts, tiny_causal
from transformers import AutoTokenizer, DynamicCache, set_seed
from transformers.generation import GenerateDecoderOnlyOutput

from models import Free, SoftmaxGap, StaticExit, UserError, generate, view_for
from models.decode_stats import DecodeStats
from models.families import llama
from models.generation import Generation

WINDOWED = ("mistral-window", "gemma2", "gemma3")


def lossless():
    return Free(2, SoftmaxGap(), EveryThirdDeep(), lossless=True)


def precise(shape="llama-tied"):
    """In float64, where Hugging Face's attention hides padding by what it can hold."""
    model = tiny_causal(shape)
    return model if model.config._attn_implementation == "eager" else model.double()


def extended(inputs, sequences):
    """The sequences as prompts, with the mask of the prompts that they began with."""
    mask = inputs["attention_mask"]
    new = mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])
    return {"input_ids": sequences, "attention_mask": torch.cat([mask, new], 1)}


@pytest.mark.parametrize(("shape", "batch"), slow_but(QUICK, covering(CAUSAL_FAMILIES, (1, 3))))
def test_a_cache_is_filled_and_continued(shape, batch):
    """As if there had been one call; by the engine and, from the same cache, by Hugging Face."""
    model, inputs, cache = precise(shape), prompts(batch), DynamicCache()
    whole = greedy_causal(model, inputs, max_new_tokens=12, min_new_tokens=12)
    first = decode_causal(model, inputs, lossless(), cache=cache, max_new_tokens=5, min_new_tokens=5)
    held = cache.get_seq_length()
    assert 9 <= held <= 13
    theirs = copy.deepcopy(cache)
    prompt, options = extended(inputs, first), {"max_new_tokens": 7, "min_new_tokens": 7}
    output = decode_causal(model, prompt, lossless(), cache=cache, return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, whole) and output.cache is cache
    assert torch.equal(greedy_causal(model, prompt, cache=theirs, **options), whole)


@pytest.mark.parametrize("shape", ["llama-tied", "gpt2-tied", "opt-350m"])
def test_ids_may_leave_out_what_the_cache_holds(shape):
    """Where the mask says so, as in `generate`."""
    model, inputs, cache = precise(shape), prompts(2), DynamicCache()
    first = greedy_causal(model, inputs, cache=cache, max_new_tokens=5)
    held, prompt = cache.get_seq_length(), extended(inputs, first)
    rest = {"input_ids": first[:, held:], "attention_mask": prompt["attention_mask"]}
    expected = greedy_causal(model, rest, cache=copy.deepcopy(cache))
    assert torch.equal(decode_causal(model, rest, lossless(), cache=cache), expected)


@pytest.mark.parametrize("shape", WINDOWED)
def test_a_cache_that_has_dropped_tokens_is_refused(shape):
    model, inputs = tiny_causal(shape), prompts()
    cache = DynamicCache(config=model.config)
    prompt = extended(inputs, greedy_causal(model, inputs, cache=cache))
    with pytest.raises(UserError, match=r"dropped all but 4 of \d+ tokens"):
        decode_causal(model, prompt, cache=cache)


def test_other_caches_are_refused():
    with pytest.raises(UserError, match=r"DynamicCache\(\)"):
        decode_causal(tiny_causal(), prompts(), cache=DynamicCache(offloading=True))


@pytest.mark.parametrize(
    "shape", slow_but(QUICK, thin(CAUSAL_FAMILIES, ["llama-tied", "gemma2", "gpt2-tied", "opt-350m"]))
)
def test_embeddings_may_be_the_prompt(shape):
    model, inputs = precise(shape), prompts(2)
    soft = model.get_input_embeddings()(inputs["input_ids"]) * 1.1  # of no token
    given = {"inputs_embeds": soft, "attention_mask": inputs["attention_mask"]}
    expected = greedy_causal(model, given)
    assert expected.shape[1] == 12  # without the prompt, as there are no ids of it
    for policy in (None, StaticExit(LAYERS), lossless()):
        assert torch.equal(decode_causal(model, given, policy), expected)
    with_ids = given | {"input_ids": inputs["input_ids"]}
    assert torch.equal(decode_causal(model, with_ids, lossless()), greedy_causal(model, with_ids))


def test_embeddings_of_another_length_than_the_ids_are_refused():
    model, inputs = tiny_causal(), prompts()
    soft = model.get_input_embeddings()(inputs["input_ids"])
    given = inputs | {"input_ids": inputs["input_ids"][:, 2:], "inputs_embeds": soft}
    with pytest.raises(UserError, match="inputs_embeds has 9 tokens and input_ids 7"):
        decode_causal(model, given)


@pytest.mark.parametrize("shape", ["llama-tied", "gpt2-tied", "pythia", "opt-tied"])
def test_given_positions_hold(shape):
    model, inputs = precise(shape), prompts(2)
    positions = (inputs["attention_mask"].cumsum(-1) * 2).clamp(max=30)
    given = inputs | {"position_ids": positions}
    expected = greedy_causal(model, given)
    assert not torch.equal(expected, greedy_causal(model, inputs))
    assert torch.equal(decode_causal(model, given, lossless()), expected)


@pytest.mark.parametrize("shape", slow_but(QUICK, CAUSAL_FAMILIES))
def test_a_rolled_back_state_goes_on_as_if_nothing_had_been(shape):
    model, inputs = precise(shape), prompts(2)
    view, ids = view_for(model), inputs["input_ids"]
    with torch.no_grad():
        plain, rolled = (view.begin(None, attention_mask=inputs["attention_mask"]) for _ in range(2))
        view.run_layers(rolled, view.embed(rolled, ids), 0, LAYERS)
        rolled.truncate(4)
        assert rolled.lengths == [4] * LAYERS
        view.run_layers(plain, view.embed(plain, ids[:, :4]), 0, LAYERS)
        after = [
            view.run_layers(state, view.embed(state, ids[:, 4:6]), 0, LAYERS) for state in (plain, rolled)
        ]
    real = inputs["attention_mask"][:, 4:6].bool()
    torch.testing.assert_close(after[0][real], after[1][real])


def test_streamers_see_the_prompt_and_verified_tokens_once():
    recorder = Recorder()
    output = decode_causal(precise(), prompts(), lossless(), streamer=recorder)
    assert recorder.tokens == output[0].tolist() and recorder.ended


def test_a_prompt_may_be_the_start_token_alone_or_padded_on_the_right():
    """The latter is nonsense, of which `generate` warns, but the same nonsense."""
    model, inputs = precise(), prompts(2)
    assert torch.equal(decode_causal(model, {}, lossless()), greedy_causal(model, {}))
    flipped = {name: tensor.flip(-1) for name, tensor in inputs.items()}
    assert torch.equal(decode_causal(model, flipped, lossless()), greedy_causal(model, flipped))


def test_stop_strings_end_the_output_as_in_generate():
    model, inputs = precise(), prompts()
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/debian-t5-free")
    third = tokenizer.convert_ids_to_tokens(int(decode_causal(model, inputs)[0, 11])).strip("▁")
    options = {"stop_strings": [third], "tokenizer": tokenizer, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert third and expected.shape[1] <= 12
    assert torch.equal(generate(model, **inputs, exit_policy=lossless(), **options), expected)


def test_output_object_is_that_of_decoder_only_models():
    model, inputs = tiny_causal(), prompts(2)
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    options |= {"repetition_penalty": 1.3}
    ours, theirs = (
        decode_causal(model, inputs, lossless(), **options),
        greedy_causal(model, inputs, **options),
    )
    assert type(ours) is type(theirs) is GenerateDecoderOnlyOutput
    for name in ("scores", "logits"):
        for mine, expected in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    assert ours.cache.get_seq_length() == theirs.cache.get_seq_length()


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 15},
        {"max_new_tokens": 5},
        {"min_new_tokens": 9},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.5},
        {"forced_eos_token_id": 7},
        {"begin_suppress_tokens": list(range(3, 60))},
        {"exponential_decay_length_penalty": (2, 1.9)},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_prepared_calls_are_those_of_generate(options):
    """One object serves prompts of all lengths; a second call of each takes what the first prepared."""
    model = tiny_causal().double()
    lists = {name: value for name, value in options.items() if isinstance(value, (list, tuple))}
    model.generation_config.update(eos_token_id=list(range(1, 60)), **lists)  # where they are plain settings
    calls = {"do_sample": False} | {name: value for name, value in options.items() if name not in lists}
    calls |= {} if "max_length" in options else {"max_new_tokens": options.get("max_new_tokens", 12)}
    generation = Generation(view_for(model))
    for seed in (1, 2):
        for length in (5, 9):
            inputs = prompts(3, length, seed)
            set_seed(3)
            expected = model.generate(**inputs, **calls)
            set_seed(3)
            assert torch.equal(generation(**inputs, **calls), expected)
    alone = {"max_new_tokens", "no_repeat_ngram_size"}  # what counts nothing from the prompt's end
    expected = 0 if "num_return_sequences" in options else 1 if {*options} <= alone else 2
    assert len(generation.prepared) == expected


def test_a_mask_is_inferred_as_in_generate():
    model, inputs = tiny_causal().double(), prompts(3)
    generation = Generation(view_for(model))
    expected = greedy_causal(model, {"input_ids": inputs["input_ids"]})
    for _ in range(2):
        assert torch.equal(generation(inputs["input_ids"], do_sample=False, max_new_tokens=12), expected)


@pytest.mark.parametrize("shape", ["gpt2-tied", "opt-tied", "opt-350m"])
def test_more_tokens_than_positions_are_refused(shape):
    """To the token: 64 positions, the last of which the newest of 65 tokens does not need."""
    model, inputs = tiny_causal(shape), prompts(1, 60)
    full = {"input_ids": inputs["input_ids"][:, 3:], "attention_mask": inputs["attention_mask"][:, 3:]}
    for given, new in ((full, 8), (inputs, 8)):  # padding takes no position
        options = {"min_new_tokens": new, "max_new_tokens": new}
        assert decode_causal(model, given, **options).shape[1] == given["input_ids"].shape[1] + new
        more = {"min_new_tokens": new + 1, "max_new_tokens": new + 1}
        with pytest.raises(UserError, match="64 positions"):
            decode_causal(model, given, **more)


def with_config(**settings):
    model = tiny_causal()
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: with_config(_attn_implementation="flash_attention_2"), "'sdpa' or 'eager'"),
        (lambda: with_config(use_bidirectional_attention=True), "both directions"),
        (
            lambda: with_config(layer_types=["linear_attention"] * LAYERS),
            "layers of linear_attention, whose tokens cannot be taken back",
        ),
        (
            lambda: tiny_causal(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "type dynamic change with the length",
        ),
    ],
    ids=["flash", "bidirectional", "linear attention", "dynamic rope"],
)
def test_what_a_view_cannot_serve_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        view_for(model())


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_scaled_rotary_positions_equal_generate(rope):
    settings = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0}
    if rope != "linear":
        settings["original_max_position_embeddings"] = 16
    if rope == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model, inputs = tiny_causal(rope_parameters=settings).double(), prompts(2)
    expected = greedy_causal(model, inputs, max_new_tokens=20)
    assert torch.equal(decode_causal(model, inputs, lossless(), max_new_tokens=20), expected)


def test_a_keyword_that_nothing_reads_is_refused():
    with pytest.raises((UserError, ValueError), match="token_type_ids"):
        decode_causal(tiny_causal(), prompts(), token_type_ids=torch.zeros(1, 9, dtype=torch.long))


def test_layers_without_positions_and_with_a_table_of_their_own_differ():
    """Else the shapes of SmolLM3 and Gemma 3 would prove nothing."""
    smollm, gemma = tiny_causal("smollm3"), tiny_causal("gemma3")
    assert sorted({layer.self_attn.use_rope for layer in smollm.model.layers}) == [0, 1]
    view, stats = view_for(gemma), DecodeStats()
    assert isinstance(view, llama.Gemma3View) and set(view.kinds) == {"full_attention", "sliding_attention"}
    decode_causal(gemma, prompts(), stats=stats)
    state = view.begin(None)
    view.number_tokens(state, 9)
    local, wide = (state.tables[kind][0][:, :9] for kind in ("sliding_attention", "full_attention"))
    assert not torch.allclose(local, wide)
