"""Every exit policy on decoder-only models: against a slow reference, Hugging Face, and full depth."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import EveryThirdDeep
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import QUICK, covering, slow_but, thin
from slow_free import SlowFree
from test_lossless import MAX_EXAMPLES
from tiny_causal import CAUSAL_FAMILIES, LAYERS, decode_causal, greedy_causal, prompts, tiny_causal
from transformers import DynamicCache, set_seed

from models import (
    AdaptiveThreshold,
    Calm,
    DecayingThreshold,
    DecodeStats,
    FixedThreshold,
    Free,
    LoadedModel,
    MetaClassifier,
    ShortlistGap,
    SoftmaxGap,
    StaticExit,
    UserError,
    prepare,
    trace_layers,
    view_for,
)
from models.confidence import softmax_gap
from models.exit_heads import ExitConfig, attach_exit_heads

NEW, ENDS = 12, [1]
ALWAYS, NEVER = FixedThreshold(-1.0), FixedThreshold(2.0)
FORMS = {  # of FREE, each with the threshold that some tokens pass
    "plain": {},
    "capped": {"max_pending": 2},
    "copying": {"copy_skipped": True},
    "rollback": {"rollback_threshold": 1.0},
    "both directions": {"causal_catch_up": False},
}
TURNS = covering(CAUSAL_FAMILIES, list(FORMS))
KINDS = thin(CAUSAL_FAMILIES, ["llama-tied", "gemma2", "gpt2-tied", "opt-350m"])  # of layers and positions
WINDOWED = ("mistral-window", "gemma2", "gemma3")  # the reference's mask for both directions has no windows
PAIRS = [
    (shape, form)
    for shape in CAUSAL_FAMILIES
    for form in FORMS
    if not (form == "both directions" and shape in WINDOWED)
]


def whole_prompt(seed=1):
    inputs = prompts(seed=seed)
    return {name: tensor[:, 3:] for name, tensor in inputs.items()}  # without the padding


def some(model, inputs, layer=2):
    """The threshold that about half of the tokens pass at `layer`."""
    stats = DecodeStats()
    decode_causal(model, inputs, Free(layer, SoftmaxGap(), NEVER), stats)
    values = sorted(row for step in stats.confidences for row in step[0])
    return FixedThreshold(values[len(values) // 2])


def agreeing(shape, seed=0, deep_strength=0.1):
    """A random model whose shallow and deep predictions agree more often, the weaker its deep layers."""
    model = tiny_causal(shape, seed=seed).double()
    ends = ("o_proj.weight", "down_proj.weight", "c_proj.weight", "out_proj.weight", "fc2.weight",
            "dense.weight", "dense_4h_to_h.weight", "post_attention_layernorm.weight",
            "post_feedforward_layernorm.weight")  # fmt: skip
    with torch.no_grad():
        for layer in view_for(model).layers[2:]:
            for name, weight in layer.named_parameters():
                if name.endswith(ends):  # what layers add
                    weight.mul_(deep_strength)
    return model


@pytest.mark.parametrize(
    ("shape", "form"),
    slow_but(QUICK, thin(PAIRS, [pair for pair in PAIRS if pair[0] in QUICK or pair in TURNS])),
)
def test_free_equals_the_slow_reference(shape, form):
    options = FORMS[form]
    model, inputs, stats = agreeing(shape, deep_strength=0.5), whole_prompt(), DecodeStats()
    threshold = some(model, inputs)
    ours = decode_causal(model, inputs, Free(2, SoftmaxGap(), threshold, **options), stats)
    names = {"causal_catch_up": "causal"}
    slow = SlowFree(
        model,
        inputs,
        2,
        lambda _, logits: float(softmax_gap(logits)),
        threshold,
        **{names.get(name, name): value for name, value in options.items()},
    )
    expected = slow.decode(inputs["input_ids"].shape[1] + NEW, ENDS)
    assert ours[0].tolist() == expected.tokens
    assert stats.exit_layers[0] == expected.exit_layers
    assert LAYERS in stats.exit_layers[0] and (2 in stats.exit_layers[0] or stats.rollbacks)


def test_the_slow_reference_rolls_back():
    """Else the form proves nothing."""
    model, inputs, stats = agreeing("llama-tied", deep_strength=0.5), whole_prompt(), DecodeStats()
    decode_causal(model, inputs, Free(2, SoftmaxGap(), some(model, inputs), rollback_threshold=1.0), stats)
    assert stats.rollbacks > 0


@pytest.mark.parametrize("shape", slow_but(QUICK, CAUSAL_FAMILIES))
def test_calm_at_one_layer_equals_free_that_copies(shape):
    model, inputs = agreeing(shape), prompts(3)
    threshold, stats, copied = some(model, inputs), DecodeStats(), DecodeStats()
    calm = decode_causal(model, inputs, Calm(SoftmaxGap(), threshold, exit_layers=[2]), stats)
    free = decode_causal(model, inputs, Free(2, SoftmaxGap(), threshold, copy_skipped=True), copied)
    assert torch.equal(calm, free) and stats.exit_layers == copied.exit_layers
    assert 0 < stats.exit_share < 1


@pytest.mark.parametrize("shape", slow_but(QUICK, KINDS))
def test_rows_of_a_batch_are_what_they_are_alone(shape):
    """With every method whose rows do not wait for each other."""
    model, inputs = agreeing(shape), prompts(4)
    threshold, gap = some(model, inputs), SoftmaxGap()
    view = view_for(model)
    policies = {
        "static": StaticExit(3),
        "calm": Calm(gap, threshold, min_layer=2),
        "calm, decaying": Calm(gap, DecayingThreshold(threshold.value, 2.0, NEW)),
        "calm, shortlist": Calm(ShortlistGap(view, torch.arange(2, 60)), threshold, min_layer=2),
        "free, copying": Free(2, gap, threshold, copy_skipped=True),
        "lossless": Free(2, gap, threshold, lossless=True),
    }
    for name, policy in policies.items():
        stats, alone = DecodeStats(), DecodeStats()
        together = decode_causal(model, inputs, policy, stats, min_new_tokens=NEW)
        for row in range(4):
            ids = inputs["input_ids"][row : row + 1, row:]
            single = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            output = decode_causal(model, single, policy, alone, min_new_tokens=NEW)
            assert torch.equal(together[row, 9:], output[0, -NEW:]), name
            if name != "lossless":  # there a row's drafts also end where others' do
                assert stats.exit_layers[row] == alone.exit_layers[0], name


@pytest.mark.parametrize("shape", slow_but(QUICK, CAUSAL_FAMILIES))
def test_lossless_greedy_output_is_full_depths(shape):
    model, stats = tiny_causal(shape).double(), DecodeStats()
    for inputs in (whole_prompt(), prompts(3)):
        expected = decode_causal(model, inputs)
        for threshold in (ALWAYS, EveryThirdDeep(), NEVER):
            policy = Free(2, SoftmaxGap(), threshold, lossless=True)
            assert torch.equal(decode_causal(model, inputs, policy, stats), expected)
            assert (stats.rollbacks > 0) == (threshold is not NEVER)  # random models disagree often


@pytest.mark.slow
@settings(max_examples=MAX_EXAMPLES, deadline=None, derandomize=MAX_EXAMPLES < 1000)
@given(
    shape=st.sampled_from(CAUSAL_FAMILIES),
    seed=st.integers(0, 9),
    deep_strength=st.sampled_from([0.02, 0.1, 0.3, 1.0]),
    batch=st.integers(1, 5),
    prompt_seed=st.integers(0, 10**6),
    threshold=st.sampled_from([-1.0, 0.0, 0.02, 0.05, 0.1, 0.3, 0.6, 2.0]),
    max_pending=st.sampled_from([None, 1, 2, 5]),
    options=st.sampled_from(
        [
            {},
            {"eos_token_id": list(range(1, 12)), "no_repeat_ngram_size": 1},
            {"min_new_tokens": 10, "repetition_penalty": 1.3},
        ]
    ),
)
def test_no_setting_changes_a_greedy_sequence(
    shape, seed, deep_strength, batch, prompt_seed, threshold, max_pending, options
):
    model, inputs = agreeing(shape, seed, deep_strength), prompts(batch, seed=prompt_seed)
    policy = Free(2, SoftmaxGap(), FixedThreshold(threshold), lossless=True, max_pending=max_pending)
    expected = decode_causal(model, inputs, **options)
    assert torch.equal(decode_causal(model, inputs, policy, **options), expected)


@pytest.mark.parametrize("shape", ["llama-untied", "mistral", "qwen2", "smollm3", "gemma"])
def test_lossless_tokens_are_those_of_assistant_early_exit(shape):
    """Hugging Face's own self-speculation, which skips layers of Llama-like models only, batch 1."""
    model, inputs = agreeing(shape), whole_prompt()
    expected = greedy_causal(model, inputs, assistant_early_exit=2)
    policy = Free(2, SoftmaxGap(), ALWAYS, lossless=True, max_pending=5)
    assert torch.equal(decode_causal(model, inputs, policy), expected)


@pytest.mark.parametrize("shape", CAUSAL_FAMILIES)
def test_sampling_follows_the_seed_of_generate(shape):
    model, inputs = tiny_causal(shape), prompts(2)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20}
    set_seed(5)
    ours = decode_causal(model, inputs, Free(2, SoftmaxGap(), NEVER), **options)
    set_seed(5)
    assert torch.equal(ours, greedy_causal(model, inputs, **options))


def test_an_adaptive_threshold_learns_and_the_confidence_head_decides():
    model, inputs, stats = agreeing("opt-350m"), whole_prompt(), DecodeStats()
    attach_exit_heads(model, ExitConfig(train_meta_cm_head=True, per_exit_head="norm"))
    policy = Free(2, MetaClassifier(model.cm_head), AdaptiveThreshold(0.45))
    decode_causal(model, inputs, policy, stats)
    assert stats.calibration and all(0 <= confidence <= 1 for confidence, _ in stats.calibration)


@pytest.mark.parametrize("shape", slow_but(QUICK, CAUSAL_FAMILIES))
def test_trace_holds_the_shallow_confidences_of_free_and_the_deep_predictions(shape):
    model, inputs, stats = tiny_causal(shape).double(), prompts(), DecodeStats()
    policy = Free(2, SoftmaxGap(), FixedThreshold(0.1))
    sequences = decode_causal(model, inputs, policy, stats, min_new_tokens=NEW)
    trace = trace_layers(model, **inputs, sequences=sequences)
    measured = torch.tensor([step[-1][0] for step in stats.confidences], dtype=trace.confidences.dtype)
    torch.testing.assert_close(trace.confidences[0, :, 1], measured, rtol=1e-4, atol=1e-6)
    deep = model(sequences[:, 3:-1]).logits.argmax(-1)  # without the padding
    assert torch.equal(trace.tokens[..., -1], deep[:, -NEW:])


def test_rollback_decodes_one_prompt_at_a_time():
    with pytest.raises(UserError, match="one sequence"):
        decode_causal(tiny_causal(), prompts(2), Free(2, SoftmaxGap(), ALWAYS, rollback_threshold=1.0))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_static_exit_runs_no_deeper_layer_for_the_prompt(backend):
    """But where a cache is handed back, which is Hugging Face's own."""
    model, cut = tiny_causal(), tiny_causal()
    del cut.model.layers[2:]
    view, stops = prepare(LoadedModel(model, None, ExitConfig()), backend).view, []

    def counted(run):
        return lambda state, hidden, start, stop: stops.append(stop) or run(state, hidden, start, stop)

    view.run_layers = counted(view.run_layers)
    if backend == "onnx":
        view.advance = counted(view.advance)
    for batch in (1, 3):
        inputs = prompts(batch)
        stops.clear()
        output = decode_causal(model, inputs, StaticExit(2), decoder_view=view)
        assert torch.equal(output, greedy_causal(cut, inputs)) and set(stops) == {2}
        given = {"decoder_view": view, "return_dict_in_generate": True, "max_new_tokens": 1}
        returned = decode_causal(model, inputs, StaticExit(2), **given)
        theirs = DynamicCache()
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**inputs, position_ids=positions, cache=theirs)
        held = inputs["input_ids"].shape[1] - 1  # the last token stops after the exit
        assert returned.cache.get_seq_length() == held
        real = inputs["attention_mask"][:, None, :held, None].bool()
        for ours, layer in zip(returned.cache.layers, theirs.layers, strict=True):
            expected = layer.keys[:, :, :held] * real
            torch.testing.assert_close(ours.keys * real, expected, atol=1e-4, rtol=1e-4)
