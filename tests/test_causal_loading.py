"""Decoder-only checkpoints: saves of ours and of others, as on the hub, adapters; and those to refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from every_method import decode_with_every_method
from programs import run_program
from safetensors.torch import load_file, save_file
from tiny_causal import decode_causal, greedy_causal, prompts, tiny_causal
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from models import UserError, create_model, load_model
from models.exit_heads import ExitConfig, attach_exit_heads
from models.loading import cast_model
from models.lora import add_lora
from util.data.preparation import prepare
from util.data_arguments import DataArguments

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("llama-untied", "gemma3", "gpt2-tied", "pythia", "opt-350m")  # one of each view
OLD_BUFFERS = {  # in released checkpoints of early transformers
    "gpt2-tied": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
    "pythia": ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias",
               "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
    "llama-tied": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
}  # fmt: skip
WITHOUT_PREFIX = {"gpt2-tied": "transformer.", "opt-tied": "model."}  # as on the hub


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")


def save(shape, folder, tokenizer, **overrides):
    model = tiny_causal(shape, num_layers=4, vocab_size=len(tokenizer), **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def rewrite(folder, change):
    """The weights of a save, changed."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.slow
def test_saves_with_exit_heads_are_the_same_in_a_new_process(tmp_path, tokenizer):
    expected = {}
    for shape in KINDS:
        folder = tmp_path / shape
        model = save(shape, folder, tokenizer)
        exit_config = ExitConfig("shallowdeep_ce", 2, train_meta_cm_head=True, per_exit_head="projection")
        attach_exit_heads(model, exit_config)
        torch.manual_seed(1)
        for head in (model.cm_head, model.per_exit_heads):
            for weight in head.parameters():
                torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(folder)
        exit_config.save(folder)
        loaded = load_model(str(folder))
        assert loaded.exit_config == exit_config
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], weight), name
        expected[str(folder)] = decode_with_every_method(loaded)
        assert any(2 in row for row in expected[str(folder)]["free"][1])
    again = json.loads(run_program("tests/every_method.py", *expected).splitlines()[-1])
    assert again == json.loads(json.dumps(expected))


@pytest.mark.parametrize("shape", OLD_BUFFERS)
def test_buffers_of_early_checkpoints_are_no_weights(shape, tmp_path, tokenizer):
    model = save(shape, tmp_path, tokenizer)
    buffers = {name: torch.ones(1, 1, 4, 4) for name in OLD_BUFFERS[shape]}
    rewrite(tmp_path, lambda weights: weights | buffers)
    inputs = prompts(2)
    assert torch.equal(decode_causal(load_model(str(tmp_path)).model, inputs), greedy_causal(model, inputs))


@pytest.mark.parametrize("shape", WITHOUT_PREFIX)
def test_weights_named_as_on_the_hub(shape, tmp_path, tokenizer):
    model = save(shape, tmp_path, tokenizer)
    prefix = WITHOUT_PREFIX[shape]
    rewrite(tmp_path, lambda weights: {name.removeprefix(prefix): weights[name] for name in weights})
    loaded = load_model(str(tmp_path)).model
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_missing_and_unknown_weights_are_named(tmp_path, tokenizer):
    save("llama-untied", tmp_path, tokenizer)
    lost = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda all_: {name: all_[name] for name in all_ if name != lost} | {"x": all_[lost]})
    with pytest.raises(UserError, match=rf"missing: {lost}.*unexpected: x"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("shape", KINDS)
def test_adapters_give_peft_s_own_outputs(shape, tmp_path, tokenizer):
    """Trained by us or by others; those of GPT-2 transpose its weights."""
    base, inputs = tmp_path / "base", prompts(2)
    save(shape, base, tokenizer)
    adapted = add_lora(AutoModelForCausalLM.from_pretrained(base), 4, 8, 0.0)
    assert isinstance(adapted, peft.PeftModelForCausalLM)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.eval()(**inputs).logits
    for merge in (True, False):
        loaded = load_model(str(tmp_path / "adapter"), merge_adapter=merge)
        torch.testing.assert_close(loaded.model(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
        output = loaded.generate(**inputs, do_sample=False, max_new_tokens=4)
        assert torch.equal(output, greedy_causal(adapted, inputs, max_new_tokens=4))
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(**inputs).logits, expected)


def test_prompts_are_padded_on_the_left_with_the_end_if_there_is_nothing_else(tmp_path):
    vocabulary = {token: index for index, token in enumerate(["<end>", "a", "b", "c", "Ġ"])}
    own = GPT2Tokenizer(vocab=vocabulary, merges=[], unk_token="<end>", bos_token="<end>", eos_token="<end>")
    assert own.pad_token is None
    save("gpt2-tied", tmp_path, own, pad_token_id=None, eos_token_id=0, bos_token_id=0)
    loaded = load_model(str(tmp_path))
    inputs = loaded.tokenizer(["abc", "a"], padding=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [0, 0, 1]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    output = loaded.generate(**inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    alone = torch.tensor([[1]])
    expected = greedy_causal(loaded.model, {"input_ids": alone}, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(output[1, 2:], expected[0])


def test_tokens_may_be_added_beyond_the_vocabulary_but_not_be_of_another(tmp_path, tokenizer):
    """As Gemma 3's text models have a tokenizer with a token for images."""
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<image>"])
    tiny_causal(num_layers=1, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    more.save_pretrained(tmp_path)
    assert len(load_model(str(tmp_path)).tokenizer) == len(tokenizer) + 1
    tiny_causal(num_layers=1, vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokens, but the model a vocab_size of 100"):
        load_model(str(tmp_path))


def test_create_model_from_a_config(tmp_path, tokenizer):
    save("qwen3", tmp_path, tokenizer)
    created = create_model(str(tmp_path), str(tmp_path))
    assert type(created.model).__name__ == "Qwen3ForCausalLM" and created.tokenizer.padding_side == "left"
    assert created.view.num_layers == 4


def test_families_without_a_view_are_refused_before_their_weights_are_read(tmp_path):
    transformers.MixtralConfig().save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(UserError, match=r"model family 'mixtral' \(supported: .*llama"):
        load_model(str(tmp_path))


def test_prompt_and_output_together_must_fit_the_positions(tmp_path, tokenizer):
    save("llama-tied", tmp_path, tokenizer)
    data = DataArguments("translation", "debian_de_en", max_source_length=40, val_max_target_length=25)
    with pytest.raises(
        UserError, match=r"^--max_source_length \+ --val_max_target_length 65: llama has 64 pos"
    ):
        prepare(load_model(str(tmp_path)), data)


@pytest.mark.parametrize("shape", KINDS)
def test_a_cast_is_what_is_loaded_in_that_precision(shape, tmp_path, tokenizer):
    save(shape, tmp_path, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = cast_model(load_model(str(tmp_path)).model, torch.bfloat16)
    frequencies = {name: value for name, value in theirs.named_buffers() if "inv_freq" in name}
    assert bool(frequencies) == (shape not in ("gpt2-tied", "opt-350m"))
    own = {**ours.state_dict(), **dict(ours.named_buffers())}
    for name, value in {**theirs.state_dict(), **frequencies}.items():
        assert own[name].dtype == value.dtype and torch.equal(own[name], value), name
