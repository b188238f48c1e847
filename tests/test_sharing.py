"""Model cards, and what --push_to_hub uploads: into a folder, as nothing here reaches a hub."""

from __future__ import annotations

import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, RepoUrl
from real_rows import ROOT
from tiny_models import tiny_model
from tiny_runs import FREE, TRAINING, as_argv, base_flags, refused, results_of, save_checkpoint, write_rows
from transformers.trainer_callback import TrainerState

import models
import run
from models import attach_exit_adapter, load_model, make_exit_adapter, save_exit_adapter
from models.exit_heads import ExitConfig
from scripts import export_checkpoint
from util.exit_arguments import ExitArguments
from util.exit_training.card import write_exit_card
from util.flags import non_default_settings
from util.model_card import MARK, Card, curve_rows, usage, write_card
from util.policies import build_policy
from util.policy_code import NAMES, evaluated_policy, trained_policy

LOSS = {"intermediate_loss_fn": "shallowdeep_kd_dyna", "shallow_exit_layer": 2}
PUSH = {"push_to_hub": True, "hub_model_id": "mine"}
PREDICT = FREE | {"do_predict": True, "shallow2deep_conf_threshold": 0.3, "val_max_target_length": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def base(checkpoint, rows, tmp_path):
    return base_flags(checkpoint, rows, tmp_path / "out")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The folder in which repositories then lie."""

    def create(api, repo_id, *, token, private, exist_ok):
        assert exist_ok and token is None and private is None
        (tmp_path / "hub/someone" / repo_id.split("/")[-1]).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/someone/{repo_id.split('/')[-1]}")

    def upload(api, *, repo_id, folder_path, commit_message, token, revision, ignore_patterns):
        assert commit_message and token is None and revision is None
        for path in filter(Path.is_file, Path(folder_path).rglob("*")):
            name = str(path.relative_to(folder_path))
            if not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                target = tmp_path / "hub" / repo_id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return tmp_path / "hub"


def run_block(card, name, folder):
    """What the card's example prints, with the repository in a folder."""
    (block,) = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert f"load_model('{name}')" in block
    scope = {}
    exec(compile(block.replace(name, str(folder)), "card", "exec"), scope)
    return scope


@pytest.mark.slow
def test_a_run_is_pushed_with_its_exits_results_and_card(base, hub, capsys):
    heads = {"per_exit_head": "norm", "logging_steps": 1}
    run.main(as_argv(base | TRAINING | LOSS | heads | PREDICT | PUSH))
    assert "Pushed" in capsys.readouterr().out
    pushed = hub / "someone/mine"
    assert ExitConfig.load(pushed) == ExitConfig("shallowdeep_kd_dyna", 2, 0.5, per_exit_head="norm")
    names = {path.name for path in pushed.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "predict_results.json"} <= names
    assert not [
        name for name in names if name.startswith((".", "checkpoint", "predictions", "training_args"))
    ]
    card = (pushed / "README.md").read_text()
    results = results_of(base, "predict")
    for name, decimals in (("bleu", 2), ("chrf", 2)):
        assert f"| {name} | {results[name]:.{decimals}f} |" in card
    assert f"| decoder layers per token | {results['average_layers']:.2f} |" in card
    flags = "--use_shallow_deep True --shallow_exit_layer 2 --shallow2deep_conf_threshold 0.3"
    assert f"- test: `{flags}`, batches of 8" in card
    assert "- 6 steps" in card and "`shallowdeep_kd_dyna`, exit layer: 2" in card and "own norm" in card
    assert "`learning_rate 0.01`" in card and card.count("\n| 6 |") == 1
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["language"] == ["de", "en"] and metadata["pipeline_tag"] == "translation"
    scope = run_block(card, "someone/mine", pushed)
    policy = "Free(2, SoftmaxGap(), 0.3)"
    assert f"exit_policy={policy}, " in card
    loaded = load_model(base["output_dir"])  # with the heads that the upload must have brought
    expected = loaded.generate(**scope["inputs"], exit_policy=eval(policy, scope), max_new_tokens=40)
    assert scope["output"].tolist() == expected.tolist()
    assert "per_exit_heads" in dict(scope["loaded"].model.named_children())


def test_a_model_is_pushed_from_its_own_folder_once_evaluated(base, hub, checkpoint, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(checkpoint, folder)
    flags = base | {"model_name_or_path": str(folder), "output_dir": str(folder)} | PREDICT
    run.main(as_argv(flags | {"push_to_hub": True}))
    pushed = hub / "someone/own"
    card = (pushed / "README.md").read_text()
    assert "## Results" in card and "## Training" not in card
    run_block(card, "someone/own", pushed)


@pytest.mark.slow
def test_results_of_earlier_weights_are_not_on_the_card(base, caplog):
    """They stay where they are, and come back with their weights."""
    folder = Path(base["output_dir"])
    flags = base | TRAINING | LOSS
    run.main(as_argv(flags | PREDICT | {"max_steps": 2}))
    results = (folder / "predict_results.json").read_text()
    assert "## Results" in (folder / "README.md").read_text()
    run.main(as_argv(flags | {"max_steps": 4}))
    card = (folder / "README.md").read_text()
    assert "- 4 steps" in card and "## Results" not in card
    assert "predict_results.json is of other weights" in caplog.text
    assert (folder / "predict_results.json").read_text() == results
    own = base | {"model_name_or_path": str(folder), "do_eval": True} | FREE | {"val_max_target_length": 8}
    run.main(as_argv(own))
    card = (folder / "README.md").read_text()
    assert "|  | validation |\n" in card and "- validation: `--use_shallow_deep" in card


def test_other_folders_are_not_pushed_and_get_no_card(base, hub, capsys):
    line = refused(base | PREDICT | PUSH, capsys)
    assert "--push_to_hub:" in line and "does not hold the model that runs" in line
    run.main(as_argv(base | PREDICT))
    assert not Path(base["output_dir"], "README.md").exists() and not hub.exists()


def test_a_push_that_fails_keeps_everything(base, hub, capsys, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("403 Forbidden: you may not")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    line = refused(base | TRAINING | LOSS | PUSH, capsys)
    assert "--push_to_hub: 403 Forbidden" in line and "the same command tries again" in line
    assert Path(base["output_dir"], "model.safetensors").is_file()


def test_nothing_is_pushed_on_the_way(base, hub, capsys, monkeypatch):
    """Trainer would push every checkpoint, with the token that it keeps of the flags."""
    messages, upload = [], HfApi.upload_folder

    def watch(api, **options):
        messages.append(options["commit_message"])
        upload(api, **options)

    monkeypatch.setattr(HfApi, "upload_folder", watch)
    run.main(as_argv(base | TRAINING | LOSS | PUSH | {"hub_strategy": "every_save"}))
    assert messages == ["Model, card and results"]
    line = refused(base | TRAINING | LOSS | PUSH | {"hub_strategy": "all_checkpoints"}, capsys)
    assert "--hub_strategy all_checkpoints: run.py pushes no checkpoints" in line


@pytest.mark.slow
def test_an_adapter_brings_heads_and_a_card_of_its_own(base):
    flags = base | TRAINING | LOSS | {"use_lora": True, "per_exit_head": "norm", "max_steps": 2}
    run.main(as_argv(flags))
    folder = Path(base["output_dir"])
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and MARK in card
    assert (folder / "exit_heads.safetensors").is_file()
    run_block(card, str(folder), folder)


def test_a_card_of_somebody_elses_stays(tmp_path, caplog):
    (tmp_path / "README.md").write_text("# Mine")
    assert not write_card(tmp_path, Card("a", {}, []))
    assert (tmp_path / "README.md").read_text() == "# Mine" and "stays as it is" in caplog.text
    (tmp_path / "README.md").write_text(f"{MARK}\nold")
    assert write_card(tmp_path, Card("a", {"language": None, "tags": ["b"]}, ["", "text\n"]))
    text = (tmp_path / "README.md").read_text()
    assert text == f"---\ntags: [b]\n---\n{MARK}\n\n# a\n\ntext\n"


TRAINED = [  # exit configuration, the expression
    (ExitConfig(), ""),
    (ExitConfig("weighted_ce"), "Calm(SoftmaxGap(), 0.9)"),
    (ExitConfig("shallowdeep_ce", 2), "Free(2, SoftmaxGap(), 0.9)"),
    (ExitConfig(None, 2, train_meta_cm_head=True), "Free(2, MetaClassifier(loaded.model.cm_head), 0.9)"),
]


@pytest.mark.parametrize(("exits", "expression"), TRAINED)
def test_cards_show_the_policy_that_was_trained(exits, expression):
    assert trained_policy(exits) == expression


SHALLOW = {"use_shallow_deep": True, "shallow_exit_layer": 3, "shallow2deep_conf_threshold": 0.4}
CALM = {"use_early_exit": True, "exit_conf_threshold": 0.5}
EVALUATED = [
    {"static_exit_layer": 3},
    CALM | {"exit_conf_type": "meta"},
    CALM | {"exit_min_layer": 4},
    CALM | {"exit_layers": [2, 4], "exit_position_temp": 4.0},
    CALM | {"exit_position_temp": 2.5, "exit_decay_form": "paper"},
    SHALLOW | {"lossless": True, "max_pending_tokens": 4},
    SHALLOW | {"rollback_conf_threshold": 2.0, "parallel_causal_mask": False},
    SHALLOW | {"copy_skipped_hidden_states": True, "parallel_gen_token": False},
    SHALLOW | {"use_adapt_threshold": True, "adapt_zeta": 0.8},
    SHALLOW | {"lossless": True, "lookup_tokens": 6},
    {"lookup_tokens": 4},
    {"use_shallow_deep": True, "shallow_exit_layer": 2, "auto_exit": True},
    {"use_shallow_deep": True, "shallow_exit_layer": 2, "auto_exit": True, "lossless": True},
]


PLAIN = (int, float, str, list, frozenset, torch.nn.Module)


def settings_of(value):
    """An object's attributes, and theirs; locks and the like by their kind."""
    if isinstance(value, torch.nn.Module) or type(value).__module__.split(".")[0] != "models":
        return value if isinstance(value, PLAIN) else type(value)
    return type(value), {name: settings_of(each) for name, each in vars(value).items()}


@pytest.mark.parametrize("given", EVALUATED, ids=str)
def test_cards_show_the_policy_that_was_measured(given):
    model = tiny_model(num_layers=6)
    model.cm_head = torch.nn.Linear(16, 2)
    loaded = type("Loaded", (), {"model": model, "view": type("View", (), {"exit_adapter": None})})
    flags = ExitArguments(**given)
    results = {"arguments": non_default_settings(flags) | {"max_length": 40, "max_target_length": 8}}
    expression, caveat = evaluated_policy(results)
    shown = eval(expression, {name: getattr(models, name) for name in NAMES} | {"loaded": loaded})
    assert settings_of(shown) == settings_of(build_policy(flags, loaded, 40))
    assert bool(caveat) == bool(given.keys() & {"use_adapt_threshold", "auto_exit"})


@pytest.mark.parametrize("flag", ["conf_shortlist", "adapt_threshold_file"])
def test_cards_show_no_policy_that_needs_a_file(flag):
    results = {"arguments": SHALLOW | {flag: "mine.json", "use_adapt_threshold": True, "max_length": 8}}
    expression, caveat = evaluated_policy(results)
    assert expression == "" and f"`--{flag}`" in caveat and "full depth" in caveat


@pytest.mark.slow
def test_cards_show_the_last_evaluation(base):
    """Of the test split or not, at full depth or not."""
    folder = Path(base["output_dir"])
    run.main(as_argv(base | TRAINING | LOSS | PREDICT))
    own = base | {"model_name_or_path": str(folder), "do_eval": True, "val_max_target_length": 8}
    for flags, words in (
        ({"static_exit_layer": 1}, "loaded.generate(**inputs, exit_policy=StaticExit(1), max_new"),
        ({}, "loaded.generate(**inputs, max_new"),
    ):
        run.main(as_argv(own | flags))
        card = (folder / "README.md").read_text()
        assert words in card and "|  | validation | test |" in card
        run_block(card, str(folder), folder)


def test_cards_show_beams():
    """Hugging Face's loop searches them."""
    folder = str(ROOT / "checkpoints/debian-t5-free")
    results = {"arguments": {"num_beams": 3, "max_length": 8}}
    scope = run_block(usage(folder, load_model(folder), "ein Paket", results), folder, folder)
    expected = scope["loaded"].model.generate(**scope["inputs"], num_beams=3, max_new_tokens=40)
    assert scope["output"].tolist() == expected.tolist()


def test_losses_are_shown_with_the_parts_that_there_are():
    history = [{"step": step, "loss": 2.0 / step, "ce_layer_2": 1.5, "ce_layer_6": 1.25} for step in (1, 2)]
    history += [{"step": 3, "loss": 0.5}, {"step": 3, "eval_loss": 1.0}]
    assert curve_rows(json.loads(json.dumps(history))) == [
        ["1", "2.000", "1.500", "1.250"],
        ["2", "1.000", "1.500", "1.250"],
        ["3", "0.500", "", ""],
    ]


@pytest.mark.parametrize(("shallow", "depth"), [(6, 24), (9, 12)])
def test_losses_of_layers_are_told_apart_as_the_trainer_saves_them(tmp_path, shallow, depth):
    history = [{"step": 1, "loss": 2.0, f"ce_layer_{shallow}": 1.5, f"ce_layer_{depth}": 1.25}]
    TrainerState(log_history=history).save_to_json(str(tmp_path / "trainer_state.json"))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert curve_rows(state["log_history"]) == [["1", "2.000", "1.500", "1.250"]]


@pytest.mark.parametrize("count", [1, 10, 19, 100])
def test_a_curve_has_ten_points_at_most_and_the_last_loss(count):
    history = [{"step": step, "loss": 1 / step} for step in range(1, count + 1)]
    steps = [int(row[0]) for row in curve_rows(history)]
    assert len(steps) == min(count, 10) and (steps[0], steps[-1]) == (1, count)


def test_an_exit_adapter_has_a_card(tmp_path):
    base = str(ROOT / "checkpoints/debian-llama-free")
    loaded = load_model(base)
    attach_exit_adapter(loaded.model, make_exit_adapter(loaded.view, "norm", 3))
    save_exit_adapter(loaded.model, tmp_path, base_model=base)
    row = {"layer": 3, "decoding": "lossless", "threshold": 0.25, "max_pending": 4, "speedup": 1.234}
    other = row | {"decoding": "FREE", "max_pending": None, "speedup": 2.0}
    write_exit_card(tmp_path, loaded, base, [row, other])
    card = (tmp_path / "README.md").read_text()
    assert "after layer 3 of 8" in card and "base_model" not in card
    assert "| lossless | 0.25 | 4 | 1.23 |\n| FREE | 0.25 |  | 2.00 |" in card
    scope = run_block(card, str(tmp_path), tmp_path)
    greedy = loaded.model.generate(**scope["inputs"], max_new_tokens=40, do_sample=False)
    assert scope["output"].tolist() == greedy.tolist()


@pytest.mark.slow
def test_a_released_checkpoint_has_the_same_kind_of_card(base, tmp_path):
    run.main(as_argv(base | TRAINING | LOSS))
    folder = tmp_path / "released"
    flags = {"run": base["output_dir"], "output_dir": folder, "title": "A title", "train_script": "train.sh"}
    export_checkpoint.main(as_argv(flags))
    card = (folder / "README.md").read_text()
    assert "# A title" in card and "`bash train.sh`: seed 42, 6 steps" in card and card.count("\n| 6 |") == 1
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert run_block(card, str(folder), folder)["output"].shape[0] == 1
