"""Checkpoints of every origin: the original FREE layout, plain saves, shards; and those to refuse."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from tiny_models import padded_inputs, tiny_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from models import custom_generate
from models.errors import UserError
from models.exit_adapter import attach_exit_adapter, make_exit_adapter
from models.exit_adapter_files import save_exit_adapter
from models.exit_heads import ExitConfig, attach_exit_heads, make_per_exit_heads
from models.families import view_for
from models.loading import cast_model, create_model, load_model

CHECKPOINT = "checkpoints/debian-t5-free"
FREE_KEYS = {  # as the original wrote its flags into config.json
    "shallow_exit_layer": 2,
    "intermediate_loss_fn": "shallowdeep_kd_dyna",
    "distill_layer_alpha": 0.5,
    "do_layer_transformation": True,
    "train_meta_cm_head": True,
    "use_shallow_deep": True,
    "use_early_exit": False,
    "rollback_conf_threshold": None,
    "exit_conf_type": "softmax",
}
SENTENCES = ["ein Werkzeug", "eine Bibliothek", "Entwicklungsdateien", "gemeinsam genutzte Dateien"] * 5


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A sentencepiece vocabulary, which is all that an original checkpoint has for a tokenizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=30,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def save_as_original(model, folder, spiece, **config):
    """The layout of transformers 4.28: FREE's keys in config.json, pytorch_model.bin, no tokenizer.json."""
    settings = json.loads(model.config.to_json_string()) | FREE_KEYS | config
    settings.pop("scale_decoder_outputs", None)  # unknown then: derived from tie_word_embeddings
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_version": "4.28.1"}))
    weights = model.state_dict()
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["shared.weight"]
    weights["decoder.lm_head.weight"] = weights["lm_head.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "spiece.model").write_bytes(spiece)
    tokenizer = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.fixture(params=["t5-tied", "t5-untied"])
def original(request, tmp_path, spiece):
    """An original checkpoint with both heads, and the model that it was saved from."""
    model = tiny_model(request.param, seed=3)
    attach_exit_heads(model, ExitConfig(do_layer_transformation=True, train_meta_cm_head=True))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    tied = request.param == "t5-tied"
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    save_as_original(model, tmp_path, spiece, tie_word_embeddings=tied)
    return tmp_path, model


def test_original_checkpoint_loads_whole(original):
    folder, model = original
    loaded = load_model(str(folder))
    inputs = padded_inputs() | {"decoder_input_ids": torch.tensor([[0, 4, 9]])}
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs).logits, model(**inputs).logits)
    for head in ("cm_head", "layer_transformation"):
        expected = getattr(model, head).state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in
                   getattr(loaded.model, head).state_dict().items())  # fmt: skip
    assert loaded.exit_config.shallow_exit_layer == 2
    assert loaded.exit_config.intermediate_loss_fn == "shallowdeep_kd_dyna"
    assert loaded.tokenizer.decode(loaded.tokenizer("ein Werkzeug").input_ids[:-1]) == "ein Werkzeug"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_original_checkpoint_loads_in_half_precision(original, dtype):
    folder, model = original
    head = load_model(str(folder), dtype=dtype).model.lm_head.weight
    assert torch.equal(head, model.lm_head.weight.to(dtype))


def test_original_checkpoint_survives_our_save(original, tmp_path):
    folder, _ = original
    loaded = load_model(str(folder))
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "ours")
    loaded.exit_config.save(tmp_path / "ours")
    again = load_model(str(tmp_path / "ours"))
    assert again.exit_config == loaded.exit_config
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_heads_that_the_config_does_not_announce_are_found(original):
    folder, model = original
    config = json.loads((folder / "config.json").read_text())
    del config["train_meta_cm_head"], config["do_layer_transformation"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(folder))
    assert loaded.exit_config.train_meta_cm_head and loaded.exit_config.do_layer_transformation
    assert torch.equal(loaded.model.cm_head[0].weight, model.cm_head[0].weight)


@pytest.mark.parametrize("kind", ["norm", "projection"])
@pytest.mark.parametrize("shallow", [None, 2])
def test_per_exit_heads_that_no_config_announces_are_found(tmp_path, kind, shallow):
    loaded, exits = load_model(CHECKPOINT), ExitConfig(per_exit_head=kind, shallow_exit_layer=shallow)
    attach_exit_heads(loaded.model, exits)
    for weight in loaded.model.per_exit_heads.parameters():
        torch.nn.init.normal_(weight)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert again.exit_config == exits
    expected = loaded.model.per_exit_heads.state_dict()
    held = again.model.per_exit_heads.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(("layers", "exits"), [([1, 3], ExitConfig()), ([3], ExitConfig("ce", 2))])
def test_heads_of_some_layers_that_no_config_announces_are_found(tmp_path, layers, exits):
    """By the toolkit, and by what a model's own `generate` reads."""
    loaded = load_model(CHECKPOINT)
    loaded.model.per_exit_heads = make_per_exit_heads("norm", layers, loaded.model.config.hidden_size)
    for weight in loaded.model.per_exit_heads.parameters():
        torch.nn.init.normal_(weight)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    exits.save(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    custom_generate.exits_of(plain)
    for model in (load_model(str(tmp_path)).model, plain):
        held, expected = model.per_exit_heads.state_dict(), loaded.model.per_exit_heads.state_dict()
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[name], weight) for name, weight in expected.items())


def test_a_later_training_for_one_exit_keeps_the_heads_of_the_others(tmp_path):
    loaded = load_model(CHECKPOINT)
    attach_exit_heads(loaded.model, ExitConfig(per_exit_head="norm"))
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    ExitConfig(per_exit_head="norm", shallow_exit_layer=2).save(tmp_path)
    held = load_model(str(tmp_path)).model.per_exit_heads
    assert set(held) == set(loaded.model.per_exit_heads)


def test_heads_of_no_exit_are_refused(tmp_path):
    loaded = load_model(CHECKPOINT)
    loaded.model.per_exit_heads = make_per_exit_heads("norm", [99], loaded.model.config.hidden_size)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    ExitConfig(per_exit_head="norm", shallow_exit_layer=2).save(tmp_path)
    with pytest.raises(UserError, match=r"missing: per_exit_heads\.2.*unexpected: per_exit_heads\.99"):
        load_model(str(tmp_path))


def test_all_misfits_are_named_in_one_message(original):
    folder, model = original
    weights = model.state_dict()
    weights.pop("decoder.final_layer_norm.weight")
    weights.pop("layer_transformation.bias")
    weights["cm_head.0.weight"] = torch.zeros(3, 3)
    weights["decoder.surprise"] = torch.zeros(1)
    weights["decoder.lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    for name in (
        "final_layer_norm",
        "layer_transformation.bias",
        "cm_head.0.weight",
        "decoder.surprise",
        "decoder.lm_head",
    ):
        assert name in str(caught.value)


def test_sharded_checkpoint_with_heads(tmp_path):
    loaded = load_model(CHECKPOINT)
    attach_exit_heads(loaded.model, ExitConfig(train_meta_cm_head=True))
    loaded.model.save_pretrained(tmp_path, max_shard_size="8MB")
    loaded.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = load_model(str(tmp_path))
    assert torch.equal(again.model.cm_head[0].weight, loaded.model.cm_head[0].weight)


def test_plain_save_has_no_heads(tmp_path):
    loaded = load_model(CHECKPOINT)
    assert not any(hasattr(loaded.model, name) for name in ("cm_head", "layer_transformation"))
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).exit_config == ExitConfig()


class Exploit:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_pickled_code_is_not_run(original, capsys):
    folder, _ = original
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": Exploit()}))
    with pytest.raises(UserError, match="Cannot load a model"):
        load_model(str(folder))
    assert "must never run" not in capsys.readouterr().out


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("pytorch_model.bin", b"", "pytorch_model.bin is empty; copy or download it again"),
        ("pytorch_model.bin", POINTER, "pytorch_model.bin is only a pointer; run `git lfs pull`"),
        ("pytorch_model.bin", 1000, "Cannot load a model"),
        ("model.safetensors", b"", "model.safetensors is empty; copy or download it again"),
        ("model.safetensors", POINTER, "model.safetensors is only a pointer"),
        ("model.safetensors", 1000, "Cannot load a model"),
        ("model.safetensors.index.json", b"{}", "index.json lacks a weight_map from names to files"),
        ("model.safetensors.index.json", b"[]", "index.json must hold a JSON object"),
        ("model.safetensors.index.json", b"", "index.json: not JSON"),
        ("config.json", b"3", "config.json must hold a JSON object, not 3"),
        ("config.json", {"d_model": "wide"}, "expected int, got str"),
        ("config.json", {"d_model": 10**30}, "d_model 1000000000000000000000000000000 is too large"),
        ("config.json", {"d_model": -1}, "negative dimension"),
        ("config.json", {"d_ff": 40}, r"does not fit its architecture; .*wrong shape: .*DenseReluDense"),
        ("exit_config.json", b"[]", "exit_config.json must hold a JSON object"),
    ],
)
def test_damaged_checkpoints_are_named_in_one_line(tmp_path, file, content, message):
    model = tiny_model("t5-tied", seed=3)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if file == "pytorch_model.bin":
        torch.save(model.state_dict(), tmp_path / file)
    if file != weights.name and file.startswith(("pytorch", "model")):
        weights.unlink()
    if isinstance(content, dict):
        content = json.dumps(json.loads((tmp_path / file).read_text()) | content).encode()
    (tmp_path / file).write_bytes(
        content if isinstance(content, bytes) else (tmp_path / file).read_bytes()[:content]
    )
    with pytest.raises(UserError, match=message) as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes", [{"d_model": "wide"}, {"d_model": 10**30}, {"num_heads": 0}])
def test_impossible_configs_make_no_model(tmp_path, sizes):
    path = tmp_path / "config.json"
    settings = json.loads(tiny_model("t5-tied").config.to_json_string()) | sizes
    path.write_text(json.dumps(settings | {"vocab_size": 4096}))
    with pytest.raises(UserError, match=r"config\.json") as error:
        create_model(str(path), CHECKPOINT)
    assert "\n" not in str(error.value)


def test_remote_code_is_refused(tmp_path):
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text("print('this must never run')")
    with pytest.raises(UserError, match=r"evil|custom code|trust_remote_code"):
        load_model(str(tmp_path))


def tensors_of(model):
    """All that a model computes with, also what no file holds."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def assert_same_tensors(ours, theirs):
    ours, theirs = tensors_of(ours), tensors_of(theirs)
    assert {name: value.dtype for name, value in ours.items()} == {
        name: value.dtype for name, value in theirs.items()
    }
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_is_what_is_loaded_in_that_precision(tmp_path, dtype):
    AutoModelForSeq2SeqLM.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=dtype)
    kinds = {weight.dtype for weight in theirs.state_dict().values()}
    assert kinds == ({dtype, torch.float32} if dtype == torch.float16 else {dtype})  # it overflows in T5
    assert_same_tensors(cast_model(load_model(str(tmp_path)).model, dtype), theirs)


def test_an_exit_adapter_changes_no_weight_of_a_model_in_half_precision(tmp_path):
    model = tiny_model("t5-tied", num_layers=4, vocab_size=4096)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    attach_exit_adapter(model, make_exit_adapter(view_for(model), "norm", 2))
    save_exit_adapter(model, tmp_path / "exit")
    with_exit = load_model(str(tmp_path), dtype=torch.float16, exit_adapter=str(tmp_path / "exit")).model
    del with_exit.exit_adapter
    assert_same_tensors(with_exit, AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16))


@pytest.mark.parametrize("name", ["t5_tiny_tied", "tiny24"])
def test_checkpoints_that_the_original_wrote_load(name, tmp_path, spiece):
    for file in ("config.json", "pytorch_model.bin"):
        shutil.copy(Path("tests/golden", name, file), tmp_path)
    (tmp_path / "spiece.model").write_bytes(spiece)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    loaded = load_model(str(tmp_path))
    for key, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, weights[key].float()), key
