"""Exits that read a deep layer's keys/values, against stock layers with Hugging Face's own cache."""

from __future__ import annotations

import copy
import functools
import itertools
import random

import pytest
import torch
from adapted_models import SHALLOW, SHORTLIST, adapted, decode_by_hugging_face, make_inputs, texts_of
from pairs import slow_but, thin
from tiny_causal import CAUSAL_FAMILIES, tiny_causal
from tiny_models import FAMILIES, tiny_model
from transformers import DynamicCache, EncoderDecoderCache

from models import (
    DecodeStats,
    Free,
    FullDepth,
    PromptLookup,
    SoftmaxGap,
    StaticExit,
    UserError,
    early_exit_decode,
    load_exit_adapter,
    make_exit_adapter,
    prepare,
    save_exit_adapter,
    trace_layers,
    view_for,
)
from models.backends.onnx.engine import KINDS
from models.backends.onnx.store import default_cache_dir
from models.families.drafts import read_drafts
from util.exit_training.objectives import exit_logits
from util.exit_training.runs import LONGEST, draw_runs, typical_runs
from util.exit_training.states import Start, compute_states, make_batch

LAYERS, KV_LAYER = 6, 4
TOKENS = 12
READING = [family for family in (*FAMILIES, *CAUSAL_FAMILIES) if family != "umt5"]
RUNS = [0, 0, 0, 3, 4, 4, 6, 6, 6, 6, 6, 11]  # where those begin that 12 tokens belong to
DAILY = ("llama-tied", "t5-tied", "gemma3", "bart-tied")
OTHERS = ("smollm3", "gpt2-tied", "opt-350m")  # that rotate by their place, number positions, project them
BY_HAND = ("llama-tied", "gpt2-tied", "t5-tied", "bart-tied")  # whose layers the reference below can call
BACKENDS = ("torch", "onnx")


@functools.cache
def model_of(family, backend="torch", precision="fp32", kind="layer"):
    loaded = adapted(family, kind, kv_layer=KV_LAYER)
    return loaded if backend == "torch" else prepare(loaded, backend, precision)


def decode(loaded, inputs, policy, stats=None, **options):
    engine = {"custom_generate": early_exit_decode, "decoder_view": loaded.view}
    options = {"max_new_tokens": TOKENS, "do_sample": False} | options
    return loaded.model.generate(**inputs, **engine, exit_policy=policy, decode_stats=stats, **options)


def forward(model, tokens):
    """Hugging Face's own pass: keywords of `begin`, (1, T, D) states after the shallow layers, keys/values of
    the deep one, and how a layer is called."""
    source = torch.arange(2, 13)[None]
    if not model.config.is_encoder_decoder:
        output = model(tokens, output_hidden_states=True, use_cache=True, cache=DynamicCache())
        held = output.past_key_values.layers[KV_LAYER - 1]
        return {}, output.hidden_states[SHALLOW], held, {}
    memory = model.get_encoder()(input_ids=source)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    output = model(
        encoder_outputs=memory,
        decoder_input_ids=tokens,
        output_hidden_states=True,
        use_cache=True,
        cache=cache,
    )
    held = output.past_key_values.self_attention_cache.layers[KV_LAYER - 1]
    given = {"encoder_hidden_states": memory[0]}
    return {"encoder_outputs": memory}, output.decoder_hidden_states[SHALLOW], held, given


def arguments_at(model, hidden, position):
    """What the family's layers are called with beside states and cache at a position."""
    if model.config.model_type == "llama":
        return {"position_embeddings": model.model.rotary_emb(hidden, torch.tensor([[position]]))}
    if model.config.model_type == "t5":
        attention = model.decoder.block[0].layer[0].SelfAttention
        return {"position_bias": attention.compute_bias(position + 1, position + 1)[:, :, -1:]}
    return {}


@torch.no_grad()
def one_by_one(model, tokens):
    """What the exit reads of every token: its block, fed token by token, after the deep layer's keys/values
    of what precedes the token's run. (1, T, D)"""
    _, hidden, held, given = forward(model, tokens)
    block, made = model.exit_adapter.block, []
    for position, start in enumerate(RUNS[: tokens.shape[1]]):
        if position == start:
            own = DynamicCache()
            own.update(held.keys[:, :, :start], held.values[:, :, :start], LAYERS)
            both = EncoderDecoderCache(own, DynamicCache()) if given else own
        state = hidden[:, position : position + 1]
        state = state + model.exit_adapter.entry(state)
        output = block(state, cache=both, **given, **arguments_at(model, state, position))
        made.append(output[0] if isinstance(output, tuple) else output)
    return torch.cat(made, dim=1)


@torch.inference_mode()
def in_decoding(loaded, tokens):
    """The same of a view that runs shallow layers token by token, and deep ones at the end of each run."""
    view, arguments = loaded.view, forward(loaded.model, tokens)[0]
    if not arguments:
        arguments = view.read(tokens, torch.ones_like(tokens)).arguments
    state, made, waiting = view.begin(None, **arguments), [], []
    for position in range(tokens.shape[1]):
        hidden = view.run_layers(state, view.embed(state, tokens[:, position : position + 1]), 0, SHALLOW)
        made.append(view.read_exit(state, hidden, SHALLOW).clone())
        waiting.append(hidden)
        if position + 1 == tokens.shape[1] or RUNS[position + 1] > position:
            view.run_layers(state, torch.cat(waiting, dim=1), SHALLOW, view.num_layers)
            waiting = []
    return torch.cat(made, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("family", BY_HAND)
def test_an_exit_reads_exact_keys_and_values_before_its_run_and_its_own_within(family):
    tokens = torch.randint(2, 97, (1, len(RUNS)), generator=torch.Generator().manual_seed(3))
    loaded = model_of(family)
    expected = one_by_one(loaded.model, tokens)
    for backend in BACKENDS:
        torch.testing.assert_close(
            in_decoding(model_of(family, backend), tokens), expected, atol=1e-4, rtol=1e-4
        )
    view = view_for(loaded.model)
    with torch.no_grad():
        state = view.begin(None, **forward(loaded.model, tokens)[0])
        hidden = view.run_layers(state, view.embed(state, tokens), 0, SHALLOW)
        view.run_layers(state, hidden, SHALLOW, view.num_layers)
        at_once = read_drafts(view, state, hidden, torch.tensor([RUNS]))
    torch.testing.assert_close(at_once, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", slow_but(DAILY, thin(READING, [*DAILY, *OTHERS, "mbart"])))
def test_lossless_decoding_returns_the_frozen_models_output(family):
    loaded, stats = model_of(family), DecodeStats()
    policies = (
        FullDepth(),
        Free(SHALLOW, SoftmaxGap(), 0.05, lossless=True),
        Free(SHALLOW, SoftmaxGap(), -1.0, lossless=True, max_pending=3),
    )
    for batch in (1, 3):
        inputs = make_inputs(family, batch)
        expected = decode_by_hugging_face(loaded.model, inputs, max_new_tokens=TOKENS)
        for policy in policies:
            assert torch.equal(decode(loaded, inputs, policy, stats), expected), policy
        assert 0 < stats.deep_passes < stats.steps
    lookup = Free(SHALLOW, SoftmaxGap(), 0.05, lossless=True, lookup=PromptLookup(4, shortest=1))
    inputs = make_inputs(family)
    expected = decode_by_hugging_face(loaded.model, inputs, max_new_tokens=TOKENS)
    assert torch.equal(decode(loaded, inputs, lookup, lookup_ids=inputs["input_ids"]), expected)


@pytest.mark.parametrize("family", slow_but(("t5-tied", "gemma3"), thin(READING, [*DAILY, *OTHERS])))
def test_tokens_are_torchs_on_onnx(family):
    modules, graphs = model_of(family), model_of(family, "onnx")
    policies = [StaticExit(SHALLOW), Free(SHALLOW, SoftmaxGap(), 0.05, max_pending=4)]
    policies += [
        Free(SHALLOW, SoftmaxGap(), 0.05, **{option: True}) for option in ("lossless", "copy_skipped")
    ]
    for batch in (1, 3):
        inputs = make_inputs(family, batch)
        for policy in policies:
            assert torch.equal(decode(graphs, inputs, policy), decode(modules, inputs, policy)), policy


@pytest.mark.slow
def test_graphs_of_one_exit_do_not_serve_its_weights_behind_another_layer(tmp_path):
    """SmolLM3's third layer rotates nothing, the fourth does, whichever weights they have."""
    tokens, weights = torch.randint(2, 97, (1, len(RUNS)), generator=torch.Generator().manual_seed(3)), None
    for kv_layer in (3, 4):
        loaded = adapted("smollm3", kv_layer=kv_layer)
        weights = weights or copy.deepcopy(loaded.model.exit_adapter.state_dict())
        loaded.model.exit_adapter.load_state_dict(weights)
        prepare(loaded, "onnx")  # traces what both share
        if not (tmp_path / KINDS).exists():
            (tmp_path / KINDS).symlink_to(default_cache_dir() / KINDS)
        graphs = prepare(loaded, "onnx", cache_dir=tmp_path)
        expected = in_decoding(loaded, tokens)
        torch.testing.assert_close(in_decoding(graphs, tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_layer", [None, KV_LAYER])
def test_behind_proposals_that_it_was_not_asked_about_the_exit_says_the_same_on_both_backends(kv_layer):
    """Its keys/values of them are there all the same, in ONNX Runtime by the graph that ran them."""
    modules, inputs = adapted("llama-tied", kv_layer=kv_layer), make_inputs("llama-tied")
    said = []
    for loaded in (modules, prepare(modules, "onnx")):
        stats, lookup = DecodeStats(), PromptLookup(4, shortest=1)
        policy = Free(SHALLOW, SoftmaxGap(), 0.05, lossless=True, lookup=lookup)
        decode(loaded, inputs, policy, stats, max_new_tokens=40)
        assert stats.proposed_tokens > 4
        said.append(torch.tensor([value for row in stats.confidences for value in row]))
    torch.testing.assert_close(said[1], said[0], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["w8", "w8+int8"])
def test_lossless_is_full_depth_of_the_same_precision(precision):
    for family in ("llama-tied", "t5-tied"):
        loaded = model_of(family, "onnx", precision)
        for seed in range(4):
            inputs = make_inputs(family, 2, seed)
            expected = decode(loaded, inputs, FullDepth())
            policy = Free(SHALLOW, SoftmaxGap(), -1.0, lossless=True, max_pending=2 + seed)
            assert torch.equal(decode(loaded, inputs, policy), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_batch_decode_as_alone(backend):
    """Also where buffers grow while tokens wait."""
    loaded = model_of("llama-tied", backend)
    inputs = make_inputs("llama-tied", 3)
    policy = Free(SHALLOW, SoftmaxGap(), -1.0, max_pending=70)  # more than buffers hold at first
    together = decode(loaded, inputs, policy, max_new_tokens=50)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        said = decode(loaded, alone, policy, max_new_tokens=50)[0]
        assert torch.equal(said[said != 0], together[row][together[row] != 0])


def test_a_trace_shows_what_the_exit_says_to_a_token_alone():
    loaded = model_of("llama-tied")
    inputs, stats = make_inputs("llama-tied"), DecodeStats()
    output = decode(loaded, inputs, Free(SHALLOW, SoftmaxGap(), 2.0), stats)  # nobody waits
    trace = trace_layers(loaded.model, inputs["input_ids"], inputs["attention_mask"], output)
    said = trace.confidences[0, :, SHALLOW - 1]
    assert len(said) == output.shape[1] - inputs["input_ids"].shape[1]
    measured = torch.tensor(stats.confidences).flatten()
    torch.testing.assert_close(said, measured, atol=1e-5, rtol=1e-4)


def test_it_is_saved_and_loaded_with_the_adapter(tmp_path):
    loaded, inputs = model_of("llama-tied"), make_inputs("llama-tied")
    save_exit_adapter(loaded.model, tmp_path)
    again = tiny_causal("llama-tied")
    adapter = load_exit_adapter(again, str(tmp_path))
    assert adapter.kv_layer == KV_LAYER
    policy = Free(SHALLOW, SoftmaxGap(), -1.0)
    expected = decode(loaded, inputs, policy)
    options = {"custom_generate": early_exit_decode, "exit_policy": policy, "max_new_tokens": TOKENS}
    assert torch.equal(again.generate(**inputs, **options, do_sample=False), expected)


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "gpt2-tied", "t5-tied", "bart-tied"])
def test_a_row_of_a_batch_waits_in_runs_of_its_own(family, tmp_path):
    """As what the exit is taught on; above, there is one row."""
    loaded = adapted(family, shortlist=SHORTLIST, kv_layer=4)
    texts, causal = texts_of(family), not loaded.model.config.is_encoder_decoder
    start = Start(None if causal else 0, with_prompt=causal)
    files = compute_states(loaded.view, texts, [SHALLOW, 3], tmp_path, start)
    rows = [files.row(number) for number in range(len(texts))]
    batch, alone = make_batch(loaded.view, rows, random.Random(5)), []
    assert not torch.equal(batch.run_starts[0], batch.run_starts[1])
    for place, row in enumerate(rows):
        one = make_batch(loaded.view, [row])
        one.run_starts = batch.run_starts[place : place + 1, : one.run_starts.shape[1]]
        alone.append(exit_logits(loaded.view, one))
    torch.testing.assert_close(exit_logits(loaded.view, batch), torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_runs_are_as_long_as_tokens_wait():
    lengths = [50, 7, 31] * 40
    starts, longer = draw_runs(lengths, random.Random(0)), 0
    for row, length in zip(starts.tolist(), lengths, strict=True):
        runs = [len(list(run)) for _, run in itertools.groupby(row[:length])]
        begins = [0, *itertools.accumulate(runs)]
        assert row[:length] == [begin for begin, run in zip(begins, runs, strict=False) for _ in range(run)]
        longer += max(runs) > LONGEST
    assert 0 < longer < len(lengths) / 4
    assert typical_runs([6, 3]).tolist() == [[0, 0, 0, 0, 4, 4]] * 2


@pytest.mark.parametrize(
    ("family", "kind", "kv_layer", "message"),
    [
        ("llama-tied", "projection", 4, "attends to nothing"),
        ("llama-tied", "layer", SHALLOW, "must lie in 3..6"),
        ("t5-tied", "attention", 7, "must lie in 3..6"),
        ("umt5", "layer", 4, "relative biases"),
        ("llama-tied", "layer", 4.0, "must lie in 3..6.* got 4.0"),
        ("llama-tied", "layer", "4", "must lie in 3..6.* got '4'"),
    ],
)
def test_what_no_exit_can_read_is_refused(family, kind, kv_layer, message):
    model = tiny_causal(family) if family == "llama-tied" else tiny_model(family)
    with pytest.raises(UserError, match=message):
        make_exit_adapter(view_for(model), kind, SHALLOW, kv_layer=kv_layer)
