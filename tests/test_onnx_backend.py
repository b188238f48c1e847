"""The ONNX Runtime backend against torch: tokens of every policy, bits in windows and batches, refusals."""

from __future__ import annotations

import functools
import itertools
import os

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import LENGTH, MANY_ENDS, EveryThirdDeep, Recorder
from tiny_models import FAMILIES, padded_inputs, tiny_model
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

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
    load_model,
    prepare,
)
from models.backends.onnx import engine as engine_module
from models.backends.onnx import tracing
from models.backends.onnx.engine import KINDS
from models.backends.onnx.store import Store, default_cache_dir
from models.backends.onnx.windows import Biases
from models.choices import EXACT_PRECISIONS
from models.families import VIEWS
from models.families.t5 import T5View

# LOSSLESS_EXAMPLES=5000 pytest tests/test_onnx_backend.py -k lossless  decodes as many sequences.
MAX_EXAMPLES = int(os.environ.get("LOSSLESS_EXAMPLES", 40))
EACH_FAMILY = [
    family if family in ("t5-tied", "bart-tied") else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES
]


def loaded(model):
    return LoadedModel(model, None, ExitConfig())


def perturbed(family, seed=0):
    """A tiny model whose norms and biases differ from each other."""
    model = tiny_model(family, seed=seed)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return model


def policies():
    gap, third = SoftmaxGap(), EveryThirdDeep()
    return {
        "full": FullDepth(),
        "static": StaticExit(3),
        "calm": Calm(gap, FixedThreshold(0.1)),
        "calm at layers": Calm(gap, FixedThreshold(0.1), exit_layers=[2, 5]),
        "free": Free(2, gap, third),
        "free copying": Free(2, gap, third, copy_skipped=True),
        "adaptive": Free(2, gap, AdaptiveThreshold(0.1)),
        "lossless": Free(2, gap, third, lossless=True),
        "lossless in short windows": Free(2, gap, FixedThreshold(-1.0), lossless=True, max_pending=2),
    }


def decode(model, inputs, policy, stats=None, **options):
    options = {"max_length": LENGTH, "do_sample": False} | options
    return model.generate(**inputs, exit_policy=policy, decode_stats=stats, **options)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_policy_decodes_torchs_tokens(family):
    torch_model = loaded(perturbed(family))
    onnx_model = prepare(torch_model)
    for batch, name in itertools.product((1, 3), policies()):
        inputs, ours, theirs = padded_inputs(batch, seed=batch), DecodeStats(), DecodeStats()
        expected = decode(torch_model, inputs, policies()[name], theirs, **MANY_ENDS)
        output = decode(onnx_model, inputs, policies()[name], ours, **MANY_ENDS)  # afresh: some learn
        assert torch.equal(output, expected), (name, batch)
        assert ours.exit_layers == theirs.exit_layers and ours.layer_calls == theirs.layer_calls, name


def test_a_rollback_forgets_what_was_taken_back():
    torch_model, stats = loaded(perturbed("t5-tied")), DecodeStats()
    policy = Free(2, SoftmaxGap(), EveryThirdDeep(), rollback_threshold=2.0)
    expected = decode(torch_model, padded_inputs(), policy, stats)
    assert stats.rollbacks > 0
    assert torch.equal(decode(prepare(torch_model), padded_inputs(), policy), expected)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_long_outputs_outgrow_their_buffers(family):
    torch_model = loaded(perturbed(family))
    onnx_model = prepare(torch_model)
    length = 60 if family in ("bart-tied", "mbart", "pegasus", "marian") else 150  # positions they have
    for name in ("full", "free"):
        expected = decode(torch_model, padded_inputs(), policies()[name], max_length=length)
        assert expected.shape[1] > 50
        output = decode(onnx_model, padded_inputs(), policies()[name], max_length=length)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_prompts_masks_and_caches_are_torchs(family):
    torch_model = loaded(perturbed(family))
    onnx_model = prepare(torch_model)
    prompt = torch.tensor([[0, 0, 5, 9], [0, 7, 8, 9]])
    options = {"decoder_input_ids": prompt, "decoder_attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4])}
    expected = decode(torch_model, padded_inputs(2), FullDepth(), **options)
    assert torch.equal(decode(onnx_model, padded_inputs(2), FullDepth(), **options), expected)
    caches = []
    for model in (torch_model, onnx_model):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = decode(model, padded_inputs(2), FullDepth(), cache=cache, max_length=6)
        whole = decode(
            model, padded_inputs(2), FullDepth(), cache=cache, decoder_input_ids=first, max_length=12
        )
        caches.append((whole, cache))
    (expected, theirs), (whole, ours) = caches
    assert torch.equal(whole, expected)
    for part in ("self_attention_cache", "cross_attention_cache"):
        pairs = zip(getattr(ours, part).layers, getattr(theirs, part).layers, strict=True)
        for own, other in pairs:
            torch.testing.assert_close(own.keys, other.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own.values, other.values, rtol=1e-4, atol=1e-4)


def test_arguments_of_generate_are_obeyed():
    torch_model = loaded(perturbed("t5-tied"))
    onnx_model, policy = prepare(torch_model), policies()["lossless"]
    for options in (
        {"repetition_penalty": 1.3},
        {"min_length": 10, **MANY_ENDS},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 1},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 5},
        {"do_sample": True, "temperature": 0.7},
    ):
        outputs = []
        for model in (torch_model, onnx_model, onnx_model):  # the second call of onnx finds it prepared
            torch.manual_seed(3)
            outputs.append(decode(model, padded_inputs(2), policy, **options))
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2]), options
    recorder = Recorder()
    output = decode(onnx_model, padded_inputs(), policy, streamer=recorder)
    assert recorder.tokens == output[0].tolist() and recorder.ended
    ours, theirs = (
        decode(model, padded_inputs(2), policy, return_dict_in_generate=True, output_scores=True)
        for model in (onnx_model, torch_model)
    )
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), rtol=1e-3, atol=1e-3)


# Bits.


def states_of(view, inputs, hidden, windows, rows=slice(None)):
    """Hidden states, keys, values and logits of some rows of a batch, their tokens decoded in windows."""
    chosen = {name: tensor[rows] for name, tensor in inputs.items()}
    with torch.inference_mode():
        if view.eager.exports_encoder:
            source = view.encode(**chosen)
        else:  # torch's, whose bits depend on the batch
            source = BaseModelOutput(view.encode(**inputs)[0][rows])
        state = view.begin(None, encoder_outputs=source, attention_mask=chosen["attention_mask"])
        made, start = [], 0
        for new in windows:
            made.append(view.run_layers(state, hidden[rows, start : start + new], 0, view.num_layers))
            start += new
        states = torch.cat(made, 1)
        logits = torch.cat([view.predict(part, view.num_layers) for part in made], 1)
    buffers = [buffer[:, :, :start].clone() for pair in state.buffers.pairs for buffer in pair]
    return [states, logits, *buffers]


@pytest.mark.parametrize("precision", EXACT_PRECISIONS)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_token_has_the_same_bits_alone_in_windows_and_in_batches(family, precision):
    view = prepare(loaded(perturbed(family)), precision=precision).view
    inputs, tokens = padded_inputs(3), 36
    torch.manual_seed(1)
    hidden = torch.randn(3, tokens, view.model.config.hidden_size)
    alone = [states_of(view, inputs, hidden, [1] * tokens, slice(row, row + 1)) for row in range(3)]
    for windows in ([36], [2] * 18, [3] * 12, [4, 8, 6, 9, 9], [1, 5, 1, 11, 17, 1], [17, 19], [33, 3]):
        for ours, *theirs in zip(states_of(view, inputs, hidden, windows), *alone, strict=True):
            assert torch.equal(ours, torch.cat(theirs)), windows


@settings(max_examples=MAX_EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    threshold=st.sampled_from([-1.0, 0.02, 0.1, 0.5]),
    layer=st.integers(1, 5),
    max_pending=st.sampled_from([None, 1, 3, 6]),
    precision=st.sampled_from(["w8", "int8"]),
)
def test_lossless_in_8_bits_is_full_depth_in_8_bits(seed, batch, threshold, layer, max_pending, precision):
    model, inputs = eight_bits(precision), padded_inputs(batch, seed=seed)
    policy = Free(layer, SoftmaxGap(), FixedThreshold(threshold), lossless=True, max_pending=max_pending)
    options = {"max_length": 24, **MANY_ENDS}
    expected = decode(model, inputs, FullDepth(), **options)
    assert torch.equal(decode(model, inputs, policy, **options), expected)


@functools.cache
def eight_bits(precision):
    return prepare(loaded(perturbed("t5-tied")), precision=precision)


# Precision.


@pytest.mark.parametrize(("precision", "bits"), [("w8", 8), ("w4", 4), ("int8", 8)])
@pytest.mark.parametrize("family", ["t5-tied", "bart-tied"])
def test_quantized_products_are_near_the_exact_ones(family, precision, bits):
    torch_model = loaded(perturbed(family))
    view, exact = prepare(torch_model, precision=precision).view, prepare(torch_model).view
    hidden = torch.randn(3, 6, view.model.config.hidden_size)
    for ours, theirs in zip(
        states_of(view, padded_inputs(3), hidden, [6]), states_of(exact, padded_inputs(3), hidden, [6]),
        strict=True,
    ):  # fmt: skip
        error = (ours - theirs).norm() / theirs.norm()
        assert 0 < error < 16 * 0.5**bits  # rounding is half a step of 2 / 2**bits, over 6 layers


QUANTIZED_PRODUCTS = ("MatMulNBits", "MatMulIntegerToFloat")


@pytest.mark.parametrize("precision", ["w8", "w4", "int8"])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_product_with_weights_is_quantized(family, precision):
    engine = prepare(loaded(perturbed(family)), precision=precision).view.engine
    kinds = [kind for kind in engine_module.PIECES if kind != "encoder" or engine.view.exports_encoder]
    for kind in kinds:
        graph = engine._piece(kind, 0).graph
        operators = [node.op_type for node in graph]
        assert not {"MatMul", "FusedMatMul", "Gemm"} & {*operators}
        assert sum(name in QUANTIZED_PRODUCTS for name in operators) == {
            "head": 1,
            "memory": 2,
            "keys-values": 2,
        }.get(kind, 7 if family in ("mt5", "umt5") else 6)


# What is kept on disk.


@pytest.fixture
def cache_dir(tmp_path):
    """A cache that has graphs, but no model's weights."""
    for precision in ("fp32", "int8"):
        prepare(loaded(tiny_model()), precision=precision)
    (tmp_path / KINDS).symlink_to(default_cache_dir() / KINDS)
    return tmp_path


def refuse_to_trace(*args):
    raise AssertionError("It was exported again.")


def test_graphs_are_exported_once_for_all_weights(cache_dir, monkeypatch):
    monkeypatch.setattr(tracing, "trace", refuse_to_trace)
    for seed in (1, 2, 1):
        other = loaded(perturbed("t5-tied", seed))
        expected = decode(other, padded_inputs(), FullDepth())
        fast = prepare(other, cache_dir=cache_dir)
        assert torch.equal(decode(fast, padded_inputs(), FullDepth()), expected)


def test_a_second_run_makes_nothing(cache_dir, monkeypatch):
    torch_model = loaded(tiny_model())
    expected = decode(prepare(torch_model, cache_dir=cache_dir), padded_inputs(), FullDepth())
    monkeypatch.setattr(Store, "_write", refuse_to_trace)
    again = decode(prepare(torch_model, cache_dir=cache_dir), padded_inputs(), FullDepth())
    assert torch.equal(again, expected)


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing", "no sums"])
def test_damaged_files_are_made_again(cache_dir, damage, caplog):
    torch_model = loaded(tiny_model())
    expected = decode(torch_model, padded_inputs(), FullDepth())
    decode(prepare(torch_model, cache_dir=cache_dir), padded_inputs(), FullDepth())
    parts = ("exact-layer-2", "encoder-0")
    stored = [path for path in cache_dir.rglob("graph.onnx") if path.parent.name in parts]
    assert len(stored) == 2
    for path in stored:
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:100])
        elif damage == "foreign":
            path.write_text("mine")
        elif damage == "missing":
            path.unlink()
        else:
            (path.parent / "sums.json").unlink()
    again = decode(prepare(torch_model, cache_dir=cache_dir), padded_inputs(), FullDepth())
    assert torch.equal(again, expected)
    assert "made again" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"onnx_cache_dir.*file"):
        decode(prepare(loaded(tiny_model()), cache_dir=tmp_path / "file"), padded_inputs(), FullDepth())


def test_weights_lie_outside_of_graphs_where_they_are_mapped():
    fast = prepare(load_model("checkpoints/debian-t5-free"))
    model = fast.view.engine._piece("exact-layer", 0)
    large = [
        value.const_value for value in model.graph.initializers.values() if value.const_value.nbytes > 1024
    ]
    assert large and all(isinstance(tensor, ir.ExternalTensor) for tensor in large)


# Refusals.


def test_what_onnx_cannot_run_is_refused_by_name():
    torch_model = loaded(tiny_model())
    with pytest.raises(UserError, match="bfloat16"):
        prepare(loaded(tiny_model().bfloat16()))
    with pytest.raises(UserError, match="backend: 'onx'"):
        prepare(torch_model, "onx")
    with pytest.raises(UserError, match="precision: 'w7'"):
        prepare(torch_model, precision="w7")
    with pytest.raises(UserError, match="precision w8 needs backend onnx"):
        prepare(torch_model, "torch", "w8")
    fast = prepare(torch_model)
    bidirectional = Free(2, SoftmaxGap(), EveryThirdDeep(), causal_catch_up=False)
    with pytest.raises(UserError, match="causal_catch_up"):
        decode(fast, padded_inputs(), bidirectional)
    with pytest.raises(UserError, match="precision fp32, w8 or int8"):
        decode(prepare(torch_model, precision="w4"), padded_inputs(), policies()["lossless"])


def test_an_export_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    class Mistaken(T5View):
        def embed_source(self, token_ids):
            return super().embed_source(token_ids) * 2

    monkeypatch.setitem(VIEWS, "t5", Mistaken)
    with pytest.raises(UserError, match="differs from its modules"):
        prepare(loaded(tiny_model()), cache_dir=tmp_path)


def test_a_model_that_was_replaced_is_not_run_by_its_old_graphs():
    fast = prepare(loaded(tiny_model()))
    fast.model = tiny_model(seed=1)
    with pytest.raises(UserError, match="prepare"):
        decode(fast, padded_inputs(), FullDepth())


def test_a_cache_of_several_calls_is_refused():
    fast, cache = prepare(loaded(tiny_model())), EncoderDecoderCache(DynamicCache(), DynamicCache())
    decode(fast, padded_inputs(), FullDepth(), cache=cache, max_length=6)
    layer = cache.self_attention_cache.layers[2]
    layer.keys, layer.values = layer.keys[:, :, :2], layer.values[:, :, :2]
    with pytest.raises(UserError, match="not of one call"):
        decode(fast, padded_inputs(), FullDepth(), cache=cache, decoder_input_ids=torch.zeros(1, 6).long())


def test_calls_with_other_options_are_prepared_anew():
    torch_model = loaded(tiny_model())
    fast, inputs = prepare(torch_model), padded_inputs(2)
    for length in (5, 9, 5):
        for penalty in (1.0, 3.0):
            options = {"max_length": length, "repetition_penalty": penalty}
            expected = torch_model.model.generate(
                **inputs, cache=EncoderDecoderCache(DynamicCache(), DynamicCache()), **options
            )
            assert torch.equal(decode(fast, inputs, FullDepth(), **options), expected)
    torch_model.model.generation_config.repetition_penalty = 3.0  # a change is noticed
    expected = decode(fast, inputs, FullDepth(), repetition_penalty=3.0, max_length=9)
    assert torch.equal(decode(fast, inputs, FullDepth(), max_length=9), expected)


def test_padding_is_inferred_as_generate_does():
    fast, inputs = prepare(loaded(tiny_model())), padded_inputs(3)
    expected = decode(fast, inputs, FullDepth())
    assert torch.equal(decode(fast, {"input_ids": inputs["input_ids"]}, FullDepth()), expected)


def test_biases_are_those_of_the_distance():
    biases = np.arange(8, dtype=np.float32).reshape(2, 4)  # heads, distance
    rows = np.zeros((1, 2, 2, 4), np.float32)
    Biases({0: torch.from_numpy(biases)}, 2, 4).fill(0, rows, 1)
    assert rows[0, :, 0, :2].tolist() == [[1, 0], [5, 4]]  # the query at position 1 sees keys 0 and 1
    assert rows[0, :, 1, :3].tolist() == [[2, 1, 0], [6, 5, 4]]
