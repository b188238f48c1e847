"""Models cut after a layer: plain transformers decodes them as Static-Exiting decodes the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_causal import CAUSAL_FAMILIES, prompts, tiny_causal
from tiny_models import FAMILIES, SHAPES, padded_inputs, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from models import (
    StaticExit,
    UserError,
    attach_exit_adapter,
    early_exit_decode,
    load_model,
    make_exit_adapter,
    save_exit_adapter,
    view_for,
)
from models.exit_heads import ExitConfig, attach_exit_heads
from scripts import export_static

ROOT = Path(__file__).resolve().parent.parent
LENGTH = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1}  # lest one token fill it all
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
LAYER, LAYERS = 2, 6
UNTIED = ("t5-untied", "bart-untied", "llama-untied", "gpt2-untied")


@pytest.fixture
def save(tmp_path):
    """A function that saves a model with a tokenizer: the folder."""

    def write(model):
        model.save_pretrained(tmp_path / "whole")
        TOKENIZER.save_pretrained(tmp_path / "whole")
        return tmp_path / "whole"

    return write


def random_model(family):
    make = tiny_model if family in SHAPES else tiny_causal
    sizes = {"decoder_vocab_size": len(TOKENIZER)} if family == "marian" else {}
    return make(family, num_layers=LAYERS, vocab_size=len(TOKENIZER), **sizes)


def random_inputs(family):
    return padded_inputs(2) if family in SHAPES else prompts(2)


def decode_static(model, inputs, layer=LAYER):
    options = {"custom_generate": early_exit_decode, "exit_policy": StaticExit(layer)}
    return model.generate(**inputs, **options, **LENGTH).tolist()


def cut(source, target, *flags):
    export_static.main(["--model_name_or_path", str(source), "--output_dir", str(target), *flags])
    return load_plain(target)


def load_plain(folder):
    """By transformers alone, which must miss no weight and ignore none."""
    encoder = json.loads((folder / "config.json").read_text()).get("is_encoder_decoder", False)
    auto = AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def refusal(source, target, *flags):
    with pytest.raises(UserError) as error:
        export_static.export(parse(source, target, *flags))
    return str(error.value)


def parse(source, target, *flags):
    words = ["--model_name_or_path", str(source), "--output_dir", str(target), *flags]
    (parsed,) = export_static.parse_groups((export_static.StaticArguments,), "", words)
    return parsed


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *CAUSAL_FAMILIES, *UNTIED])
def test_tokens_equal_static_exiting(family, save, tmp_path):
    model, inputs = random_model(family), random_inputs(family)
    folder = save(model)
    plain = cut(folder, tmp_path / "cut", "--layer", str(LAYER))
    assert view_for(plain).num_layers == LAYER
    whole = load_model(str(folder)).model
    expected = decode_static(whole, inputs)
    assert plain.generate(**inputs, **LENGTH).tolist() == expected
    assert decode_static(whole, inputs, LAYERS) != expected, "all depths agree"


@pytest.mark.parametrize("name", ["debian-t5-free", "debian-bart-free", "debian-llama-free"])
def test_embedded_checkpoints(name, tmp_path):
    source = ROOT / "checkpoints" / name
    plain = cut(source, tmp_path)
    loaded = load_model(str(source))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Entwicklungsdateien für die Bibliothek" + "\n\nTranslation:" * ("llama" in name)
    inputs = tokenizer([text], return_tensors="pt")
    assert inputs["input_ids"].tolist() == loaded.tokenizer([text])["input_ids"]
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert plain.generate(**inputs, **LENGTH).tolist() == decode_static(loaded.model, inputs, 2)
    ends = (plain.generation_config.eos_token_id, plain.generation_config.pad_token_id)
    assert ends == (loaded.model.generation_config.eos_token_id, loaded.model.generation_config.pad_token_id)
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * (source / "model.safetensors").stat().st_size
    assert not (tmp_path / "exit_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5-tied", "llama-tied", "gpt2-tied", "mbart"])
def test_the_norm_of_an_exit_adapter_becomes_the_final_one(family, save, tmp_path):
    folder, inputs = save(random_model(family)), random_inputs(family)
    model = load_model(str(folder)).model
    adapter = make_exit_adapter(view_for(model), "norm", LAYER)
    torch.manual_seed(3)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, 1.0, 0.5)
    before = decode_static(model, inputs)
    attach_exit_adapter(model, adapter)
    save_exit_adapter(model, tmp_path / "adapter", base_model=str(folder))
    flags = ["--exit_adapter_path", str(tmp_path / "adapter")]
    expected = decode_static(model, inputs)
    plain = cut(folder, tmp_path / "cut", *flags)
    assert plain.generate(**inputs, **LENGTH).tolist() == expected != before
    assert "--layer 3: the exit adapter stands after 2" in refusal(folder, tmp_path, *flags, "--layer", "3")


@pytest.mark.parametrize("kind", ["projection", "layer"])
def test_adapters_that_no_plain_model_has_are_refused(kind, save, tmp_path):
    folder = save(random_model("llama-tied"))
    model = load_model(str(folder)).model
    attach_exit_adapter(model, make_exit_adapter(view_for(model), kind, LAYER))
    save_exit_adapter(model, tmp_path / "adapter", base_model=str(folder))
    line = refusal(folder, tmp_path / "cut", "--exit_adapter_path", str(tmp_path / "adapter"))
    assert f"an adapter with the kind {kind} has no place in llama" in line


@pytest.mark.slow
def test_heads_of_the_exit_are_refused_and_others_left_out(save, tmp_path):
    model = random_model("t5-tied")
    folder, exits = (
        save(model),
        ExitConfig(train_meta_cm_head=True, per_exit_head="norm", shallow_exit_layer=3),
    )
    attach_exit_heads(model, exits)
    model.save_pretrained(folder)
    exits.save(folder)
    assert "after layer 3 has a head of its own" in refusal(folder, tmp_path / "cut")
    plain, inputs = cut(folder, tmp_path / "cut", "--layer", "2"), random_inputs("t5-tied")
    assert plain.generate(**inputs, **LENGTH).tolist() == decode_static(load_model(str(folder)).model, inputs)


def test_layers_that_there_are_not_are_refused(save, tmp_path):
    folder = save(random_model("opt-350m"))
    assert "--layer must lie in 1..5, got 6" in refusal(folder, tmp_path, "--layer", "6")
    assert "Give --layer" in refusal(folder, tmp_path)


def test_a_family_that_counts_otherwise_is_refused(save, tmp_path):
    loaded = load_model(str(save(random_model("llama-tied"))))
    loaded.model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="llama cannot be cut: its configuration names 6 decoder layers"):
        export_static.cut_after(loaded, 2)
