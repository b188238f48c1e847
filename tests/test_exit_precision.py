"""Exit adapters in fewer bits than their model: drafts may change, lossless output does not."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapted_models import SHALLOW, SHORTLIST, adapted, decode_by_hugging_face, make_inputs
from pairs import covering, slow_but, thin

from models import DecodeStats, FixedThreshold, Free, FullDepth, PromptLookup, SoftmaxGap, UserError, prepare
from models.choices import EXACT_PRECISIONS, EXIT_PRECISIONS, MIXED
from scripts import sweep
from util.backend import run_by_backend
from util.backend_arguments import BackendArguments
from util.environment import environment
from util.evaluation.identity import identify_model

TOKENS = 16
FAMILIES = ("llama-tied", "t5-tied", "gpt2-tied", "bart-tied", "gemma2")
EXACT = slow_but([("llama-tied", "w8")], thin(itertools.product(FAMILIES, EXIT_PRECISIONS[1:]), [
    ("t5-tied", "w8"), ("gpt2-tied", "w4"), ("bart-tied", "int8"), ("gemma2", "w8")]))  # fmt: skip
PRECISIONS = slow_but([("w8", "w4")], covering(EXACT_PRECISIONS, EXIT_PRECISIONS))


def with_exit(family, precision="fp32", exit_precision=None, kv_layer=4):
    loaded = adapted(family, "layer", SHORTLIST, kv_layer)
    return prepare(loaded, "onnx", precision, exit_precision=exit_precision)


def free(threshold=0.02, **options):
    return Free(SHALLOW, SoftmaxGap(), FixedThreshold(threshold), **options)


def decode(loaded, inputs, policy, stats=None):
    limits = {"max_new_tokens": TOKENS, "do_sample": False}
    return loaded.generate(**inputs, **limits, exit_policy=policy, decode_stats=stats)


@pytest.mark.parametrize(("family", "exit_precision"), EXACT)
def test_lossless_in_fp32_is_hugging_faces_output_however_the_exit_is_rounded(family, exit_precision):
    loaded, stats = with_exit(family, exit_precision=exit_precision), DecodeStats()
    for seed in range(3):
        inputs = make_inputs(family, 1 + 2 * (seed == 2), seed)
        expected = decode_by_hugging_face(loaded.model, inputs, max_new_tokens=TOKENS)
        for policy in (free(lossless=True), free(-1.0, lossless=True, max_pending=3)):
            assert torch.equal(decode(loaded, inputs, policy, stats), expected)
        assert 0 < stats.deep_passes < stats.steps
        if len(expected) == 1:
            policy = free(lossless=True, lookup=PromptLookup(4))
            assert torch.equal(decode(loaded, inputs, policy), expected)


@pytest.mark.parametrize(("precision", "exit_precision"), PRECISIONS)
def test_lossless_is_full_depth_of_the_models_precision(precision, exit_precision):
    plain = prepare(adapted("llama-tied", "layer", SHORTLIST, 4), "onnx", precision)
    loaded = with_exit("llama-tied", precision, exit_precision)
    for seed in range(3):
        inputs = make_inputs("llama-tied", 1 + seed % 2, seed)
        expected = decode(plain, inputs, FullDepth())
        assert torch.equal(decode(loaded, inputs, FullDepth()), expected)
        assert torch.equal(decode(loaded, inputs, free(lossless=True, max_pending=4)), expected)


@pytest.mark.parametrize("kv_layer", [None, 4])
def test_the_exits_products_alone_are_rounded(kv_layer):
    engine = with_exit("llama-tied", "fp32", "w8", kv_layer).view.engine
    entry = [("exit-entry", 0)] if kv_layer else []
    exits = [("exit-head", 0), (engine.layer_kind, engine.view.num_layers), *entry]
    others = [("head", 0), *((engine.layer_kind, index) for index in range(engine.view.num_layers))]
    for pieces, absent, present in ((exits, "MatMul", "MatMulNBits"), (others, "MatMulNBits", "MatMul")):
        for piece in pieces:
            operators = {node.op_type for node in engine._piece(*piece).graph}
            assert present in operators and absent not in operators, piece


@pytest.mark.parametrize("precision", ["w8", "int8"])
def test_an_exit_in_8_bits_says_nearly_what_the_modules_say(precision):
    loaded = with_exit("llama-tied", exit_precision=precision)
    states = torch.randn(64, 32)
    with torch.no_grad():
        exact = loaded.view.eager.predict(states, SHALLOW)
        rounded = loaded.view.predict(states, SHALLOW)
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    last = loaded.view.num_layers
    torch.testing.assert_close(
        loaded.view.predict(states, last), loaded.view.eager.predict(states, last), atol=1e-5, rtol=1e-4
    )


def test_both_precisions_of_a_model_lie_beside_each_other():
    """Prepared in turn from one cache, neither is the other's."""
    states = torch.randn(8, 32)
    said = [with_exit("llama-tied", exit_precision=one).view.predict(states, SHALLOW)
            for one in (None, "w8", None, "w8")]  # fmt: skip
    assert torch.equal(said[0], said[2]) and torch.equal(said[1], said[3])
    assert not torch.equal(said[0], said[1])


def test_records_name_the_exits_precision():
    for one, named in ((None, {}), ("w8", {"exit_precision": "w8"})):
        loaded = with_exit("llama-tied", exit_precision=one)
        assert loaded.precisions == {"precision": "fp32", **named}
        found = environment(loaded)
        assert {name: found[name] for name in found if name.endswith("precision")} == loaded.precisions
    assert prepare(loaded, "torch").precisions == {"precision": "fp32"}
    loaded.tokenizer = object()  # which this identity does not tell apart
    assert "exit_precision" in loaded.precisions.keys() & precisions_in_identity(loaded)


def precisions_in_identity(loaded):
    import util.evaluation.identity as identity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "hash_tokenizer", lambda tokenizer: "")
        return identify_model(loaded).keys()


def test_what_has_no_exit_of_its_own_precision_is_refused():
    without, loaded = prepare(adapted("llama-tied"), "torch"), adapted("llama-tied")
    del without.model.exit_adapter
    cases = [
        (without, {"exit_precision": "w8"}, "this model has none"),
        (loaded, {"exit_precision": MIXED}, "is none of fp32, w8, w4, int8"),
        (loaded, {"backend": "torch", "exit_precision": "w8"}, "options of backend onnx, not of torch"),
    ]
    for model, options, complaint in cases:
        with pytest.raises(UserError, match=complaint):
            prepare(model, **options)
    with pytest.raises(UserError, match="leave --backend torch out"):
        BackendArguments(backend="torch", exit_precision="w8")


def test_a_sweep_of_models_without_an_exit_refuses_it(tmp_path, capsys):
    flags = ["--calm", "checkpoints/debian-t5-calm", "--methods", "CALM", "--dataset_name", "debian_de_en"]
    with pytest.raises(SystemExit):
        sweep.main([*flags, "--backend", "onnx", "--exit_precision", "w8", "--output_dir", str(tmp_path)])
    assert "this model has none" in capsys.readouterr().err


def test_a_flag_asks_for_it_and_for_onnx():
    fast = run_by_backend(adapted("llama-tied"), BackendArguments(exit_precision="w8"))
    assert fast.backend == "onnx" and fast.exit_precision == "w8" and fast.precision == "fp32"
    half = adapted("llama-tied")
    half.model.to(torch.bfloat16)
    with pytest.raises(UserError, match="float32 is what is exported"):
        run_by_backend(half, BackendArguments(exit_precision="w8"))
