"""The ONNX Runtime backend against torch: tokens of every policy, caches and arguments of `generate`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from decoding_cases import MANY_ENDS, EveryThirdDeep, Recorder
from onnx_models import EACH_FAMILY, EACH_KIND, decode, loaded, perturbed, policies
from pairs import ALL_PAIRS
from tiny_causal import greedy_causal, prompts, tiny_causal
from tiny_models import greedy, padded_inputs, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from models import (
    DecodeStats,
    Free,
    FullDepth,
    SoftmaxGap,
    prepare,
)
from models.backends.onnx.view import SMALLEST_BLOCK
from models.backends.onnx.windows import Biases
from models.backends.shared import Shelf

# What policies do does not depend on the family; whether its graphs take windows, copies and batches does.
WHOLE = ("t5-tied", "umt5", "bart-tied")
OF_A_FAMILY = ((1, "calm"), (3, "full"), (3, "free copying"), (3, "lossless in short windows"))


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_policy_decodes_torchs_tokens(family):
    torch_model = loaded(perturbed(family))
    onnx_model = prepare(torch_model)
    cases = itertools.product((1, 3), policies())
    for batch, name in cases if family in WHOLE or ALL_PAIRS else OF_A_FAMILY:
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


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH_KIND)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_padding_is_inferred_as_generate_does():
    """For decoder-only models alone, by whatever says what padding and ends are."""
    for model, ids, plain in (
        (tiny_model(), padded_inputs(3), greedy),
        (tiny_causal(), prompts(3), greedy_causal),
    ):
        fast, ids = prepare(loaded(model)), {"input_ids": ids["input_ids"]}
        for given in (
            {},
            {"eos_token_id": 0},
            {"pad_token_id": 5},
            {"generation_config": GenerationConfig(do_sample=False)},
            {"generation_config": GenerationConfig(do_sample=False, eos_token_id=[0, 1])},
        ):
            expected = plain(model, ids, max_new_tokens=8, **given)
            assert torch.equal(fast.generate(**ids, do_sample=False, max_new_tokens=8, **given), expected)


@pytest.mark.slow
def test_windows_of_prompts_go_with_their_generation():
    """Of any length, in the one precision that reads a prompt at once; short ones are as many as they are."""
    fast = prepare(loaded(tiny_causal()), precision="w4")
    for length in range(70, 90, 4):
        fast.generate(torch.full((1, length), 7), do_sample=False, max_new_tokens=3)
    kept = [tokens for _, held in fast.view.shelf.free for tokens, _ in held.numbering.windows]
    assert kept and max(kept) <= SMALLEST_BLOCK


def test_biases_are_those_of_the_distance():
    biases = np.arange(8, dtype=np.float32).reshape(2, 4)  # heads, distance
    rows = np.zeros((1, 2, 2, 4), np.float32)
    Biases({0: torch.from_numpy(biases)}, 2, 4).fill(0, rows, 1)
    assert rows[0, :, 0, :2].tolist() == [[1, 0], [5, 4]]  # the query at position 1 sees keys 0 and 1
    assert rows[0, :, 1, :3].tolist() == [[2, 1, 0], [6, 5, 4]]


class Borrower:
    pass


def test_a_borrower_that_goes_while_another_is_served_takes_nothing_from_it():
    """As the garbage collector may decide, in the same thread."""

    class Meanwhile(int):
        def __eq__(self, other):
            leaving.clear()
            return int(self) == other

        __hash__ = int.__hash__

    shelf = Shelf(lambda size: [size])
    leaving = [Borrower(), Borrower()]
    small, large = shelf.lend(leaving[0], 1), shelf.lend(leaving[1], 2)
    leaving.pop()
    assert shelf.lend(Borrower(), Meanwhile(2)) is large
    borrower = Borrower()
    assert shelf.lend(borrower, 1) is small
