"""Decoder-only families on ONNX Runtime: tokens of torch and of Hugging Face, bits in windows and batches."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import MAX_EXAMPLES, WINDOWED, check_bits_in_windows, policies
from pairs import covering, slow_but, thin
from tiny_causal import CAUSAL_FAMILIES, CAUSAL_SHAPES, LAYERS, greedy_causal, prompts, tiny_causal
from transformers import DynamicCache

from models import (
    DecodeStats,
    FixedThreshold,
    Free,
    FullDepth,
    PromptLookup,
    SoftmaxGap,
    StaticExit,
    UserError,
    prepare,
)
from models.backends.onnx import grouping
from models.backends.onnx.engine import KINDS
from models.backends.onnx.store import default_cache_dir
from models.backends.onnx.windows import Tables
from models.choices import EXACT_PRECISIONS, MIXED
from models.exit_heads import ExitConfig
from models.families.gpt2 import GPT2View
from models.loading import LoadedModel

TOKENS = 12
DAILY = ["llama-tied"]
# "gpt2-tied" scales its scores by the layer, so that each layer is a graph of its own: only two are exported.
DEPTHS = {"gpt2-tied": 2}
FAMILIES = [{"gpt2-tied": "gpt2-untied"}.get(family, family) for family in CAUSAL_FAMILIES]
SHAPES = slow_but(DAILY, thin(CAUSAL_SHAPES, [*FAMILIES, "gpt2-tied"]))
EACH_FAMILY = slow_but(DAILY, FAMILIES)
# With windows, with norms that shift, with heads side by side: every graph decodes full depth anyway.
EACH_KIND = slow_but(DAILY, thin(FAMILIES, ["llama-tied", "gemma2", "gpt2-untied", "pythia"]))
IN_WINDOWS = slow_but([("llama-tied", "fp32")], covering(FAMILIES, EXACT_PRECISIONS))


@functools.cache
def on_torch(shape):
    return LoadedModel(tiny_causal(shape, DEPTHS.get(shape, LAYERS)), None, ExitConfig())


@functools.cache
def on_onnx(shape, precision="fp32"):
    return prepare(on_torch(shape), precision=precision)


def decode(model, inputs, policy, stats=None, **options):
    options = {"max_new_tokens": TOKENS, "do_sample": False} | options
    return model.generate(**inputs, exit_policy=policy, decode_stats=stats, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_depth_is_hugging_faces_greedy(shape):
    for batch in (1, 3):
        inputs = prompts(batch, seed=batch)
        assert torch.equal(
            decode(on_onnx(shape), inputs, FullDepth()), greedy_causal(on_torch(shape).model, inputs)
        )


@pytest.mark.parametrize("family", EACH_KIND)
def test_every_policy_decodes_torchs_tokens(family):
    for batch, name in itertools.product((1, 3), policies()):
        inputs, ours, theirs = prompts(batch, seed=batch), DecodeStats(), DecodeStats()
        expected = decode(on_torch(family), inputs, policies()[name], theirs)
        output = decode(on_onnx(family), inputs, policies()[name], ours)
        assert torch.equal(output, expected), (name, batch)
        assert ours.exit_layers == theirs.exit_layers and ours.layer_calls == theirs.layer_calls, name


def states_of(view, inputs, hidden, windows, rows):
    """Layer outputs, logits and keys/values of tokens that come in windows after a prompt."""
    ids, mask = inputs["input_ids"][rows], inputs["attention_mask"][rows]
    with torch.inference_mode():
        state = view.begin(None, **view.read(ids, mask).arguments)
        view.run_layers(state, view.embed(state, ids), 0, view.num_layers)
        made, start, prompt = [], 0, ids.shape[1]
        for new in windows:
            made.append(view.run_layers(state, hidden[rows, start : start + new], 0, view.num_layers))
            start += new
        logits = torch.cat([view.predict(part, view.num_layers) for part in made], 1)
    held = [part[:, :, prompt:].clone() for pair in state.held_by_all() for part in pair]
    return [torch.cat(made, 1), logits, *held]


@pytest.mark.parametrize(("family", "precision"), IN_WINDOWS)
def test_a_token_has_the_same_bits_alone_in_windows_and_in_batches(family, precision, monkeypatch):
    monkeypatch.setattr(grouping, "MANY", 20)  # tokens, after which windows take heads in groups, too
    view, inputs = on_onnx(family, precision).view, prompts(3)
    torch.manual_seed(1)
    hidden = torch.randn(3, WINDOWED, view.model.config.hidden_size)
    check_bits_in_windows(lambda windows, rows: states_of(view, inputs, hidden, windows, rows))


@pytest.mark.slow
@settings(max_examples=MAX_EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    threshold=st.sampled_from([-1.0, 0.02, 0.1, 0.5]),
    layer=st.integers(1, 5),
    max_pending=st.sampled_from([None, 1, 3, 6]),
    tokens=st.sampled_from([None, 2, 6]),
    precision=st.sampled_from(EXACT_PRECISIONS),
)
def test_lossless_is_full_depth(seed, batch, threshold, layer, max_pending, tokens, precision):
    model, inputs = on_onnx("llama-tied", precision), prompts(1 if tokens else batch, seed=seed)
    options = {"lookup": PromptLookup(tokens, shortest=1) if tokens else None, "max_pending": max_pending}
    policy = Free(layer, SoftmaxGap(), FixedThreshold(threshold), lossless=True, **options)
    options = {"max_new_tokens": 20, "eos_token_id": [1, 7, 11, 30]}
    expected = decode(model, inputs, FullDepth(), **options)
    assert torch.equal(decode(model, inputs, policy, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "inside"),
    [("llama-tied", True), ("neox-serial", True), ("llama-untied", False), ("pythia", False)],
)
def test_attention_rotates_what_it_can(shape, inside):
    """Heads of a multiple of 16, and as many rotated: else the layer rotates itself."""
    graph = on_onnx(shape).view.engine._piece("exact-layer", 0).graph
    (attention,) = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert ("do_rotary" in attention.attributes) == inside
    assert ("Neg" in [node.op_type for node in graph]) != inside  # of half of each head


def test_windows_begin_where_rows_number_their_tokens():
    tables = Tables.of({0: (torch.arange(24.0).view(2, 3, 4).repeat(1, 1, 2),) * 2}, 3)
    assert tables.places(2, 2, 3).tolist() == [[0, 1], [3, 4]]
    assert tables.arrays["cosines.0"][4].tolist() == [16, 17, 18, 19]  # of the second row's second token


def test_the_mixed_precision_reads_prompts_in_int8_and_decodes_in_w8():
    inputs, fast = prompts(3), on_onnx("llama-tied", MIXED)
    mixed, others = fast.view, {name: on_onnx("llama-tied", name).view for name in ("int8", "w8")}
    prompt, windows = inputs["input_ids"], (4, 1, 2)

    def begin(view):
        return view.begin(None, **view.read(prompt, inputs["attention_mask"]).arguments)

    with torch.inference_mode():
        state, read = begin(mixed), begin(others["int8"])
        for begun, view in ((state, mixed), (read, others["int8"])):
            view.run_layers(begun, view.embed(begun, prompt[:, :-1]), 0, LAYERS)
        # What was read lies where the other view takes it from; from here on both decode the same.
        decoded, pairs = begin(others["w8"]), read.held_by_all()
        decoded.reserve(len(prompt), 64)
        for layer, (keys, values) in enumerate(pairs):
            decoded.write(layer, keys, values)
        for new in windows:
            hidden = torch.randn(3, new, mixed.model.config.hidden_size)
            ours, theirs = (
                view.run_layers(begun, hidden, 0, LAYERS)
                for view, begun in ((mixed, state), (others["w8"], decoded))
            )
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", EACH_KIND)
def test_every_product_with_weights_is_quantized(family):
    engine = on_onnx(family, "int8").view.engine
    for kind in (engine.layer_kind, "keys-values", "head"):
        operators = [node.op_type for node in engine._piece(kind, 0).graph]
        assert "MatMulIntegerToFloat" in operators, kind
        assert not {"MatMul", "FusedMatMul", "Gemm"} & {*operators}, kind


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_cache_is_filled_and_continued(family):
    model, inputs = on_onnx(family), prompts(2)
    endless = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}  # a row that ends early would be padded
    whole = decode(model, inputs, FullDepth(), **endless)
    options = {"return_dict_in_generate": True, "min_new_tokens": 5, "max_new_tokens": 5}
    first = decode(model, inputs, FullDepth(), **options, cache=DynamicCache())
    expected = greedy_causal(on_torch(family).model, inputs, **options, past_key_values=DynamicCache())
    for ours, theirs in zip(first.cache.layers, expected.past_key_values.layers, strict=True):
        seen = min(theirs.keys.shape[2], 3)  # Hugging Face drops what windows do not reach
        torch.testing.assert_close(ours.keys[0, :, -seen:], theirs.keys[0, :, -seen:], atol=1e-4, rtol=1e-4)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    given = {"input_ids": first.sequences, "attention_mask": mask, "cache": first.cache}
    rest = {"min_new_tokens": TOKENS - 5, "max_new_tokens": TOKENS - 5}
    assert torch.equal(decode(model, given, FullDepth(), **rest), whole)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_given_embeddings_are_the_prompt(family):
    torch_model, inputs = on_torch(family), prompts(1)
    embedded = torch_model.model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
    for policy in (FullDepth(), StaticExit(2)):
        assert torch.equal(decode(on_onnx(family), given, policy), decode(torch_model, given, policy))


def test_buffers_of_one_generation_serve_another_with_other_padding():
    model = on_onnx("llama-tied")
    for batch, seed in ((1, 1), (2, 5), (1, 3), (2, 4)):
        inputs = prompts(batch, seed=seed)
        assert torch.equal(
            decode(model, inputs, FullDepth()), greedy_causal(on_torch("llama-tied").model, inputs)
        )
        bare = {name: tensor[:, 3:] for name, tensor in prompts(1, seed=seed).items()}  # without padding
        assert torch.equal(
            decode(model, bare, FullDepth()), greedy_causal(on_torch("llama-tied").model, bare)
        )


@pytest.mark.slow
def test_an_export_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    def mistaken(self, index, length):
        return -torch.arange(length)[None].float()

    on_onnx("gpt2-untied")
    (tmp_path / KINDS).symlink_to(default_cache_dir() / KINDS)  # it is in no graph, but in what one reads
    monkeypatch.setattr(GPT2View, "distance_bias", mistaken)
    with pytest.raises(UserError, match="differs from its modules"):
        prepare(LoadedModel(tiny_causal("gpt2-untied"), None, ExitConfig()), cache_dir=tmp_path)
