"""Training decoder-only models: losses against Hugging Face's and a slow reference, and run.py's training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairs import covering, slow_but, thin
from tiny_causal import CAUSAL_FAMILIES, tiny_causal
from transformers import AutoTokenizer

import run
from models.exit_heads import ExitConfig, attach_exit_heads
from models.families import view_for
from models.loading import load_model
from models.lora import add_lora
from models.losses import build_confidence_head_loss, build_exit_loss

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "checkpoints/debian-t5-free"
DATA = {
    "task": "translation",
    "dataset_name": "debian_de_en",
    "max_source_length": 24,
    "max_target_length": 12,
}
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "backend": "torch"}
LOSSES = {
    "plain": {},
    "weighted": {"intermediate_loss_fn": "weighted_ce"},
    "sum_l": {
        "intermediate_loss_fn": "sum_l", "e_scale": 0.5, "exit_curriculum": "rotational",
        "rotation_interval": 2, "layer_dropout": 0.2,
    },
    "gradual": {"intermediate_loss_fn": "ce", "exit_curriculum": "gradual", "per_exit_head": "norm"},
    "shallow-deep": {"intermediate_loss_fn": "shallowdeep_ce", "shallow_exit_layer": 2},
    "last": {"intermediate_loss_fn": "shallowdeep_kd_last", "shallow_exit_layer": 2},
    "unif": {"intermediate_loss_fn": "shallowdeep_kd_unif", "shallow_exit_layer": 2},
    "dyna": {
        "intermediate_loss_fn": "shallowdeep_kd_dyna", "shallow_exit_layer": 2,
        "do_layer_transformation": True, "gradient_accumulation_steps": 2,
    },
    "meta": {"train_meta_cm_head": True, "shallow_exit_layer": 2},
    "lora": {"use_lora": True, "intermediate_loss_fn": "shallowdeep_kd_dyna", "shallow_exit_layer": 2},
    "checkpointing": {"intermediate_loss_fn": "weighted_ce", "gradient_checkpointing": True},
}  # fmt: skip
LEARNT = thin(LOSSES, ["plain", "sum_l", "gradual", "dyna", "meta", "lora"])  # the others with some family
METHODS = {
    "full": {},
    "static": {"static_exit_layer": 2},
    "calm": {"use_early_exit": True, "exit_conf_threshold": 0.3},
    "free": {"use_shallow_deep": True, "shallow_exit_layer": 2, "shallow2deep_conf_threshold": 0.02},
    "lossless": {
        "use_shallow_deep": True, "shallow_exit_layer": 2, "shallow2deep_conf_threshold": 0.02,
        "lossless": True,
    },
}  # fmt: skip


def labelled(padding="right"):
    """Prompts of 3 and 2 tokens, answers of 4 and 2; the prompts' labels and padding count for nothing."""
    rows, answers = [[5, 9, 14, 23, 8, 31, 1], [7, 4, 12, 1]], [4, 2]
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row, answer in zip(rows, answers, strict=True):
        blank = 7 - len(row)
        for name, fill, value in (
            ("input_ids", 0, row),
            ("attention_mask", 0, [1] * len(row)),
            ("labels", -100, [-100] * (len(row) - answer) + row[-answer:]),
        ):
            filler = [fill] * blank
            batch[name].append(value + filler if padding == "right" else filler + value)
    return {name: torch.tensor(values) for name, values in batch.items()}


def features_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_the_last_layer_has_hugging_faces_own_loss():
    for family in CAUSAL_FAMILIES:
        model, batch = tiny_causal(family, num_layers=3), labelled()
        outputs = model(**batch, output_hidden_states=True)
        parts = build_exit_loss(view_for(model), "weighted_ce")(
            view_for(model), outputs, batch["labels"]
        ).parts
        torch.testing.assert_close(
            parts["ce_layer_3"], outputs.loss.detach(), msg=family, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_exit_losses_equal_a_slow_reference(family):
    """Token by token: what the exit says after each token of the prompt's end and the answer."""
    model, batch = tiny_causal(family, num_layers=4).double(), labelled()
    view = view_for(model)
    outputs = model(**features_of(batch), output_hidden_states=True)
    states = view.training_states(outputs)
    found = build_exit_loss(view, "shallowdeep_kd_unif", 2, alpha=0.5)(view, outputs, batch["labels"])
    losses = {2: [], 4: []}
    distances = []
    for row, column in ((0, 3), (0, 4), (0, 5), (0, 6), (1, 2), (1, 3)):
        read = {layer: states[layer][row, column - 1] for layer in (1, 2, 4)}
        shallow, deep = (view.normalize(read[layer], layer) for layer in (1, 2))
        last = read[4]  # already normalized
        for layer, state in ((2, deep), (4, last)):
            log_probs = view.project(state).log_softmax(-1)
            losses[layer].append(-log_probs[batch["input_ids"][row, column]])
        # Teachers of two students are layers 2 and 4.
        teacher = view.normalize(read[2], 2)
        distances.append((((shallow - teacher) ** 2).mean() + ((deep - last) ** 2).mean()) / 2)
    means = {layer: torch.stack(values).mean() for layer, values in losses.items()}
    expected = (2 * means[2] + 4 * means[4]) / 6 + 0.5 * torch.stack(distances).mean()
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["llama-tied", "mistral-window", "pythia"])
@pytest.mark.parametrize("name", ["weighted_ce", "shallowdeep_kd_dyna", "confidence head"])
def test_the_side_of_padding_changes_nothing(family, name):
    """Of models with relative positions; those that learn positions need the right side, as training pads."""
    model = tiny_causal(family, num_layers=4).double()
    attach_exit_heads(model, ExitConfig(train_meta_cm_head=True))
    view = view_for(model)
    head = name == "confidence head"
    loss = build_confidence_head_loss(view, 2) if head else build_exit_loss(view, name, 2)
    totals = []
    for padding in ("left", "right"):
        batch = labelled(padding)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        outputs = model(**features_of(batch), position_ids=positions, output_hidden_states=True)
        totals.append(loss(view, outputs, batch["labels"]).total.detach())
    torch.testing.assert_close(*totals)


def test_prompts_teach_nothing():
    model, batch = tiny_causal("gpt2-tied", num_layers=3), labelled()
    outputs = model(**features_of(batch), output_hidden_states=True)
    view = view_for(model)
    loss = build_exit_loss(view, "weighted_ce")
    changed = batch["labels"].clone()
    changed[0, 3:] = -100  # of the answers, the second's alone is left
    both, second = (loss(view, outputs, labels).parts["ce_layer_3"] for labels in (batch["labels"], changed))
    expected = F.cross_entropy(outputs.logits[1, 1:3], batch["input_ids"][1, 2:4])
    torch.testing.assert_close(second, expected.detach())
    assert both != second


def test_adapters_of_gpt2_know_its_layout(recwarn):
    adapted = add_lora(tiny_causal("gpt2-tied", num_layers=2), 4, 8, 0.0)
    assert adapted.peft_config["default"].fan_in_fan_out
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A function that saves a tiny model of a family with a real vocabulary."""
    tokenizer, folders = AutoTokenizer.from_pretrained(TOKENIZER), {}

    def save(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            settings = {"vocab_size": len(tokenizer), "initializer_range": 0.02}
            tiny_causal(family, num_layers=4, **settings).save_pretrained(folders[family])
            tokenizer.save_pretrained(folders[family])
        return str(folders[family])

    return save


def as_argv(**flags):
    given = {name: value for name, value in flags.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def train(base, folder, **flags):
    settings = {
        "model_name_or_path": base, "do_train": True, "output_dir": folder, "max_train_samples": 24,
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 3,
    }  # fmt: skip
    run.main(as_argv(**(DATA | QUIET | settings | flags)))
    return load_model(str(folder)).model.state_dict()


def evaluate(base, folder, **flags):
    settings = {"model_name_or_path": base, "output_dir": folder, "do_eval": True, "max_eval_samples": 3}
    run.main(as_argv(**(DATA | QUIET | settings | flags)))
    return json.loads(Path(folder, "eval_results.json").read_text())


def losses_of(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [row.get("ce_layer_4", row["loss"]) for row in history if "loss" in row]


@pytest.mark.parametrize("name", slow_but(["dyna"], LEARNT))
def test_every_loss_trains(bases, tmp_path, name):
    """Twenty steps on eight rows; the last layer's loss falls, the save loads, and some method decodes."""
    steps = {"max_steps": 20, "max_train_samples": 8, "logging_steps": 5, "save_strategy": "no"}
    train(bases("llama-tied"), tmp_path / "out", **LOSSES[name], **steps)
    losses = losses_of(tmp_path / "out")
    assert losses[-1] < losses[0] or name == "meta"  # whose model is frozen
    method = {"meta": "free", "weighted": "calm", "plain": "full", "sum_l": "static"}.get(name, "lossless")
    kind = {"shallow2deep_conf_type": "meta"} if name == "meta" else {}
    results = evaluate(str(tmp_path / "out"), tmp_path / "eval", **METHODS[method], **kind)
    assert results["samples"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), covering(CAUSAL_FAMILIES, list(LOSSES)))
def test_every_family_trains_and_decodes_with_every_method(bases, tmp_path, family, name):
    steps = {"max_steps": 6, "max_train_samples": 8, "save_strategy": "no"}
    train(bases(family), tmp_path / "out", **LOSSES[name], **steps)
    outputs = {}
    for method, flags in METHODS.items():
        evaluate(str(tmp_path / "out"), tmp_path / method, **flags)
        lines = (tmp_path / method / "predictions.jsonl").read_text().splitlines()
        outputs[method] = [json.loads(line)["prediction"] for line in lines]
    assert outputs["lossless"] == outputs["full"]


@pytest.mark.slow
def test_resumed_training_equals_uninterrupted(bases, tmp_path):
    flags = LOSSES["sum_l"]
    whole = train(bases("gpt2-tied"), tmp_path / "whole", **flags)
    train(bases("gpt2-tied"), tmp_path / "parts", **flags)
    for file in (tmp_path / "parts").iterdir():  # as an interruption after step 3 leaves it
        if file.is_file() and file.name != "training_identity.json":
            file.unlink()
    for file in (tmp_path / "parts/checkpoint-6").iterdir():
        file.unlink()
    (tmp_path / "parts/checkpoint-6").rmdir()
    again = train(bases("gpt2-tied"), tmp_path / "parts", **flags)
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight, msg=name)


@pytest.mark.slow
def test_evaluation_while_training_equals_one_by_itself(bases, tmp_path):
    free = METHODS["free"] | {"intermediate_loss_fn": "shallowdeep_ce"}
    during = {
        "eval_strategy": "steps", "eval_steps": 6, "predict_with_generate": True, "max_eval_samples": 5,
        "per_device_eval_batch_size": 3,
    }  # fmt: skip
    train(bases("gpt2-tied"), tmp_path / "out", **free, **during)
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    scores = next(row for row in history if "eval_chrf" in row)
    sizes = {"max_eval_samples": 5, "per_device_eval_batch_size": 3}
    alone = evaluate(str(tmp_path / "out"), tmp_path / "eval", **METHODS["free"], **sizes)
    assert scores["eval_chrf"] == pytest.approx(alone["chrf"]) and scores["eval_bleu"] == pytest.approx(
        alone["bleu"]
    )
