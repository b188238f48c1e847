"""Training on real rows, for every family: exit losses, heads, LoRA and precisions; saved and reloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from every_method import decode_with_every_method
from pairs import covering, thin
from programs import run_program
from tiny_models import FAMILIES, greedy, padded_inputs, tiny_model
from transformers import AutoTokenizer, set_seed

import run
from models.decoding import early_exit_decode
from models.errors import UserError
from models.loading import cast_model, load_model
from models.losses import INTERMEDIATE_LOSSES
from util.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
HEADS = {  # so that each kind of head is trained and reloaded by some loss
    "weighted_ce": {"per_exit_head": "norm"},
    "shallowdeep_kd_last": {"do_layer_transformation": True},
    "shallowdeep_kd_dyna": {"per_exit_head": "projection"},
}
# A loss for each family, each loss for some family, and each kind of head for both kinds of layers.
TRAINED = covering(FAMILIES, INTERMEDIATE_LOSSES)
TRAINED += [(family, name) for family in ("t5-tied", "bart-tied") for name in HEADS]
ONE_EACH = thin(FAMILIES, ["t5-tied", "bart-tied"])


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """A folder with a tiny random model of the family and a real vocabulary."""
    folder = tmp_path_factory.mktemp("base") / request.param
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
    vocabulary = {"vocab_size": len(tokenizer)}
    if request.param == "marian":
        vocabulary["decoder_vocab_size"] = len(tokenizer)
    tiny_model(request.param, num_layers=4, **vocabulary).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(base, output_dir, steps, **flags):
    """Train `base` on real rows; the trained model, in memory."""
    settings = {
        "model_name_or_path": base,
        "task": "translation",
        "dataset_name": "debian_de_en",
        "max_train_samples": 24,
        "max_source_length": 24,
        "max_target_length": 16,
        "do_train": True,
        "output_dir": output_dir,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    argv = [word for name, value in (settings | flags).items() for word in (f"--{name}", str(value))]
    arguments = parse_arguments(argv)
    set_seed(arguments.training.seed)  # as run.run does
    loaded = run.build_model(arguments)
    run.train(arguments, arguments.exit, loaded)
    loaded.model.eval()
    return loaded


def exit_loss_flags(name):
    layer = {} if name in ("ce", "weighted_ce") else {"shallow_exit_layer": 2}
    return {"intermediate_loss_fn": name} | layer


def same(first, second):
    """Equal up to JSON."""
    return json.loads(json.dumps(first)) == json.loads(json.dumps(second))


def reload_elsewhere(folders):
    """What every method decodes with the models of `folders`, loaded in a new process."""
    return json.loads(run_program("tests/every_method.py", *folders).splitlines()[-1])


def every(families):
    return pytest.mark.parametrize("base", families, indirect=True)


@pytest.mark.slow
@every(FAMILIES)
def test_every_loss_trains_saves_and_reloads(base, tmp_path):
    """In a new process for one family."""
    untrained, expected = decode_with_every_method(load_model(str(base))), {}
    for name in [name for name in INTERMEDIATE_LOSSES if (base.name, name) in TRAINED]:
        folder = str(tmp_path / name)
        loaded = train(base, folder, 4, **exit_loss_flags(name), **HEADS.get(name, {}))
        expected[folder] = decode_with_every_method(loaded)
        assert not same(expected[folder], untrained)
    if base.name == "t5-tied":
        again = reload_elsewhere(expected)
    else:
        again = {folder: decode_with_every_method(load_model(folder)) for folder in expected}
    assert same(again, expected)


@pytest.mark.slow
@every(ONE_EACH)
def test_lora_trains_saves_and_merges(base, tmp_path):
    flags = exit_loss_flags("shallowdeep_kd_dyna") | {"per_exit_head": "projection", "use_lora": True}
    trained = train(base, tmp_path, 5, **flags)
    saved = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "exit_heads.safetensors", "exit_config.json"} <= saved
    assert "model.safetensors" not in saved
    again = load_model(str(tmp_path))
    before = load_model(str(base)).model.state_dict()
    changed = {name for name, weight in again.model.state_dict().items()
               if name in before and not torch.equal(weight, before[name])}  # fmt: skip
    assert changed and all(name.split(".")[-2] in ("q", "v", "q_proj", "v_proj") for name in changed)
    for name, weight in trained.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weight)
    head = again.model.per_exit_heads["2"].linear.weight
    assert head.abs().max() > 0  # zero before training
    assert same(decode_with_every_method(again), decode_with_every_method(trained))


@pytest.mark.slow
@every(ONE_EACH)
def test_confidence_head_trains_alone(base, tmp_path):
    trained = train(base, tmp_path, 5, train_meta_cm_head=True, shallow_exit_layer=2)
    before, after = load_model(str(base)).model.state_dict(), load_model(str(tmp_path))
    assert all(torch.equal(weight, after.model.state_dict()[name]) for name, weight in before.items())
    assert same(decode_with_every_method(after), decode_with_every_method(trained))


@pytest.mark.slow
@every(ONE_EACH)
def test_bf16_trains_and_evaluates(base, tmp_path):
    loss = exit_loss_flags("shallowdeep_kd_dyna")
    train(base, tmp_path, 3, bf16=True, bf16_full_eval=True, **loss)
    loaded = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert all(weight.isfinite().all() for weight in loaded.model.parameters())
    decode_with_every_method(loaded)


@pytest.mark.parametrize("shape", ["t5-tied", "umt5", "longt5-tglobal", "bart-tied"])
def test_fp16_decodes_like_generate(shape):
    model, inputs = cast_model(tiny_model(shape), torch.float16), padded_inputs()
    ours = model.generate(**inputs, custom_generate=early_exit_decode, max_length=16, do_sample=False)
    assert torch.equal(ours, greedy(model, inputs, max_length=16))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
    tiny_model(num_layers=4, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_lora_resumes_heads_and_adapter(t5, tmp_path):
    flags = exit_loss_flags("shallowdeep_kd_dyna") | {"per_exit_head": "norm", "use_lora": True}
    flags |= {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = train(t5, tmp_path / "whole", 6, **flags)
    train(t5, tmp_path / "parts", 3, **flags)
    continued = train(t5, tmp_path / "parts", 6, **flags)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(continued.model.state_dict()[name], weight, msg=name)


@pytest.mark.slow
def test_lora_adapter_trains_on(t5, tmp_path):
    flags = exit_loss_flags("shallowdeep_ce") | {"use_lora": True}
    train(t5, tmp_path / "first", 3, **flags)
    train(tmp_path / "first", tmp_path / "second", 3, **flags)
    first, second = (load_model(str(tmp_path / name)).model.state_dict() for name in ("first", "second"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_lora_targets_that_do_not_exist_are_named(t5, tmp_path):
    with pytest.raises(UserError, match="target_modules of LoRA"):
        train(t5, tmp_path, 1, use_lora=True, lora_target_modules="wq", **exit_loss_flags("shallowdeep_ce"))


@pytest.mark.slow
def test_layerdrop_does_not_shift_the_layers_of_the_loss(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
    tiny_model("bart-tied", num_layers=4, vocab_size=len(tokenizer), decoder_layerdrop=0.9).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    train(tmp_path, tmp_path / "out", 3, **exit_loss_flags("ce"))  # fails where layers are dropped
