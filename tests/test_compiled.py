"""Backend compile: tokens of backend torch, from graphs whose number does not grow with the sentences.

`Compiler` captures whole graphs (`fullgraph=True` raises at a break) and runs them as they are, "aot_eager"
makes functions without side effects of them; what Inductor generates is compared in slow tests.
"""

import itertools
import logging
import shutil
import weakref

import pytest
import torch
from compiled_cases import Compiler, SideBySide, assert_every_policy_agrees, compiled, decode, torchs_runs
from decoding_cases import EveryThirdDeep
from pairs import slow_but, thin
from tiny_models import FAMILIES, VOCABULARY, empty_cache, padded_inputs, tiny_model

from models import (
    Free,
    FullDepth,
    LoadedModel,
    PromptLookup,
    SoftmaxGap,
    StaticExit,
    UserError,
)
from models.backends import prepare
from models.backends.compiled.encoder_decoder import CompiledEncoderDecoderView
from models.exit_heads import ExitConfig

logging.getLogger("torch.__trace").propagate = False  # thousands of lines, which pytest would keep

ROUNDING = 1e-4
DAILY = ("t5-tied", "bart-tied")  # whose layers differ in kind
ONE_EACH = thin(FAMILIES, DAILY)
CASES = thin(itertools.product(FAMILIES, (1, 3)), [("t5-tied", 1), ("bart-tied", 3)])
# Biases of positions in each layer, another encoder, norms before attention, none of the embeddings.
OTHERS = thin(FAMILIES, ["umt5", "longt5-tglobal", "mbart", "marian"])
HALVES = [
    (family, dtype)
    for family in FAMILIES
    for dtype in (torch.bfloat16, torch.float16)
    if (family, dtype) != ("longt5-tglobal", torch.float16)  # which is refused
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "batch"), slow_but([("t5-tied", 1)], CASES))
def test_tokens_are_torchs_and_more_sentences_compile_nothing(family, batch):
    model, compiler = tiny_model(family, num_layers=3), Compiler()
    view = compiled(model, compiler)
    assert_every_policy_agrees(model, view, padded_inputs(batch))
    graphs = compiler.graphs
    assert graphs == len(view.segments) > 0
    for seed, length in enumerate((5, 23, 60)):
        inputs = padded_inputs(batch, length, seed)
        for policy in (FullDepth(), StaticExit(1)):
            assert torch.equal(decode(model, policy, inputs, view)[0], decode(model, policy, inputs)[0])
    assert compiler.graphs == graphs


@pytest.mark.slow
@pytest.mark.parametrize("family", DAILY)
def test_lookups_change_no_token(family):
    model, inputs, lookup = tiny_model(family, num_layers=2), padded_inputs(1), PromptLookup(5, shortest=1)
    view = compiled(model, Compiler())
    expected, _ = decode(model, FullDepth(), inputs)
    for policy in (FullDepth(lookup), Free(1, SoftmaxGap(), 0.1, lossless=True, lookup=lookup)):
        tokens, stats = decode(model, policy, inputs, view, lookup_ids=expected)
        assert torch.equal(tokens, expected) and stats.deep_passes < stats.tokens


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_tokens_are_torchs_without_side_effects(family):
    model = tiny_model(family, num_layers=2)
    assert_every_policy_agrees(model, compiled(model, "aot_eager"), padded_inputs(3))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("family", thin(["t5-tied", "umt5", "bart-tied"], ["t5-tied"]))
def test_tokens_are_torchs_as_inductor_compiles(family):
    """In windows of one and, padded to four, of three tokens; other tests decode with every method."""
    model, policy = tiny_model(family, num_layers=2), Free(1, SoftmaxGap(), EveryThirdDeep())
    view = compiled(model, "inductor")
    expected, torchs = decode(model, policy, padded_inputs(1), max_new_tokens=10)
    tokens, stats = decode(model, policy, padded_inputs(1), view, max_new_tokens=10)
    assert torch.equal(tokens, expected) and stats.exit_layers == torchs.exit_layers
    assert {key[:2] for key in view.segments} == {(0, 1), (1, 2)} and stats.deep_passes < stats.steps


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_EACH)
def test_states_are_torchs_in_long_windows_grown_buffers_and_after_a_rollback(family):
    torch.manual_seed(0)
    both = SideBySide(tiny_model(family, num_layers=2), compiler="aot_eager")
    both.run(torch.randn(2, 21, 32), 1, 2)  # 16 and 5, padded to 8
    both.run(torch.randn(2, 103, 32), 1, 2)
    both.truncate(110)
    assert both.states[1].buffers.capacity == 128
    both.run(torch.randn(2, 30, 32), 1, 2)
    assert both.states[1].buffers.capacity == 256
    both.truncate(50)
    both.write(torch.randn(2, 5, 32), 1, 2)
    both.run(torch.randn(2, 13, 32), 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), thin(HALVES, [("t5-tied", torch.float16), ("bart-tied", torch.bfloat16)])
)
def test_half_precision_is_as_near_to_float32_as_torchs(family, dtype):
    torch.manual_seed(0)
    model, hidden = tiny_model(family, num_layers=1), torch.randn(1, 7, 32)
    with torch.inference_mode():
        exact = SideBySide(model, 1).run(hidden, 0, 1)
        both = SideBySide(model.to(dtype), 1)
        errors = [
            (view.run_layers(state, hidden.to(dtype), 0, 1) - exact).abs().max()
            for view, state in zip(both.views, both.states, strict=True)
        ]
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("family", slow_but(["bart-tied"], ONE_EACH))
def test_prompts_padded_on_the_left_give_torchs_tokens(family):
    model, inputs = tiny_model(family, num_layers=2), padded_inputs(3)
    prompts = torch.randint(2, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    given = inputs | {"decoder_input_ids": prompts * mask, "decoder_attention_mask": mask}
    view = compiled(model, "eager")
    options = {"return_dict_in_generate": True, "output_logits": True}
    ours, theirs = (decode(model, FullDepth(), given, by, **options)[0] for by in (view, None))
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-3, atol=1e-3)
    unpadded = given | {"decoder_attention_mask": torch.ones_like(mask)}
    others = decode(model, FullDepth(), unpadded, **options)[0]
    assert (ours.logits[0] - others.logits[0])[0].abs().max() > 0.01  # the mask matters


class Replayer(Compiler):
    """Writes outputs where those of the call before lay, as replays of a CUDA graph do."""

    def __call__(self, graph, examples):
        kept = []

        def replay(*inputs):
            outputs = graph.forward(*inputs)
            if not kept:
                kept.extend(output.clone() for output in outputs)
            for ours, output in zip(kept, outputs, strict=True):
                ours.copy_(output)
            return tuple(kept)

        return replay


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_that_wait_are_copied_out_of_what_the_next_replay_overwrites(rows):
    model, inputs = tiny_model("mt5", num_layers=2), padded_inputs(rows)
    policy, expected, stats = torchs_runs(model, inputs)["free"]
    assert stats.deep_passes < stats.exit_share * stats.tokens  # several tokens wait at once
    view = compiled(model, Replayer())
    overwritten = decode(model, policy, inputs, view)[0]
    assert rows == 1 or not torch.equal(overwritten, expected)  # a lone sequence's wait as copies anyway
    view.replays = True
    assert torch.equal(decode(model, policy, inputs, view)[0], expected)


@pytest.mark.slow
def test_a_cache_is_delivered_and_continued():
    model, inputs = tiny_model(num_layers=2), padded_inputs(2)
    view, whole = compiled(model, "eager"), decode(model, FullDepth(), inputs)[0]
    options = {"return_dict_in_generate": True, "max_new_tokens": 9, "cache": empty_cache()}
    first = decode(model, FullDepth(), inputs, view, **options)[0]
    torchs = decode(model, FullDepth(), inputs, **options | {"cache": empty_cache()})[0]
    for part in ("self_attention_cache", "cross_attention_cache"):
        ours, theirs = getattr(first.cache, part), getattr(torchs.cache, part)
        for layer, expected in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys)
            torch.testing.assert_close(layer.values, expected.values)
    given = inputs | {"decoder_input_ids": first.sequences, "cache": first.cache}
    given["decoder_attention_mask"] = torch.ones_like(first.sequences)
    rest = decode(model, FullDepth(), given, view, max_new_tokens=24 - 9)[0]
    assert torch.equal(rest, whole)


def test_buffers_serve_one_generation_at_a_time_and_come_back_clean():
    model, inputs = tiny_model(num_layers=1), padded_inputs(1)
    view = compiled(model, "eager")
    source = view.encode(**inputs)
    first, second = (view.begin(None, encoder_outputs=source) for _ in range(2))
    for state in (first, second):
        state.reserve(1, 1)
    keys = [state.buffers.pairs[0][0].data_ptr() for state in (first, second)]
    assert keys[0] != keys[1]
    for tensor in (*first.buffers.pairs[0], *first.memory.pairs[0]):
        tensor.fill_(torch.nan)
    gone = weakref.ref(first)
    del first
    assert gone() is None
    third = view.begin(None, encoder_outputs=source)
    third.reserve(1, 1)
    assert third.buffers.pairs[0][0].data_ptr() == keys[0]
    assert third.buffers.pairs[0][0].isfinite().all()
    del second, third
    expected = decode(model, FullDepth(), inputs)[0]
    assert torch.equal(decode(model, FullDepth(), inputs, view)[0], expected)


def loaded(model):
    return LoadedModel(model, None, ExitConfig())


def test_prepare_gives_a_model_that_decodes_with_compiled_layers():
    given = loaded(tiny_model(num_layers=2))
    fast = prepare(given, backend="compile")
    assert (fast.backend, fast.precision, fast.model) == ("compile", "fp32", given.model)
    assert isinstance(fast.view, CompiledEncoderDecoderView)
    assert not isinstance(given.view, CompiledEncoderDecoderView)


def test_what_cannot_be_compiled_is_refused_by_name():
    model = tiny_model(num_layers=1)
    with pytest.raises(UserError, match="precision w8 needs backend onnx; compile computes in"):
        prepare(loaded(model), backend="compile", precision="w8")
    with pytest.raises(UserError, match="threads and cache_dir are options of backend onnx, not of compile"):
        prepare(loaded(model), backend="compile", threads=2)
    with pytest.raises(UserError, match="branch on their states in float16: load it in bfloat16"):
        prepare(loaded(tiny_model("longt5-tglobal", num_layers=1).half()), backend="compile")
    policy = Free(1, SoftmaxGap(), 0.5, causal_catch_up=False)
    model, inputs = tiny_model(num_layers=2), padded_inputs(1)
    with pytest.raises(UserError, match="causal windows only: leave out causal_catch_up=False"):
        decode(model, policy, inputs, compiled(model, "eager"))


@pytest.mark.slow
def test_a_missing_compiler_is_named_at_the_first_call():
    missing = {"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)}
    model = tiny_model(num_layers=1)
    with torch._inductor.config.patch(missing), pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        prepare(loaded(model), backend="compile").generate(**padded_inputs(1), max_new_tokens=3)
