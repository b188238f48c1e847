"""Every decoder-only family against Hugging Face: tokens, deep logits, keys/values, batches."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import DeepLogits, EveryThirdDeep, never_exiting
from pairs import QUICK, covering, slow_but
from tiny_causal import (
    CAUSAL_FAMILIES,
    CAUSAL_SHAPES,
    LAYERS,
    decode_causal,
    greedy_causal,
    prompts,
    tiny_causal,
)
from transformers import DynamicCache

from models import DecodeStats, FixedThreshold, Free, SoftmaxGap, StaticExit, view_for
from models.families import VIEWS
from models.families.buffers import BufferLayer

ALWAYS = FixedThreshold(-1.0)
NEW = 12


def unpadded(inputs, row):
    """One row's prompt without its padding."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}


def precise(shape):
    """In float64, where Hugging Face can: its eager attention hides padding by what float32 cannot hold."""
    model = tiny_causal(shape)
    return model if model.config._attn_implementation == "eager" else model.double()


def new_tokens(sequences, inputs):
    return sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(("shape", "batch"), slow_but(QUICK, covering(list(CAUSAL_SHAPES), (1, 3))))
def test_never_exiting_equals_generate(shape, batch):
    model, inputs = tiny_causal(shape), prompts(batch)
    expected = greedy_causal(model, inputs)
    assert len(expected.unique()) > 5
    for name, policy in never_exiting(LAYERS).items():
        assert torch.equal(decode_causal(model, inputs, policy), expected), name


@pytest.mark.parametrize("shape", slow_but(QUICK, CAUSAL_SHAPES))
def test_each_row_of_a_batch_is_what_generate_decodes_alone(shape):
    """In float64, where ties are none; Hugging Face sees no padding."""
    model, inputs = tiny_causal(shape).double(), prompts(4)
    options = {"min_new_tokens": NEW}
    rows = [unpadded(inputs, row) for row in range(4)]
    expected = torch.cat([new_tokens(greedy_causal(model, alone, **options), alone) for alone in rows])
    for policy in never_exiting(LAYERS).values():
        assert torch.equal(new_tokens(decode_causal(model, inputs, policy, **options), inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", slow_but(QUICK, CAUSAL_FAMILIES))
def test_less_precision_stays_finite_and_follows_generate(shape, dtype):
    """Rounding may choose between tokens that are all but alike, so that only the first are compared."""
    model, inputs = tiny_causal(shape).to(dtype), prompts()
    output = decode_causal(model, inputs, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    expected = model(**unpadded(inputs, 0)).logits[0, -1].detach().float()
    assert all(logits.isfinite().all() for logits in output.logits)
    torch.testing.assert_close(
        output.logits[0][0], expected, rtol=0.1, atol=0.1 * float(expected.abs().max())
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", ["llama-tied", "gpt2-tied", "gemma3"])
def test_attention_implementations_agree_with_generate(shape, attention):
    model, inputs = tiny_causal(shape, attn_implementation=attention), prompts(2)
    assert torch.equal(decode_causal(model, inputs), greedy_causal(model, inputs))


@pytest.mark.parametrize("shape", slow_but(QUICK, CAUSAL_SHAPES))
def test_deep_logits_equal_the_full_model_on_the_same_prefix(shape):
    model, inputs = tiny_causal(shape).double(), unpadded(prompts(), 0)
    policy = DeepLogits([True, True, False, True, False, False, *[True] * 5, False, *[True] * NEW])
    sequence = decode_causal(model, inputs, policy, min_new_tokens=NEW)
    expected, before = model(sequence).logits[0], inputs["input_ids"].shape[1] - 1
    assert sorted(policy.recorded) == [2, 4, 5, 11]
    for position, logits in policy.recorded.items():
        error = (logits[0] - expected[before + position]).norm() / expected[before + position].norm()
        assert error < 1e-6


@pytest.mark.parametrize("shape", CAUSAL_SHAPES)
def test_write_kv_equals_the_caches_of_the_model_itself(shape):
    """Layer by layer, each given the states that Hugging Face's forward pass gives it; rows are padded."""
    model, inputs = precise(shape), prompts(2)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()  # without a config it keeps what lies before windows
    states = model(**inputs, position_ids=positions, cache=cache, output_hidden_states=True).hidden_states
    view = view_for(model)
    state = view.begin(None, attention_mask=inputs["attention_mask"])
    embedded = view.embed(state, inputs["input_ids"])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(embedded[real], states[0][real], rtol=0, atol=0)
    for layer in range(LAYERS):
        view.write_kv(state, states[layer], layer, layer + 1)
        assert state.lengths[layer] == 9
        for name in ("keys", "values"):
            written, expected = (getattr(kept.layers[layer], name)[:, :, :9] for kept in (state.cache, cache))
            both = (tensor.transpose(1, 2)[real] for tensor in (written, expected))
            torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "layer"), slow_but(QUICK, covering(list(CAUSAL_SHAPES), (1, 3, 5))))
def test_static_exit_equals_a_model_whose_layers_were_cut(shape, layer):
    model, inputs = tiny_causal(shape).double(), unpadded(prompts(), 0)
    static = decode_causal(model, inputs, StaticExit(layer))
    free = decode_causal(model, inputs, Free(layer, SoftmaxGap(), ALWAYS))
    view = view_for(model)
    blocks = view.decoder.h if hasattr(view.decoder, "h") else view.decoder.layers
    del blocks[layer:]
    expected = greedy_causal(model, inputs)
    assert torch.equal(static, expected) and torch.equal(free, expected)


@pytest.mark.parametrize("shape", slow_but(QUICK, CAUSAL_SHAPES))
def test_projection_onto_a_few_tokens_equals_their_logits(shape):
    model = precise(shape)
    view, tokens = view_for(model), torch.tensor([3, 50, 7])
    states = view.training_states(model(**prompts(), output_hidden_states=True))
    expected = view.project(states[-1])[..., tokens]
    torch.testing.assert_close(view.projection_onto(tokens)(states[-1]), expected)
    torch.testing.assert_close(expected, model(**prompts()).logits[..., tokens])


@pytest.mark.parametrize("shape", ["llama-tied", "mistral-window", "gpt2-tied"])
def test_caches_grow_with_long_outputs(shape, monkeypatch):
    """Buffers and positions grow twice; windows are passed."""
    monkeypatch.setattr("models.families.buffers.INITIAL_CAPACITY", 8)
    monkeypatch.setattr("models.families.causal.INITIAL_POSITIONS", 8)
    model, inputs = tiny_causal(shape).double(), prompts()
    options = {"max_new_tokens": 40, "min_new_tokens": 40}
    policy = Free(2, SoftmaxGap(), EveryThirdDeep(), lossless=True)
    ours = decode_causal(model, inputs, policy, **options)
    assert torch.equal(ours, greedy_causal(model, inputs, **options))


def test_caches_are_not_copied_at_each_step(monkeypatch):
    """The buffers of a prompt of 100 tokens are made once, and enlarged for none of 20 more."""
    model, inputs, made = tiny_causal("llama-tied", max_position_embeddings=256), prompts(1, 100), []
    grow = BufferLayer._grow
    monkeypatch.setattr(
        BufferLayer, "_grow", lambda layer, *new: made.append(layer.index) or grow(layer, *new)
    )
    decode_causal(model, inputs, max_new_tokens=20)
    assert sorted(made) == list(range(LAYERS))


def test_every_family_of_the_registry_is_tested():
    tested = {tiny_causal(shape, num_layers=1).config.model_type for shape in CAUSAL_SHAPES}
    without_encoder = {name for name, view in VIEWS.items() if not hasattr(view, "encode")}
    assert tested == without_encoder


def test_statistics_of_a_batch():
    model, inputs, stats = tiny_causal(), prompts(2), DecodeStats()
    decode_causal(model, inputs, Free(2, SoftmaxGap(), EveryThirdDeep()), stats, min_new_tokens=NEW)
    assert stats.exit_layers == [[2, 2, 6] * 4] * 2 and stats.deep_passes == 4
