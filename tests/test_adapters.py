"""Adapters of PEFT, ours and others': merged or kept apart, they give PEFT's own outputs, or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import padded_inputs, tiny_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from models.errors import UserError
from models.exit_heads import ExitConfig, attach_exit_heads, exit_head_weights
from models.families import view_for
from models.loading import load_model
from util.loss_arguments import LoraArguments
from util.training.train import with_adapter

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints/debian-t5-free"
QUERIES = r".*\.(q|q_proj)$"
LORA = {"target_modules": QUERIES, "init_lora_weights": False}
PLAIN = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **LORA)
SERVED = {
    "lora": PLAIN,
    "resized embeddings": PLAIN,
    "modules_to_save": peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **LORA, modules_to_save=["lm_head"]),
    "trained tokens": peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **LORA, trainable_token_indices=[3, 4]),
    "ia3": peft.IA3Config(
        task_type="SEQ_2_SEQ_LM", target_modules=QUERIES, feedforward_modules=[], init_ia3_weights=False
    ),
}
REFUSED = {
    "prompt tuning": peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    "prefix tuning": peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    "share their weights": peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", target_modules=["shared"], init_lora_weights=False
    ),
}


@pytest.fixture(scope="module", params=["t5-tied", "t5-untied", "marian"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    sizes = {"vocab_size": len(tokenizer)}
    sizes |= {"decoder_vocab_size": len(tokenizer)} if request.param == "marian" else {}
    tiny_model(request.param, num_layers=3, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapt(base, config, extra_tokens=0):
    """PEFT's model; it writes to the configuration, which must stay ours."""
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    if extra_tokens:
        size = model.config.vocab_size + extra_tokens
        model.resize_token_embeddings(size, mean_resizing=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.PeftConfig.from_peft_type(**config.to_dict())).eval()
    for name, weight in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(weight)
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_loaded_adapters_give_the_outputs_of_peft(base, tmp_path, name):
    adapted = adapt(base, SERVED[name], extra_tokens=8 if name == "resized embeddings" else 0)
    adapted.save_pretrained(tmp_path)
    batch = padded_inputs(2) | {"decoder_input_ids": torch.tensor([[0, 5, 9], [0, 3, 4]])}
    with torch.no_grad():
        expected = adapted(**batch).logits
        for merge in (True, False):
            model = load_model(str(tmp_path), merge_adapter=merge).model
            outputs = model(**batch, output_hidden_states=True)
            torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-4)
            view = view_for(model)
            last = view.training_states(outputs)[-1]
            torch.testing.assert_close(view.project(last), expected, rtol=1e-4, atol=1e-4)
            few = torch.tensor([7, 1])
            torch.testing.assert_close(
                view.projection_onto(few)(last), expected[..., few], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("reason", REFUSED)
def test_adapters_that_no_weights_can_hold_are_refused(base, tmp_path, reason):
    adapted = adapt(base, REFUSED[reason])
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason) as refusal:
        load_model(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.fixture
def adapter(tmp_path):
    adapt(CHECKPOINT, PLAIN).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_an_adapter_brings_its_own_tokenizer(adapter):
    assert "<extra>" not in load_model(str(adapter)).tokenizer.get_vocab()  # the base's
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(UserError, match="tokens, but the model"):
        load_model(str(adapter))
    adapt(CHECKPOINT, PLAIN, extra_tokens=1).save_pretrained(adapter)
    loaded = load_model(str(adapter))
    assert loaded.tokenizer("<extra>", add_special_tokens=False).input_ids == [len(tokenizer) - 1]
    assert "<extra>" not in load_model(str(adapter), str(CHECKPOINT)).tokenizer.get_vocab()


def test_exit_heads_beside_an_adapter_are_found_or_refused(adapter):
    base = load_model(str(CHECKPOINT)).model
    attach_exit_heads(base, ExitConfig(per_exit_head="norm"))
    torch.nn.init.normal_(base.per_exit_heads["1"].weight)
    heads = exit_head_weights(base.state_dict())
    save_file(heads, adapter / "exit_heads.safetensors")
    loaded = load_model(str(adapter))
    assert loaded.exit_config.per_exit_head == "norm"
    assert torch.equal(loaded.model.per_exit_heads["1"].weight, base.per_exit_heads["1"].weight)
    save_file(heads | {"cm_head.7.weight": torch.zeros(1)}, adapter / "exit_heads.safetensors")
    with pytest.raises(UserError, match=r"unexpected: cm_head\.7\.weight"):
        load_model(str(adapter))


def damage_config(folder):
    (folder / "adapter_config.json").write_text("{}")


def drop_base(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))


def move_base(folder):
    path = folder / "adapter_config.json"
    moved = {"base_model_name_or_path": str(folder / "gone" / "base")}
    path.write_text(json.dumps(json.loads(path.read_text()) | moved))


def cut_weights(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def drop_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("damage", [damage_config, drop_base, move_base, cut_weights, drop_weights])
def test_damaged_adapters_are_refused_in_a_line(adapter, damage):
    damage(adapter)
    with pytest.raises(UserError) as refusal:
        load_model(str(adapter))
    assert "\n" not in str(refusal.value) and str(adapter) in str(refusal.value)


CONTRADICTIONS = {"lora_rank": (64, 8), "lora_alpha": (64, 8), "lora_dropout": (0.5, 0.0)}  # PEFT's defaults


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_flags_that_contradict_the_adapter_to_train_on_are_refused(adapter, name):
    model = load_model(str(adapter), merge_adapter=False).model
    given, own = CONTRADICTIONS[name]
    with pytest.raises(UserError, match=f"--{name} {given} contradicts the adapter .*, which has {own}"):
        with_adapter(model, LoraArguments(use_lora=True, **{name: given}))
    assert with_adapter(model, LoraArguments(use_lora=True, **{name: own})) is model
    assert with_adapter(model, LoraArguments(use_lora=True)) is model


def test_targets_that_contradict_the_adapter_to_train_on_are_refused(tmp_path):
    adapt(CHECKPOINT, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])).save_pretrained(
        tmp_path
    )
    model = load_model(str(tmp_path), merge_adapter=False).model
    with pytest.raises(UserError, match=r"--lora_target_modules \['q'\] contradicts"):
        with_adapter(model, LoraArguments(use_lora=True, lora_target_modules=["q"]))
    flags = LoraArguments(use_lora=True, lora_target_modules=["v", "q"])
    assert with_adapter(model, flags) is model
