"""The engine against plain `generate`, and the policies against each other."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import FAMILIES, SHAPES, VOCABULARY, empty_cache, greedy, padded_inputs, tiny_model
from transformers import LogitsProcessorList, MinLengthLogitsProcessor
from transformers.generation import BaseStreamer

from models.confidence import MetaClassifier, ShortlistGap, SoftmaxGap
from models.decoding import DecodeStats, early_exit_decode
from models.errors import UserError
from models.exit_heads import ExitConfig, attach_exit_heads
from models.exit_policy import Calm, FullDepth, StaticExit, check_policy
from models.families import view_for
from models.free import Free
from models.threshold import AdaptiveThreshold, FixedThreshold

LENGTH = 14
ROWS = 4
# Random models repeat themselves; these settings make the rows of a batch end at different lengths.
MANY_ENDS = {"eos_token_id": list(range(1, 12)), "no_repeat_ngram_size": 1}
NEVER, ALWAYS = FixedThreshold(2.0), FixedThreshold(-1.0)


def decode(model, inputs, policy=None, stats=None, **options):
    options = {"max_length": LENGTH, "do_sample": False} | options
    return model.generate(
        **inputs, custom_generate=early_exit_decode, exit_policy=policy, decode_stats=stats, **options
    )


def never_exiting(num_layers):
    return {
        "full": FullDepth(),
        "static": StaticExit(num_layers),
        "calm": Calm(SoftmaxGap(), NEVER),
        "free": Free(2, SoftmaxGap(), NEVER),
    }


class EveryThirdDeep(FixedThreshold):
    """Two tokens exit, the third runs all layers, and so on."""

    def __init__(self):
        super().__init__(0.5)

    def at(self, position):
        return 2.0 if position % 3 == 2 else -1.0


def sometimes(model, inputs, layer=2, **options):
    """The threshold that about half of the tokens pass at `layer`."""
    stats = DecodeStats()
    decode(model, inputs, Free(layer, SoftmaxGap(), NEVER), stats, **options)
    values = [row for step in stats.confidences for row in step[0]]
    return FixedThreshold(sorted(values)[len(values) // 2])


@pytest.mark.parametrize("shape", SHAPES)
def test_never_exiting_equals_generate(shape):
    model, inputs = tiny_model(shape).double(), padded_inputs()
    expected = greedy(model, inputs, max_length=LENGTH)
    for name, policy in never_exiting(6).items():
        assert torch.equal(decode(model, inputs, policy), expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", FAMILIES)
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


class DeepLogits(Free):
    """FREE with a scripted exit decision, which records the logits of its deep passes."""

    def __init__(self, exits):
        super().__init__(2, SoftmaxGap(), FixedThreshold(0.0))
        self.exits = exits
        self.recorded = {}

    def step(self, view, state, token_ids, position, active):
        self.threshold.value = -1.0 if self.exits[position] else 2.0
        result = super().step(view, state, token_ids, position, active)
        if result.deep_pass:
            self.recorded[position] = result.logits
        return result


@pytest.mark.parametrize("shape", SHAPES)
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


POLICIES = {
    "full": lambda threshold: FullDepth(),
    "static": lambda threshold: StaticExit(3),
    "calm": lambda threshold: Calm(SoftmaxGap(), threshold),
    "free": lambda threshold: Free(2, SoftmaxGap(), threshold),
    "lossless": lambda threshold: Free(2, SoftmaxGap(), threshold, lossless=True),
    "free-copy": lambda threshold: Free(2, SoftmaxGap(), threshold, copy_skipped=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_onto_a_shortlist_equals_the_heads_rows(shape):
    view, ids = view_for(tiny_model(shape).double()), torch.tensor([3, 1, 60])
    states = torch.randn(2, 32, dtype=torch.float64)
    torch.testing.assert_close(view.projection_onto(ids)(states), view.project(states)[:, ids])


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


EXITING = ("calm", "free", "lossless", "free-copy")
ROW_CASES = [(shape, name) for shape in FAMILIES for name in EXITING]
ROW_CASES += [(shape, name) for shape in ("t5-tied", "bart-tied") for name in ("full", "static")]


@functools.cache
def batch_of(shape):
    """A model, sources that end at different steps, and a threshold that splits the first one's tokens."""
    model, inputs = tiny_model(shape, seed=5).double(), padded_inputs(batch=ROWS)
    return model, inputs, sometimes(model, inputs)


@pytest.mark.parametrize(("shape", "name"), ROW_CASES)
def test_rows_of_a_batch_decode_as_they_do_alone(shape, name):
    model, inputs, threshold = batch_of(shape)
    policy, stats = POLICIES[name](threshold), DecodeStats()
    together = decode(model, inputs, policy, stats, **MANY_ENDS)
    assert len(set(map(len, stats.exit_layers))) > 1
    depths = {layer for row in stats.exit_layers for layer in row}
    assert name in ("full", "static", "lossless") or len(depths) > 1
    for row in range(ROWS):
        source = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = decode(model, source, policy, **MANY_ENDS)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()
        assert (together[row, alone.shape[1] :] == model.config.pad_token_id).all()


def test_finished_rows_trigger_no_deep_pass():
    model, inputs = tiny_model(), padded_inputs(batch=2)
    view = view_for(model)
    memory = {"encoder_outputs": model.get_encoder()(**inputs), "attention_mask": inputs["attention_mask"]}
    state, measure = view.begin(None, **memory), SoftmaxGap()

    def first_row_is_sure(*states):
        return measure(*states)._replace(confidence=torch.tensor([0.9, 0.1]))

    policy = Free(2, first_row_is_sure, FixedThreshold(0.5))
    tokens = torch.tensor([[0], [0]])
    assert not policy.step(view, state, tokens, 0, [True, False]).deep_pass
    assert policy.step(view, state, tokens, 1, [True, True]).deep_pass


def test_stats_count_the_work_that_ran():
    model, inputs = tiny_model(), padded_inputs()
    stats = DecodeStats()
    policy = DeepLogits([True, True, False, True, False, True])
    decode(model, inputs, policy, stats, max_length=7, min_length=7)
    assert stats.exit_layers == [[2, 2, 6, 2, 6, 2]]
    assert (stats.steps, stats.deep_passes) == (6, 2)
    assert stats.layer_calls == 6 * 2 + 2 * 4
    assert stats.layer_tokens == 6 * 2 + (3 + 2) * 4
    assert stats.average_layers == pytest.approx(32 / 6)
    assert stats.ideal_speedup == pytest.approx(36 / 20)
    assert stats.exit_share == pytest.approx(4 / 6)


def test_meta_confidence_saves_the_projection_of_undecided_layers(monkeypatch):
    model, inputs = tiny_model(), padded_inputs()
    attach_exit_heads(model, ExitConfig(train_meta_cm_head=True))
    calls = []
    head = type(model.lm_head).forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: calls.append(1) or head(model.lm_head, x))
    stats = DecodeStats()
    decode(model, inputs, Calm(MetaClassifier(model.cm_head), NEVER), stats)
    assert len(calls) == stats.steps


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("rollback", [None, 0.0, 1.0])
def test_streamer_sees_exactly_the_output(rollback):
    model, inputs = tiny_model(), padded_inputs()
    policy = Free(2, SoftmaxGap(), EveryThirdDeep(), rollback_threshold=rollback)
    streamer, stats = Recorder(), DecodeStats()
    sequence = decode(model, inputs, policy, stats, streamer=streamer)
    assert streamer.tokens == sequence[0].tolist() and streamer.ended
    assert len(stats.exit_layers[0]) == len(streamer.tokens) - 1
    assert (stats.rollbacks > 0) == (rollback is not None)


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
    assert len(threshold.confidences) == sequence.shape[1] - 1 == len(stats.calibration)
    assert stats.deep_passes == 1


def test_adaptive_threshold_ignores_finished_rows():
    model, inputs = tiny_model(seed=4), padded_inputs(batch=5)
    threshold, stats = AdaptiveThreshold(-1.0), DecodeStats()
    decode(model, inputs, Free(2, SoftmaxGap(), threshold), stats, **MANY_ENDS)
    assert len(set(map(len, stats.exit_layers))) > 1
    assert len(threshold.confidences) == stats.tokens


def test_stats_can_be_used_again():
    model, stats = tiny_model(), DecodeStats()
    for batch in (1, 3):
        sequence = decode(model, padded_inputs(batch), FullDepth(), stats, max_length=6)
        assert stats.tokens == batch * (sequence.shape[1] - 1) == 5 * batch
        assert stats.average_layers == 6


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


def test_nothing_survives_on_the_model():
    model, inputs = tiny_model(), padded_inputs()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    decode(model, inputs, Free(2, SoftmaxGap(), EveryThirdDeep()))
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("policy", [StaticExit(7), Free(9, SoftmaxGap(), NEVER)])
def test_layers_the_decoder_lacks_are_refused(policy):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.6"):
        decode(tiny_model(), padded_inputs(), policy)


def test_beam_search_is_refused():
    with pytest.raises(ValueError, match="num_beams"):
        decode(tiny_model(), padded_inputs(), num_beams=3)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Free, r"give an object, Free\(\.\.\.\), not the class Free"),
        (FullDepth, r"give an object, FullDepth\(\.\.\.\)"),
        ("free", "'free' is no policy; it lacks begin, step, finish, retracts"),
        (NEVER, "is no policy; it lacks begin"),
    ],
)
def test_what_is_no_policy_is_refused(policy, message):
    with pytest.raises(UserError, match=message):
        check_policy(policy)
    check_policy(FullDepth())
