"""What callers hand to `generate`: sources as embeddings, or what is refused in one line that names it."""

from __future__ import annotations

import pytest
import torch
from onnx_models import loaded
from pairs import slow_but
from tiny_causal import prompts, tiny_causal
from tiny_models import FAMILIES, greedy, padded_inputs, tiny_model
from transformers.modeling_outputs import BaseModelOutput

from models import (
    DecodeStats,
    Free,
    FullDepth,
    PromptLookup,
    SoftmaxGap,
    UserError,
    custom_generate,
    early_exit_decode,
    generate,
    prepare,
    view_for,
)

LENGTH = {"do_sample": False, "max_new_tokens": 9}
POLICIES = (FullDepth(), Free(2, SoftmaxGap(), 0.02, lossless=True))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("shape", slow_but(["t5-tied", "bart-tied"], FAMILIES))
def test_embeddings_may_be_the_source(shape, backend):
    """In both forms, alone and with a mask, as Hugging Face reads them."""
    subject, inputs = loaded(tiny_model(shape, seed=1)), padded_inputs(2)
    if backend == "onnx":
        subject = prepare(subject, threads=1)
    soft = subject.model.get_input_embeddings()(inputs["input_ids"]) * 1.1  # of no token
    for given in (
        {"inputs_embeds": soft},
        {"inputs_embeds": soft, "attention_mask": inputs["attention_mask"]},
    ):
        expected = greedy(subject.model, given, max_new_tokens=9)
        for policy in POLICIES:
            options = {**given, **LENGTH, "exit_policy": policy}
            assert torch.equal(subject.generate(**options), expected)
            options |= {"custom_generate": early_exit_decode, "decoder_view": subject.view}
            assert torch.equal(subject.model.generate(**options), expected)


def test_a_lookup_needs_the_ids_of_embeddings():
    subject, ids = loaded(tiny_model()), padded_inputs()["input_ids"]
    soft, policy = subject.model.get_input_embeddings()(ids), FullDepth(PromptLookup(3))
    with pytest.raises(UserError, match="give lookup_ids="):
        subject.generate(inputs_embeds=soft, exit_policy=policy, **LENGTH)
    expected = greedy(subject.model, {"input_ids": ids}, max_new_tokens=9)
    output = subject.generate(inputs_embeds=soft, exit_policy=policy, lookup_ids=ids, **LENGTH)
    assert torch.equal(output, expected)


IDS = padded_inputs(2, length=7)["input_ids"].clamp(min=2)  # of no padding
ROWS, COLUMNS = torch.ones(1, 7).long(), torch.ones(2, 5).long()
ROWS[0, 0] = 0  # of one row, for two
SUBJECTS = {"source": tiny_model, "prompt": tiny_causal}


def ways(subject, **given):
    """Both forms, and the function."""
    yield lambda: subject.generate(**given, **LENGTH)
    yield lambda: generate(subject.model, **given, **LENGTH)
    yield lambda: subject.model.generate(**given, **LENGTH, custom_generate=early_exit_decode)


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize(
    "mask", [ROWS, COLUMNS, ROWS[0], torch.ones(3, 7).long()], ids=lambda mask: len(mask)
)
def test_a_mask_of_another_shape_is_refused(kind, mask, embedded):
    subject = loaded(SUBJECTS[kind]())
    given = {"inputs_embeds": subject.model.get_input_embeddings()(IDS)} if embedded else {"input_ids": IDS}
    reach = (
        3 if kind == "prompt" and mask is ROWS else 2
    )  # elsewhere `generate` reads the mask before the loop
    for way in (*ways(subject, **given, attention_mask=mask),)[:reach]:
        with pytest.raises(UserError, match=r"attention_mask.* \(2, 7\)") as raised:
            way()
        assert str((*mask.shape,)) in str(raised.value) and "\n" not in str(raised.value)


def test_a_mask_that_the_encoder_did_not_need_is_checked_all_the_same():
    model, inputs = tiny_model(), padded_inputs(2, length=7)
    memory = BaseModelOutput(model.get_encoder()(IDS).last_hidden_state)
    options = {"encoder_outputs": memory, "custom_generate": early_exit_decode, **LENGTH}
    assert model.generate(**options, attention_mask=inputs["attention_mask"]).shape == (2, 10)
    for mask in (ROWS, COLUMNS):
        with pytest.raises(UserError, match=r"attention_mask must .* \(2, 7\), got .*, [57]\)"):
            model.generate(**options, attention_mask=mask)
    with pytest.raises(UserError, match="decoder_input_ids has 1 rows and the source 2"):
        model.generate(**options, decoder_input_ids=torch.zeros(1, 1).long())


@pytest.mark.parametrize("shape", [(1, 3), (3, 3), (2, 2), (2, 4), (3,)])
def test_a_mask_of_another_shape_than_the_decoders_prompt_is_refused(shape):
    mask = torch.ones(*shape).long()
    mask.view(-1)[0] = 0
    given = {"input_ids": IDS, "decoder_input_ids": torch.tensor([[0, 5, 6]] * 2)}
    for way in ways(loaded(tiny_model()), **given, decoder_attention_mask=mask):
        with pytest.raises(UserError, match=r"decoder_attention_mask must .* \(2, 3\)") as raised:
            way()
        assert str(shape) in str(raised.value)


def test_what_a_cache_holds_may_be_masked_too():
    model, inputs = tiny_causal(), prompts(2)
    first = {"return_dict_in_generate": True, "custom_generate": early_exit_decode, "max_new_tokens": 4}
    begun = model.generate(**inputs, do_sample=False, min_new_tokens=4, **first)
    given = {"input_ids": begun.sequences[:, -1:], "cache": begun.cache, "custom_generate": early_exit_decode}
    with pytest.raises(UserError, match=r"attention_mask must .* \(2, 1\), or \(2, 13\) with what is cached"):
        model.generate(**given, attention_mask=torch.ones(2, 5).long(), **LENGTH)


@pytest.mark.parametrize("kind", SUBJECTS)
def test_nothing_to_read_is_refused(kind):
    subject = loaded(SUBJECTS[kind]())
    nothing = torch.zeros(1, 0).long()
    for way in (*ways(subject, input_ids=nothing),)[: 2 if kind == "source" else 3]:
        with pytest.raises(UserError, match="at least one token"):
            way()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": IDS, "input_ids": IDS}, "Give inputs or input_ids, not both"),
        ({"inputs": IDS[0]}, r"inputs must be token ids \(B, S\).* shape \(7,\)"),
        ({"inputs": IDS.float()}, r"inputs must be token ids .* float32 and shape \(2, 7\)"),
        ({"inputs": torch.zeros(2, 7, 32)}, "inputs must be token ids .* or be given as inputs_embeds="),
        ({"inputs": IDS.tolist()}, "inputs must be token ids"),
        ({"inputs": IDS, "attention_mask": torch.ones(2, 7).tolist()}, "attention_mask must have the shape"),
        ({"inputs": IDS, "custom_generate": "org/other"}, "custom_generate: loaded.generate has its own"),
        (
            {"inputs": IDS, "decoder_view": view_for(tiny_model())},
            "decoder_view: loaded.generate has its own",
        ),
        ({"inputs": IDS, "decode_stats": DecodeStats}, r"decode_stats must be an object, DecodeStats\(\)"),
        ({"inputs": IDS, "decode_stats": 3}, "decode_stats must be an object"),
    ],
)
@pytest.mark.parametrize("kind", SUBJECTS)
def test_what_is_no_input_is_refused(kind, given, message):
    with pytest.raises(UserError, match=message) as raised:
        loaded(SUBJECTS[kind]()).generate(**given, **LENGTH)
    assert "\n" not in str(raised.value)


def test_positions_of_other_rows_are_refused():
    for way in ways(loaded(tiny_causal()), input_ids=IDS, position_ids=torch.arange(21).view(3, 7)):
        with pytest.raises(UserError, match=r"position_ids.* shape \(3, 7\), and the prompt 2 rows"):
            way()


def test_embeddings_of_other_rows_than_the_ids_are_refused():
    model = tiny_causal()
    given = {"input_ids": IDS, "inputs_embeds": model.get_input_embeddings()(IDS[:1])}
    with pytest.raises(UserError, match="inputs_embeds has 1 rows and input_ids 2"):
        model.generate(**given, custom_generate=early_exit_decode, **LENGTH)


def test_the_own_loop_and_view_may_be_named():
    subject = loaded(tiny_causal())
    own = {"custom_generate": early_exit_decode, "decoder_view": subject.view}
    assert torch.equal(subject.generate(IDS, **own, **LENGTH), subject.generate(IDS, **LENGTH))


@pytest.mark.parametrize("threads", [0, -3, 1.5])
def test_no_threads_are_refused(threads):
    with pytest.raises(UserError, match=f"threads must be a whole number from 1 on, got {threads}"):
        prepare(loaded(tiny_model()), threads=threads)


def test_the_exported_repository_counts_in_a_dict():
    with pytest.raises(UserError, match="decode_stats must be a dict"):
        custom_generate.generate(IDS, model=tiny_model(), decode_stats=DecodeStats(), shallow_layer=2)
