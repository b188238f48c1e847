"""Exits of frozen models: what an adapter says, what it leaves alone, on both backends."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from adapted_models import (
    SHALLOW,
    SHORTLIST,
    Only,
    adapted,
    as_plain_model,
    decode_by_hugging_face,
    make_inputs,
)
from pairs import covering, slow_but, thin
from safetensors.torch import load_file, save_file
from tiny_causal import CAUSAL_FAMILIES, tiny_causal
from tiny_models import FAMILIES, tiny_model
from transformers import DynamicCache, LogitsProcessorList

from models import (
    AutoExit,
    Calm,
    DecodeStats,
    FixedThreshold,
    Free,
    FullDepth,
    SoftmaxGap,
    StaticExit,
    UserError,
    attach_exit_adapter,
    early_exit_decode,
    make_exit_adapter,
    prepare,
    trace_layers,
    view_for,
)
from models.choices import EXACT_PRECISIONS, EXIT_ADAPTERS
from models.exit_adapter_files import WEIGHTS_NAME, load_exit_adapter, save_exit_adapter
from models.exit_heads import ExitConfig
from models.loading import LoadedModel

TOKENS = 12
EVERY_FAMILY = (*FAMILIES, *CAUSAL_FAMILIES)
NORMLESS = ("bart-tied", "marian")
KINDS_OF_FAMILIES = [
    (family, kind)
    for family in EVERY_FAMILY
    for kind in EXIT_ADAPTERS
    if not (family in NORMLESS and kind == "norm")
]
IN_TURN = [  # each family with one kind or two, each kind with several families
    *((family, EXIT_ADAPTERS[turn % 3]) for turn, family in enumerate(EVERY_FAMILY)),
    *(("mt5", "norm"), ("llama-tied", "norm"), ("gpt2-tied", "attention"), ("t5-tied", "attention")),
]
WITH_SHORTLIST = ("t5-tied", "bart-tied", "llama-tied", "gemma2", "gpt2-tied")
ON_BACKENDS = [*((family, "torch") for family in WITH_SHORTLIST), ("bart-tied", "onnx"), ("gemma2", "onnx")]
ON_BACKENDS = thin(itertools.product(WITH_SHORTLIST, ("torch", "onnx")), ON_BACKENDS)
IN_PRECISIONS = covering(("t5-tied", "bart-tied", "llama-tied", "opt-350m"), EXACT_PRECISIONS)
TAUGHT = slow_but(IN_TURN[::3], thin(KINDS_OF_FAMILIES, IN_TURN))
SEVERAL_ON_ONNX = [
    ("t5-tied", "attention"),
    ("bart-tied", "layer"),
    ("gemma3", "layer"),
    ("opt-350m", "projection"),
]
ON_ONNX = slow_but(SEVERAL_ON_ONNX[:1], thin(KINDS_OF_FAMILIES, SEVERAL_ON_ONNX))
BACKENDS = ("torch", "onnx")


@functools.cache
def model_of(family, kind="layer", backend="torch", precision="fp32", listed=False):
    loaded = adapted(family, kind, SHORTLIST if listed else None)
    return loaded if backend == "torch" else prepare(loaded, backend, precision)


def decode(loaded, inputs, policy, stats=None, **options):
    options = {"max_new_tokens": TOKENS, "do_sample": False} | options
    engine = {"custom_generate": early_exit_decode, "decoder_view": loaded.view}
    return loaded.model.generate(**inputs, **engine, exit_policy=policy, decode_stats=stats, **options)


def gap(threshold, **options):
    return Free(SHALLOW, SoftmaxGap(), FixedThreshold(threshold), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), TAUGHT)
def test_an_exit_says_what_the_same_layers_say_as_a_model(family, kind):
    loaded = model_of(family, kind)
    inputs = make_inputs(family, 2)
    expected = decode_by_hugging_face(as_plain_model(loaded), inputs, max_new_tokens=TOKENS)
    assert torch.equal(decode(loaded, inputs, StaticExit(SHALLOW)), expected)
    assert torch.equal(decode(loaded, inputs, gap(-1.0)), expected)  # every token exits


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), TAUGHT)
def test_lossless_decoding_returns_the_frozen_models_output(family, kind):
    loaded, stats = model_of(family, kind), DecodeStats()
    for batch in (1, 3):
        inputs = make_inputs(family, batch)
        expected = decode_by_hugging_face(loaded.model, inputs, max_new_tokens=TOKENS)
        assert torch.equal(decode(loaded, inputs, FullDepth()), expected)
        assert torch.equal(decode(loaded, inputs, gap(0.05, lossless=True)), expected)
        policy = gap(-1.0, lossless=True, max_pending=3)
        assert torch.equal(decode(loaded, inputs, policy, stats), expected)
        assert 0 < stats.deep_passes < stats.steps


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), ON_ONNX)
def test_tokens_are_torchs_on_onnx(family, kind):
    modules, graphs = model_of(family, kind), model_of(family, kind, "onnx")
    policies = (StaticExit(SHALLOW), gap(0.05), gap(0.05, lossless=True), gap(0.05, copy_skipped=True))
    for batch in (1, 3):
        inputs = make_inputs(family, batch)
        for policy in policies:
            assert torch.equal(decode(graphs, inputs, policy), decode(modules, inputs, policy)), policy


@pytest.mark.parametrize("family", ["t5-tied", "bart-tied", "llama-tied"])
def test_a_shortlist_follows_a_model_that_changes(family):
    loaded, inputs = adapted(family, shortlist=SHORTLIST), make_inputs(family)
    options = {"max_new_tokens": TOKENS, "logits_processor": LogitsProcessorList([Only(SHORTLIST)])}

    def load_others():
        own = loaded.model.state_dict()
        others = {name: weight.roll(1, 0) for name, weight in own.items() if "exit_adapter" not in name}
        loaded.model.load_state_dict(own | others)

    before = loaded.generate(**inputs, exit_policy=StaticExit(SHALLOW), do_sample=False, **options)
    for change in (loaded.model.double, load_others):
        change()
        expected = decode_by_hugging_face(as_plain_model(loaded), inputs, **options)
        output = loaded.generate(**inputs, exit_policy=StaticExit(SHALLOW), do_sample=False, **options)
        assert torch.equal(output, expected)
    assert not torch.equal(output, before)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), ON_BACKENDS)
def test_a_shortlist_holds_what_the_exit_may_say(family, backend):
    loaded = model_of(family, backend=backend, listed=True)
    inputs = make_inputs(family)
    only = LogitsProcessorList([Only(SHORTLIST)])
    expected = decode_by_hugging_face(
        as_plain_model(model_of(family)), inputs, max_new_tokens=TOKENS, logits_processor=only
    )
    with torch.no_grad():
        loaded.model.exit_adapter.others.bias.fill_(-50.0)
    loaded = loaded if backend == "torch" else prepare(model_of(family, listed=True), backend)
    assert torch.equal(decode(loaded, inputs, StaticExit(SHALLOW)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_off_the_shortlist_share_the_probability_of_one_logit(backend):
    loaded = adapted("llama-tied", "layer", SHORTLIST)
    view = loaded.view if backend == "torch" else prepare(loaded).view
    states = torch.randn(3, 32)
    shares = view.predict(states, SHALLOW).softmax(-1)
    adapter = loaded.model.exit_adapter
    normalized = adapter.norm(states + states @ adapter.projection.weight.T + adapter.projection.bias)
    listed = normalized @ loaded.model.lm_head.weight[SHORTLIST].T
    logits = torch.cat([listed, normalized @ adapter.others.weight.T + adapter.others.bias], dim=-1)
    expected = logits.softmax(-1)
    torch.testing.assert_close(shares[:, SHORTLIST], expected[:, :-1], atol=1e-5, rtol=1e-4)
    rest = [token for token in range(shares.shape[1]) if token not in SHORTLIST]
    torch.testing.assert_close(shares[:, rest].sum(-1), expected[:, -1], atol=1e-5, rtol=1e-4)
    assert torch.equal(shares[:, rest].min(-1).values, shares[:, rest].max(-1).values)


@pytest.mark.parametrize(("family", "precision"), slow_but(["t5-tied"], IN_PRECISIONS))
def test_lossless_is_full_depth_of_the_same_precision(family, precision):
    loaded = model_of(family, "layer", "onnx", precision, listed=True)
    for seed in range(4):
        inputs = make_inputs(family, 1 + seed % 2, seed)
        full = decode(loaded, inputs, FullDepth(), max_new_tokens=20)
        for threshold in (-1.0, 0.1, 0.5):
            policy = gap(threshold, lossless=True, max_pending=3)
            assert torch.equal(decode(loaded, inputs, policy, max_new_tokens=20), full)


def test_an_exit_that_has_decoded_can_be_taught():
    loaded = adapted("llama-tied", "layer", SHORTLIST)
    decode(loaded, make_inputs("llama-tied"), gap(0.05, lossless=True))
    loaded.view.predict(torch.randn(3, 32), SHALLOW).logsumexp(-1).sum().backward()
    assert loaded.model.exit_adapter.projection.weight.grad.count_nonzero()


@pytest.mark.slow
def test_sampling_with_drafts_off_a_shortlist_has_the_distribution_of_full_depth():
    """Of the second token, over many samples: its frequencies under lossless drafts are the model's own."""
    loaded = model_of("llama-tied", listed=True)
    inputs = {name: rows.expand(400, -1) for name, rows in make_inputs("llama-tied").items()}
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "min_new_tokens": 3}
    with torch.no_grad():
        logits = loaded.model(**make_inputs("llama-tied")).logits[0, -1]
        logits[1] = -torch.inf  # the end, which min_new_tokens excludes
    drawn = [
        decode(loaded, inputs, gap(-1.0, lossless=True), **options)[:, inputs["input_ids"].shape[1]]
        for _ in range(5)
    ]
    counts = torch.bincount(torch.cat(drawn), minlength=97).double()
    expected = logits.softmax(-1).double() * counts.sum()
    common = expected > 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    assert chi_square < common.sum().item() + 4 * (2 * common.sum().item()) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_adapter_cannot_do_is_refused_by_name(backend):
    loaded = model_of("llama-tied", backend=backend)
    inputs = make_inputs("llama-tied")
    with pytest.raises(UserError, match="CALM tests many layers"):
        decode(loaded, inputs, Calm(SoftmaxGap(), FixedThreshold(0.5)))
    with pytest.raises(UserError, match="stands after 2"):
        decode(loaded, inputs, Free(3, SoftmaxGap(), FixedThreshold(0.5)))
    with pytest.raises(UserError, match="StaticExit: layer 3: the exit adapter stands after 2"):
        decode(loaded, inputs, StaticExit(3))
    with pytest.raises(UserError, match="stands after 2"):
        decode(loaded, inputs, AutoExit([2, 3], SoftmaxGap()))
    assert torch.equal(decode(loaded, inputs, StaticExit(6)), decode(loaded, inputs, FullDepth()))
    cache = DynamicCache()
    options = {"return_dict_in_generate": True, "cache": cache}
    first = decode(loaded, inputs, FullDepth(), **options)
    given = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    with pytest.raises(UserError, match="holds nothing of the exit adapter"):
        decode(loaded, given, gap(0.1), cache=first.cache)


@pytest.mark.parametrize("family", ["t5-tied", "llama-tied", "gemma3", "opt-350m"])
def test_a_trace_shows_what_the_exit_says(family):
    """Along an output all of whose tokens took the exit, the trace finds these very tokens there."""
    loaded, inputs = model_of(family), make_inputs(family)
    output = decode(loaded, inputs, StaticExit(SHALLOW), eos_token_id=None)
    trace = trace_layers(loaded.model, **inputs, sequences=output)
    assert torch.equal(trace.tokens[0, :, SHALLOW - 1], output[0, -trace.tokens.shape[1] :])


def test_layers_of_an_exit_count_its_own():
    loaded, stats = model_of("llama-tied"), DecodeStats()
    decode(loaded, make_inputs("llama-tied"), StaticExit(SHALLOW), stats, min_new_tokens=TOKENS)
    assert stats.average_layers == SHALLOW + 1 and stats.exit_layers == [[SHALLOW] * TOKENS]
    decode(model_of("llama-tied", "norm"), make_inputs("llama-tied"), StaticExit(SHALLOW), stats)
    assert stats.average_layers == SHALLOW


def test_the_exits_own_products_are_quantized():
    engine = model_of("llama-tied", "layer", "onnx", "w8", listed=True).view.engine
    operators = [node.op_type for node in engine._piece("exit-head", 0).graph]
    assert operators.count("MatMulNBits") == 2 and "MatMul" not in operators  # map and projection
    engine = prepare(adapted("llama-tied", kv_layer=4), "onnx", "w8").view.engine
    operators = [node.op_type for node in engine._piece("exit-entry", 0).graph]
    assert operators.count("MatMulNBits") == 1 and "MatMul" not in operators


def test_an_untaught_exit_starts_from_the_layer_that_follows():
    """Layer and map leave states as the next layer does; the norm is the final one."""
    model = tiny_causal()
    adapter = make_exit_adapter(view_for(model), "layer", SHALLOW)
    attach_exit_adapter(model, adapter)
    inputs = make_inputs("llama-tied", 2)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[SHALLOW + 1]
        expected = model.lm_head(model.model.norm(hidden))[:, -1]
    stats = DecodeStats()
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    loaded = LoadedModel(model, None, ExitConfig())
    found = decode(loaded, inputs, StaticExit(SHALLOW), stats, **options).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_exit_is_made_for_a_prepared_model_which_is_prepared_again():
    modules = adapted("llama-tied")
    del modules.model.exit_adapter
    fast = prepare(modules)
    attach_exit_adapter(fast.model, make_exit_adapter(fast.view, "layer", SHALLOW, kv_layer=4))
    with pytest.raises(UserError, match="prepare it again"):
        decode(fast, make_inputs("llama-tied"), gap(0.1))
    inputs, fast = make_inputs("llama-tied"), prepare(fast)
    expected = decode_by_hugging_face(modules.model, inputs, max_new_tokens=TOKENS)
    assert torch.equal(decode(fast, inputs, gap(0.1, lossless=True)), expected)


@pytest.mark.parametrize("kind", ["lora", "norm"])
def test_what_cannot_be_made_is_refused(kind):
    complaint = "is none of layer, attention, projection, norm" if kind == "lora" else "has no final norm"
    with pytest.raises(UserError, match=complaint):
        make_exit_adapter(view_for(tiny_model("bart-tied")), kind, 1)
    with pytest.raises(UserError, match=r"must lie in 1\.\.5, got 6"):
        make_exit_adapter(view_for(tiny_causal()), "layer", 6)
    with pytest.raises(UserError, match=r"must lie in 1\.\.5, got '2'"):
        make_exit_adapter(view_for(tiny_causal()), "layer", "2")


WRONG_SHORTLISTS = {
    "once": torch.tensor([5, 5, 9]),
    r"in 0\.\.96": torch.tensor([5, 6, 97]),
    "not torch.float32 of shape": torch.tensor([1.5, 3.7, 6.0]),
}


@pytest.mark.parametrize("complaint", WRONG_SHORTLISTS)
def test_shortlists_of_what_are_no_tokens_are_refused(complaint, tmp_path):
    model, wrong = tiny_causal(num_layers=2), WRONG_SHORTLISTS[complaint]
    with pytest.raises(UserError, match=complaint):
        make_exit_adapter(view_for(model), "projection", 1, wrong)
    attach_exit_adapter(model, make_exit_adapter(view_for(model), "projection", 1, torch.arange(3)))
    save_exit_adapter(model, tmp_path)
    path = tmp_path / WEIGHTS_NAME
    save_file(load_file(path) | {"shortlist": wrong}, path)
    with pytest.raises(UserError, match=f"{WEIGHTS_NAME}: .*{complaint}"):
        load_exit_adapter(tiny_causal(num_layers=2), str(tmp_path))
