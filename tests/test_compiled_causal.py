"""Backend compile with decoder-only models, and with exit adapters of both kinds of models."""

import itertools
import shutil

import pytest
import torch
from adapted_models import SHALLOW, SHORTLIST, adapted, make_inputs
from compiled_cases import Compiler, SideBySide, assert_every_policy_agrees, compiled, decode
from decoding_cases import EveryThirdDeep
from pairs import slow_but, thin
from tiny_causal import CAUSAL_FAMILIES, CAUSAL_SHAPES, prompts, tiny_causal
from transformers import DynamicCache

from models import Free, FullDepth, SoftmaxGap, StaticExit, prepare
from models.exit_heads import ExitConfig
from models.loading import LoadedModel

ONE_EACH = thin(CAUSAL_SHAPES, ["llama-tied", "gpt2-tied"])
GAP = SoftmaxGap()
OPTIONS = {"eos_token_id": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "batch"),
    slow_but([("llama-tied", 3)], thin(itertools.product(CAUSAL_FAMILIES, (1, 3)), [("gemma3", 1)])),
)
def test_tokens_are_torchs_and_more_prompts_compile_nothing(family, batch):
    model, compiler = tiny_causal(family, num_layers=3), Compiler()
    view = compiled(model, compiler)
    assert_every_policy_agrees(model, view, prompts(batch))
    graphs = compiler.graphs
    assert graphs == len(view.segments) > 0
    for seed, length in enumerate((6, 8, 9)):  # whose windows are padded to as many tokens
        inputs = prompts(batch, length, seed)
        for policy in (FullDepth(), StaticExit(1)):
            assert torch.equal(decode(model, policy, inputs, view)[0], decode(model, policy, inputs)[0])
    assert compiler.graphs == graphs


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_prompts_of_any_length_compile_a_window_once(given, batch):
    """A part of a prompt has its strides, by which graphs are guarded."""
    model, compiler = tiny_causal("llama-tied", num_layers=2, max_position_embeddings=300), Compiler()
    view, options = compiled(model, compiler), {"max_new_tokens": 3, **OPTIONS}
    for seed, length in enumerate((*range(17, 29), *range(64, 76), 140)):
        inputs = prompts(batch, length, seed)
        if given == "embeddings":
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        ours, theirs = (decode(model, FullDepth(), inputs, by, **options)[0] for by in (view, None))
        assert torch.equal(ours, theirs), length
    assert compiler.graphs == len(view.segments) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("family", thin(CAUSAL_FAMILIES, ["smollm3", "gemma2", "pythia", "opt-350m"]))
def test_tokens_are_torchs_without_side_effects(family):
    model = tiny_causal(family, num_layers=2)
    assert_every_policy_agrees(model, compiled(model, "aot_eager"), prompts(3))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("family", thin(["llama-tied", "gemma3", "gpt2-tied"], ["llama-tied"]))
def test_tokens_are_torchs_as_inductor_compiles(family):
    """In windows of one and of sixteen tokens, and padded to four of three."""
    model, policy = tiny_causal(family, num_layers=2), Free(1, GAP, EveryThirdDeep())
    view, options = compiled(model, "inductor"), {"max_new_tokens": 10, **OPTIONS}
    expected, torchs = decode(model, policy, prompts(1), **options)
    tokens, stats = decode(model, policy, prompts(1), view, **options)
    assert torch.equal(tokens, expected) and stats.exit_layers == torchs.exit_layers


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_EACH)
def test_states_are_torchs_in_long_windows_grown_buffers_and_after_a_rollback(family):
    torch.manual_seed(0)
    width = 64 if family == "neox-serial" else 32
    model = tiny_causal(family, num_layers=4, max_position_embeddings=300)
    both = SideBySide(model, compiler="aot_eager")
    both.run(torch.randn(2, 21, width), 2, 3)  # 16 and 5, padded to 8
    both.run(torch.randn(2, 103, width), 2, 3)  # at once
    both.truncate(110)
    assert both.states[1].capacity == 128
    both.run(torch.randn(2, 30, width), 2, 3)
    assert both.states[1].capacity == 256
    both.truncate(50)
    both.write(torch.randn(2, 5, width), 2, 3)
    both.run(torch.randn(2, 13, width), 2, 3)


@pytest.mark.parametrize("family", slow_but(["llama-tied"], ["llama-tied", "gpt2-tied", "gemma3"]))
def test_embeddings_numbered_positions_and_caches_are_read(family):
    model, inputs = tiny_causal(family, num_layers=2), prompts(2)
    view, options = compiled(model), {"max_new_tokens": 9, **OPTIONS}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embedded = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    numbered = inputs | {"position_ids": torch.arange(9).expand(2, -1) * 2}
    for given in (embedded, numbered):
        ours, theirs = (decode(model, FullDepth(), given, by, **options)[0] for by in (view, None))
        assert torch.equal(ours, theirs)
    whole = decode(model, FullDepth(), inputs, **options)[0]
    options |= {"max_new_tokens": 4, "return_dict_in_generate": True}
    caches = []
    for by in (view, None):
        first = decode(model, FullDepth(), inputs, by, cache=DynamicCache(), **options)[0]
        caches.append(first.cache)
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(ours.keys[:, :, 1:], theirs.keys[:, :, 1:])  # the second row's padding
        torch.testing.assert_close(ours.values[:, :, 1:], theirs.values[:, :, 1:])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    given = {"input_ids": first.sequences, "attention_mask": mask, "cache": caches[0]}
    rest = decode(model, FullDepth(), given, view, **options | {"max_new_tokens": 5})[0]
    assert torch.equal(rest.sequences, whole)


ADAPTERS = {
    "layer": {},
    "attention": {"kind": "attention"},
    "norm": {"kind": "norm"},
    "shortlist": {"shortlist": SHORTLIST},
    "deep keys/values": {"kv_layer": 4},
}


PAIRS = [  # deep keys/values are for decoder-only models, and BART has no final norm
    pair
    for pair in itertools.product(["llama-tied", "t5-tied", "gpt2-tied", "umt5", "bart-tied"], ADAPTERS)
    if pair != ("bart-tied", "norm") and (pair[1] != "deep keys/values" or pair[0] in CAUSAL_SHAPES)
]
ONE_OF_EACH = [
    ("llama-tied", "deep keys/values"),
    ("t5-tied", "layer"),
    ("gpt2-tied", "attention"),
    ("umt5", "norm"),
    ("bart-tied", "shortlist"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kept"), thin(PAIRS, ONE_OF_EACH))
def test_exit_adapters_say_what_torchs_say(shape, kept):
    loaded, inputs = adapted(shape, **ADAPTERS[kept]), make_inputs(shape, batch=2)
    view = compiled(loaded.model)
    options = {"max_new_tokens": 12, **OPTIONS}
    for lossless in (False, True):
        policy = Free(SHALLOW, GAP, EveryThirdDeep(), lossless=lossless)
        ours, theirs = (decode(loaded.model, policy, inputs, by, **options) for by in (view, None))
        assert torch.equal(ours[0], theirs[0])
        assert ours[1].exit_layers == theirs[1].exit_layers
        assert lossless or SHALLOW in ours[1].exit_layers[0]


def test_prepare_takes_them():
    loaded = LoadedModel(tiny_causal(num_layers=2), None, ExitConfig())
    fast = prepare(loaded, backend="compile")
    assert fast.backend == "compile" and fast.view.eager.model is loaded.model
