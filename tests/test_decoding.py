"""The engine against plain `generate`, and the policies against each other."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import (
    ALWAYS,
    LENGTH,
    MANY_ENDS,
    NEVER,
    DeepLogits,
    EveryThirdDeep,
    decode,
    never_exiting,
    sometimes,
)
from pairs import QUICK, slow_but
from test_batch_decoding import ROW_CASES
from tiny_models import FAMILIES, SHAPES, VOCABULARY, empty_cache, greedy, padded_inputs, tiny_model
from transformers import LogitsProcessorList, MinLengthLogitsProcessor

from models.confidence import MetaClassifier, ShortlistGap, SoftmaxGap
from models.decode_stats import DecodeStats
from models.errors import UserError
from models.exit_heads import ExitConfig, attach_exit_heads
from models.exit_policy import Calm, StaticExit
from models.families import view_for
from models.free import Free
from models.threshold import AdaptiveThreshold


@pytest.mark.parametrize("shape", slow_but(QUICK, SHAPES))
def test_never_exiting_equals_generate(shape):
    model, inputs = tiny_model(shape).double(), padded_inputs()
    expected = greedy(model, inputs, max_length=LENGTH)
    for name, policy in never_exiting(6).items():
        assert torch.equal(decode(model, inputs, policy), expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", slow_but(QUICK, FAMILIES))
def test_never_exiting_equals_generate_in_less_precision(shape, dtype):
    model, inputs = tiny_model(shape).to(dtype), padded_inputs()
    expected = greedy(model, inputs, max_length=LENGTH)
    for name in ("calm", "free"):
        assert torch.equal(decode(model, inputs, never_exiting(6)[name]), expected), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree_with_generate(attention):
    model, inputs = tiny_model(attn_implementation=attention), padded_inputs()
    assert torch.equal(decode(model, inputs), greedy(model, inputs, max_length=LENGTH))


def test_attention_implementations_agree_on_the_parallel_pass():
    inputs, outputs = padded_inputs(), []
    for attention in ("eager", "sdpa"):
        model, stats = tiny_model(attn_implementation=attention).double(), DecodeStats()
        outputs.append(decode(model, inputs, Free(2, SoftmaxGap(), EveryThirdDeep()), stats))
        assert stats.deep_passes == (LENGTH - 1) // 3
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("shape", "layer"), [*((shape, 3) for shape in SHAPES), ("t5-tied", 1), ("t5-tied", 5), ("bart-tied", 5)]
)
def test_free_always_exiting_equals_static(shape, layer):
    model, inputs = tiny_model(shape), padded_inputs()
    free = decode(model, inputs, Free(layer, SoftmaxGap(), ALWAYS))
    assert torch.equal(free, decode(model, inputs, StaticExit(layer)))


def test_static_exit_equals_a_truncated_model():
    model, inputs = tiny_model(), padded_inputs()
    static = decode(model, inputs, StaticExit(3))
    model.decoder.block = model.decoder.block[:3]
    assert torch.equal(static, greedy(model, inputs, max_length=LENGTH))


@pytest.mark.parametrize("shape", slow_but(QUICK, SHAPES))
def test_deep_logits_equal_the_full_model_on_the_same_prefix(shape):
    model, inputs = tiny_model(shape).double(), padded_inputs()
    policy = DeepLogits([True, True, False, True, False, False, *[True] * 5, False, *[True] * LENGTH])
    sequence = decode(model, inputs, policy, min_length=LENGTH)
    expected = model(**inputs, decoder_input_ids=sequence).logits[0]
    assert sorted(policy.recorded) == [2, 4, 5, 11]
    for position, logits in policy.recorded.items():
        error = (logits[0] - expected[position]).norm() / expected[position].norm()
        assert error < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_write_kv_equals_the_layers_own(shape):
    model, inputs = tiny_model(shape).double(), padded_inputs()
    view = view_for(model)
    memory = {"encoder_outputs": model.get_encoder()(**inputs), "attention_mask": inputs["attention_mask"]}
    tokens = torch.tensor([[5, 9, 23]])
    run, written = view.begin(None, **memory), view.begin(None, **memory)
    hidden = view.embed(run, tokens)
    for layer in range(view.num_layers):
        view.write_kv(written, hidden, layer, layer + 1)
        hidden = view.run_layers(run, hidden, layer, layer + 1)
        ran, wrote = (state.cache.self_attention_cache.layers[layer] for state in (run, written))
        assert run.lengths[layer] == written.lengths[layer] == 3
        torch.testing.assert_close(ran.keys[:, :, :3], wrote.keys[:, :, :3], rtol=0, atol=0)
        torch.testing.assert_close(ran.values[:, :, :3], wrote.values[:, :, :3], rtol=0, atol=0)


def test_calm_copies_the_exit_state_to_deeper_layers():
    model, inputs = tiny_model().double(), padded_inputs()
    view = view_for(model)
    memory = {"encoder_outputs": model.get_encoder()(**inputs), "attention_mask": inputs["attention_mask"]}
    state, policy = view.begin(None, **memory), Calm(SoftmaxGap(), ALWAYS, min_layer=2)
    result = policy.step(view, state, torch.tensor([[0]]), 0, [True])
    assert result.exit_layers == [2] and result.layer_calls == 2
    assert state.lengths == [1] * 6


@pytest.mark.slow
def test_position_bias_grows_with_long_outputs():
    model, inputs = tiny_model(), padded_inputs()
    options = {"max_length": 150, "min_length": 150}
    ours = decode(model, inputs, Free(2, SoftmaxGap(), NEVER), **options)
    assert torch.equal(ours, greedy(model, inputs, **options))


def test_generation_settings_of_generate_hold():
    model, inputs = tiny_model(seed=3), padded_inputs()
    options = {"min_length": 8, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "max_length": LENGTH}
    assert torch.equal(decode(model, inputs, **options), greedy(model, inputs, **options))
    processors = LogitsProcessorList([MinLengthLogitsProcessor(12, 1)])
    ours = decode(model, inputs, logits_processor=processors)
    assert torch.equal(ours, greedy(model, inputs, max_length=LENGTH, logits_processor=processors))


def test_decoder_prompt_runs_at_full_depth():
    model, inputs = tiny_model(), padded_inputs()
    prompt = {"decoder_input_ids": torch.tensor([[0, 7, 12, 3]])}
    ours = decode(model, inputs | prompt, Free(2, SoftmaxGap(), NEVER))
    assert torch.equal(ours, greedy(model, inputs | prompt, max_length=LENGTH))


def test_sampling_follows_the_seed_of_generate():
    model, inputs = tiny_model(), padded_inputs()
    torch.manual_seed(5)
    ours = decode(model, inputs, do_sample=True, temperature=0.7)
    torch.manual_seed(5)
    sampling = {"do_sample": True, "temperature": 0.7, "max_length": LENGTH}
    assert torch.equal(ours, model.generate(**inputs, cache=empty_cache(), **sampling))


def test_output_object_carries_logits():
    model, inputs = tiny_model(), padded_inputs()
    output = decode(model, inputs, return_dict_in_generate=True, output_logits=True, output_scores=True)
    assert len(output.logits) == len(output.scores) == output.sequences.shape[1] - 1
    assert output.logits[0].shape == (1, VOCABULARY)


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_onto_a_shortlist_equals_the_heads_rows(shape):
    view, ids = view_for(tiny_model(shape).double()), torch.tensor([3, 1, 60])
    states = torch.randn(2, 32, dtype=torch.float64)
    torch.testing.assert_close(view.projection_onto(ids)(states), view.project(states)[:, ids])


@pytest.mark.parametrize("shape", ["t5-tied", "bart-tied"])
def test_a_projection_onto_a_shortlist_follows_the_model(shape):
    model, ids = tiny_model(shape), torch.tensor([3, 1, 60])
    view, states = view_for(model), torch.randn(2, 32, dtype=torch.float64)
    project = view.projection_onto(ids)
    with torch.inference_mode():
        project(states.float())
    changes = (
        model.double,
        lambda: model.load_state_dict(tiny_model(shape, seed=5).state_dict()),
        lambda: model.set_output_embeddings(tiny_model(shape, seed=6).double().lm_head),
    )
    for change in changes:
        change()
        expected = view.project(states)[:, ids]
        torch.testing.assert_close(project(states), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("ids", "message"), [([3], "at least 2"), ([3, 97], "0..96"), ([3, 5, 3], "once")])
def test_shortlists_that_are_none_are_refused(ids, message):
    with pytest.raises(UserError, match=message):
        ShortlistGap(view_for(tiny_model()), torch.tensor(ids))


@pytest.mark.parametrize("name", ["calm", "free"])
def test_a_shortlist_of_all_tokens_changes_nothing(name):
    model, inputs = tiny_model().double(), padded_inputs()
    options = {"no_repeat_ngram_size": 1, "min_new_tokens": 19, "max_length": 20}
    layer = 1 if name == "calm" else 2
    threshold = sometimes(model, inputs, layer, **options)
    everything = ShortlistGap(view_for(model), torch.arange(VOCABULARY))
    stats = {}
    for measure in (SoftmaxGap(), everything):
        stats[measure] = DecodeStats()
        policy = Calm(measure, threshold) if name == "calm" else Free(2, measure, threshold)
        decode(model, inputs, policy, stats[measure], **options)
    first, second = stats.values()
    assert first.exit_layers == second.exit_layers and len(set(first.exit_layers[0])) > 1


def test_calm_tests_at_chosen_layers_only():
    model, inputs, stats = tiny_model(), padded_inputs(), DecodeStats()
    policy = Calm(SoftmaxGap(), sometimes(model, inputs, no_repeat_ngram_size=1), exit_layers=[2, 5])
    decode(model, inputs, policy, stats, no_repeat_ngram_size=1)
    assert {len(tests) for tests in stats.confidences} <= {1, 2}
    assert set(stats.exit_layers[0]) <= {2, 5, 6} and len(set(stats.exit_layers[0])) > 1


ROW_CASES += [(shape, name) for shape in ("t5-tied", "bart-tied") for name in ("full", "static")]


def test_meta_confidence_saves_the_projection_of_undecided_layers(monkeypatch):
    model, inputs = tiny_model(), padded_inputs()
    attach_exit_heads(model, ExitConfig(train_meta_cm_head=True))
    calls = []
    head = type(model.lm_head).forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: calls.append(1) or head(model.lm_head, x))
    stats = DecodeStats()
    decode(model, inputs, Calm(MetaClassifier(model.cm_head), NEVER), stats)
    assert len(calls) == stats.steps


def test_strict_rollback_decodes_what_the_full_model_prefers():
    """With a zero threshold every waiting token is taken back, so that only deep tokens remain."""
    model, inputs = tiny_model(), padded_inputs()
    policy = Free(2, SoftmaxGap(), EveryThirdDeep(), rollback_threshold=0.0)
    sequence = decode(model, inputs, policy, min_length=LENGTH)
    full = greedy(model, inputs, max_length=LENGTH, min_length=LENGTH)
    waiting = (LENGTH - 1) % 3  # the third tokens are deep; what comes after the last of them waits
    assert torch.equal(sequence[:, : LENGTH - waiting], full[:, : LENGTH - waiting])


def test_adaptive_threshold_learns_from_the_tail_of_a_sequence():
    model, inputs = tiny_model(), padded_inputs()
    threshold = AdaptiveThreshold(-1.0)
    stats = DecodeStats()
    sequence = decode(model, inputs, Free(2, SoftmaxGap(), threshold), stats)
    assert len(threshold.pairs) == sequence.shape[1] - 1 == len(stats.calibration)
    assert stats.deep_passes == 1


def test_adaptive_threshold_ignores_finished_rows():
    model, inputs = tiny_model(seed=4), padded_inputs(batch=5)
    threshold, stats = AdaptiveThreshold(-1.0), DecodeStats()
    decode(model, inputs, Free(2, SoftmaxGap(), threshold), stats, **MANY_ENDS)
    assert len(set(map(len, stats.exit_layers))) > 1
    assert len(threshold.pairs) == stats.tokens


def test_processors_that_write_in_place_do_no_harm():
    """The adaptive threshold compares what the model predicted, not what a processor made of it."""
    model, inputs = tiny_model(), padded_inputs()
    calibrations = []
    for processor in (lambda ids, scores: scores.mul_(-1), lambda ids, scores: -scores):
        stats = DecodeStats()
        policy = Free(2, SoftmaxGap(), AdaptiveThreshold(-1.0))
        decode(model, inputs, policy, stats, logits_processor=LogitsProcessorList([processor]))
        calibrations.append(stats.calibration)
    assert calibrations[0] == calibrations[1]
