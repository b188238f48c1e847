"""The command that teaches exits to frozen models, and what it writes."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from pairs import thin
from programs import run_in_two_processes
from real_rows import ROOT
from safetensors.torch import load_file

from models import (
    FixedThreshold,
    Free,
    FullDepth,
    SoftmaxGap,
    UserError,
    checkpoint_files,
    load_model,
)
from models.exit_adapter import attach_exit_adapter
from models.exit_adapter_files import CONFIG_NAME, WEIGHTS_NAME, load_exit_adapter, read_exit_config
from scripts import sweep, train_exit
from util.exit_training import forecast, teaching

LLAMA, T5, BART = (str(ROOT / "checkpoints" / f"debian-{name}-free") for name in ("llama", "t5", "bart"))
SMALL = [
    "--dataset_name", "debian_de_en", "--max_train_samples", "24", "--held_out", "6", "--eval_steps", "4",
    "--max_steps", "8", "--batch_tokens", "64", "--shortlist_size", "400", "--max_source_length", "60",
    "--val_max_target_length", "12", "--threads", "1", "--backend", "torch",
]  # fmt: skip


def command(model, folder, *more):
    return ["--model_name_or_path", model, "--output_dir", str(folder), *SMALL, *more]


@pytest.fixture(scope="module", autouse=True)
def short_timing():
    """How fast a small model decodes here is no matter: it is timed once, on short outputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_exit, "TIMED_ROWS", 1)
        for name, value in {"REPEATS": 1, "SHORT": 2, "LONG": 4}.items():
            patch.setattr(forecast, name, value)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted, which nobody writes into."""
    folder = tmp_path_factory.mktemp("whole")
    train_exit.main(command(LLAMA, folder))
    return folder


@pytest.fixture(scope="module")
def exit_of_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exit")
    train_exit.main(command(LLAMA, folder, "--exit_layers", "1", "3"))
    return folder


@pytest.mark.slow
def test_the_command_teaches_and_leaves_the_model_as_it_is(exit_of_llama):
    curve = json.loads((exit_of_llama / "curve.json").read_text())
    assert [entry["step"] for entry in curve] == [4, 8] and set(curve[0]["exits"]) == {"1", "3"}
    loaded, base = load_model(str(exit_of_llama)), load_model(LLAMA)
    theirs = loaded.model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in base.model.state_dict().items())
    inputs = base.tokenizer("Das ist ein Paket.", return_tensors="pt")
    policy = Free(loaded.exit_config.shallow_exit_layer, SoftmaxGap(), FixedThreshold(0.1), lossless=True)
    expected = base.model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert torch.equal(loaded.generate(**inputs, exit_policy=policy, max_new_tokens=12), expected)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(whole, tmp_path, monkeypatch):
    killed = tmp_path / "killed"
    learn = teaching.Teaching.learn

    def die_at_six(self, batch):
        if self.standing.step == 6:
            raise KeyboardInterrupt
        return learn(self, batch)

    monkeypatch.setattr(teaching.Teaching, "learn", die_at_six)
    with pytest.raises(SystemExit):
        train_exit.main(command(LLAMA, killed))
    assert not (killed / CONFIG_NAME).exists()
    monkeypatch.undo()
    train_exit.main(command(LLAMA, killed))
    first, second = (torch.load(folder / teaching.CHECKPOINT) for folder in (whole, killed))
    for layer, weights in first["weights"].items():
        assert all(torch.equal(weight, second["weights"][layer][name]) for name, weight in weights.items())


@pytest.mark.slow
def test_a_taught_exit_is_taught_further(exit_of_llama, tmp_path, monkeypatch):
    started = []
    run = teaching.Teaching.run
    monkeypatch.setattr(
        teaching.Teaching, "run", lambda self: started.append(copy.deepcopy(self.weights())) or run(self)
    )
    others = ["--shortlist_size", "8192", "--max_train_samples", "20"]  # others than it was taught on
    train_exit.main(command(LLAMA, tmp_path, *others, "--exit_adapter_path", str(exit_of_llama)))
    before, after = (load_file(folder / WEIGHTS_NAME) for folder in (exit_of_llama, tmp_path))
    ((layer, weights),) = started[0].items()
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["layer"] == layer
    assert all(torch.equal(weights[name], weight.to(weights[name].dtype)) for name, weight in before.items())
    assert torch.equal(after["shortlist"], before["shortlist"])
    assert not torch.equal(after["projection.weight"], before["projection.weight"])


@pytest.mark.slow
def test_in_bfloat16_the_exit_learns_as_much(whole, tmp_path):
    train_exit.main(command(LLAMA, tmp_path, "--bf16", "True"))
    exits = [torch.load(folder / teaching.CHECKPOINT)["weights"] for folder in (whole, tmp_path)]
    (layer,) = exits[0]
    learnt = [own[layer]["projection.weight"] for own in exits]  # zero at first
    assert learnt[1].dtype == torch.float32 and not torch.equal(*learnt)
    assert torch.cosine_similarity(*(weight.flatten() for weight in learnt), dim=0) > 0.9


@pytest.mark.slow
def test_texts_of_a_killed_run_are_continued(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    texts = (tmp_path / "texts.jsonl").read_bytes()
    lines = texts.splitlines(keepends=True)
    (tmp_path / "texts.jsonl").write_bytes(b"".join(lines[:16]) + lines[16][:10])  # cut within a line
    shutil.rmtree(tmp_path / "states")
    train_exit.main(command(LLAMA, tmp_path))
    assert (tmp_path / "texts.jsonl").read_bytes() == texts
    with pytest.raises(SystemExit):
        train_exit.main(command(LLAMA, tmp_path, "--val_max_target_length", "10"))
    assert "was begun with other lengths" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # other texts would be written together, and some twice
        train_exit.main(command(LLAMA, tmp_path, "--generation_batch_size", "5"))
    assert "was begun with other --generation_batch_size" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_taught_since_the_last_evaluation_is_saved(tmp_path):
    train_exit.main(command(LLAMA, tmp_path, "--max_steps", "3"))
    assert [row["step"] for row in json.loads((tmp_path / "curve.json").read_text())] == [3]
    assert load_file(tmp_path / WEIGHTS_NAME)["projection.weight"].count_nonzero()  # zero at first


def test_each_process_holds_out_some_of_the_last_rows(monkeypatch):
    examples, shares = Dataset.from_dict({"source": [*"abcdefg"]}), []
    for index in range(2):
        state = SimpleNamespace(num_processes=2, process_index=index)
        monkeypatch.setattr(train_exit, "PartialState", lambda state=state: state)
        shares.append(train_exit.own_share(examples)["source"])
    assert {share[-1] for share in map(list, shares)} == {"f", "g"}
    assert sorted([*shares[0], *shares[1]]) == [*"abcdefg"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["summarization", "translation"])
def test_a_file_of_prompts_needs_no_targets(task, tmp_path):
    prompts = [{"text": f"Paket {number}"} for number in range(8)]
    Path(tmp_path, "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    own = ["--train_file", str(tmp_path / "prompts.jsonl"), "--source_column", "text", "--held_out", "2"]
    own += ["--task", task, "--prompt_template", "{source}:", "--max_steps", "2"]
    train_exit.main(["--model_name_or_path", LLAMA, "--output_dir", str(tmp_path / "exit"), *SMALL[2:], *own])
    tokenizer = load_model(LLAMA).tokenizer
    texts = [
        json.loads(line)["input_ids"] for line in (tmp_path / "exit/texts.jsonl").read_text().splitlines()
    ]
    assert sorted(map(tokenizer.decode, texts)) == [f"Paket {number}:" for number in range(8)]


WITH_ENCODER = thin(
    itertools.product([T5, BART], ["layer", "attention"], ["both", "acceptance"]),
    [(T5, "layer", "both"), (BART, "attention", "acceptance")],
)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind", "loss"), WITH_ENCODER)
def test_models_with_an_encoder_take_the_same_command(model, kind, loss, tmp_path):
    more = ["--exit_adapter", kind, "--exit_loss", loss, "--backend", "onnx"]
    more += ["--self_generated", str(loss == "both")]
    train_exit.main(command(model, tmp_path, *more))
    loaded, base = load_model(str(tmp_path)), load_model(model)
    inputs = base.tokenizer("Das ist ein Paket.", return_tensors="pt")
    policy = Free(loaded.exit_config.shallow_exit_layer, SoftmaxGap(), FixedThreshold(0.1), lossless=True)
    expected = base.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=12)
    assert torch.equal(loaded.generate(**inputs, exit_policy=policy, max_new_tokens=12), expected)
    assert torch.equal(loaded.generate(**inputs, exit_policy=FullDepth(), max_new_tokens=12), expected)


@pytest.mark.slow
def test_an_exit_is_refused_on_another_model(exit_of_llama, tmp_path):
    other = load_model(LLAMA).model
    with torch.no_grad():
        next(other.parameters()).add_(0.5)
    with pytest.raises(UserError, match="whose weights are others"):
        load_exit_adapter(other, str(exit_of_llama))
    for dtype in (torch.bfloat16, torch.float16):
        half = load_model(LLAMA, dtype=dtype, exit_adapter=str(exit_of_llama))  # the same, rounded
        assert {weight.dtype for weight in half.model.parameters()} == {dtype}
    with pytest.raises(UserError, match="load the model in float32 or bfloat16"):
        load_exit_adapter(load_model(LLAMA, dtype=torch.float16).model, str(exit_of_llama))
    shutil.copytree(exit_of_llama, tmp_path / "damaged")
    content = json.loads((tmp_path / "damaged" / CONFIG_NAME).read_text())
    damaged = tmp_path / "damaged" / CONFIG_NAME
    damaged.write_text(json.dumps(content | {"kind": "norm"}))
    with pytest.raises(UserError, match=rf"damaged: {CONFIG_NAME}: kv_layer: .* kind norm attends to"):
        load_model(LLAMA, exit_adapter=str(tmp_path / "damaged"))
    damaged.write_text(json.dumps(content | {"kind": "norm", "kv_layer": None}))
    with pytest.raises(UserError, match=r"does not fit its configuration.*block"):
        load_model(LLAMA, exit_adapter=str(tmp_path / "damaged"))
    damaged.write_text(json.dumps(content | {"shortlist_size": -1}))
    with pytest.raises(UserError, match=rf"damaged: {CONFIG_NAME}: shortlist_size must lie in 1"):
        load_model(LLAMA, exit_adapter=str(tmp_path / "damaged"))
    (tmp_path / "damaged" / WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match=f"has no {WEIGHTS_NAME}"):
        load_model(LLAMA, exit_adapter=str(tmp_path / "damaged"))


def test_a_revision_is_of_what_was_named_first(exit_of_llama, monkeypatch):
    find, asked = checkpoint_files.cached_file, set()

    def note(name, file, revision=None, **options):
        asked.add((name, revision))
        return find(name, file, **options)

    monkeypatch.setattr(checkpoint_files, "cached_file", note)
    exit_adapter = str(exit_of_llama)
    load_model(LLAMA, revision="v2", exit_adapter=exit_adapter)
    assert asked == {(LLAMA, "v2"), (exit_adapter, "main")}
    asked.clear()
    load_model(exit_adapter, revision="v2")
    assert asked == {(exit_adapter, "v2"), (LLAMA, "main")}


def test_a_model_is_saved_without_its_exit(exit_of_llama, tmp_path):
    loaded = load_model(str(exit_of_llama))
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert again.view.exit_adapter is None
    attach_exit_adapter(again.model, loaded.model.exit_adapter)
    assert again.view.exit_adapter is loaded.model.exit_adapter  # seen by the view that is asked for next


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--exit_layers", "9"], "--exit_layers must lie in 1..7"),
        (["--bf16", "True", "--generation_precision", "w8"], "--generation_precision is of onnx's weights"),
        (["--exit_layers", "3", "--exit_kv_layer", "3"], "--exit_kv_layer must lie in 4..8"),
        (["--exit_adapter", "norm", "--exit_kv_layer", "5"], "--exit_kv_layer: an exit adapter of kind norm"),
        (["--held_out", "24"], "--held_out 24: there are only 24 rows"),
        (["--exit_loss", "mse"], "invalid choice: 'mse'"),
        (["--exit_adapter_path", "docs"], "--shortlist_size: --exit_adapter_path brings its own"),
        (
            ["--exit_adapter_path", "docs", "--shortlist_size", "8192"],
            "exit_adapter: docs has no exit_adapter_c",
        ),
        (["--shortlist_size", "1"], "--shortlist_size must be 0 or at least 2"),
    ],
)
def test_bad_flags_are_named(more, complaint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_exit.main(command(LLAMA, Path(tmp_path, "out"), *more))
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_shows_the_exit_beside_full_depth_and_models_that_have_none(exit_of_llama, tmp_path):
    flags = [
        "--free", LLAMA, "--calm", LLAMA, "--exit_adapter_path", str(exit_of_llama), "--exit_precision", "w8",
        "--methods", "FREE", "FREE lossless", "Static", "--calm_static_layers", "3",
        "--dataset_name", "debian_de_en",
        "--free_thresholds", "0.3", "--lossless_thresholds", "0.3", "--max_pending_tokens", "3",
        "--num_samples", "3", "--max_source_length", "60", "--val_max_target_length", "12",
    ]  # fmt: skip
    sweep.main([*flags, "--output_dir", str(tmp_path), "--backend", "onnx"])
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    texts = {name: [row["prediction"] for row in records if row["setting"] == name] for name in
             {row["setting"] for row in records}}  # fmt: skip
    assert texts["FREE lossless 0.3 (free)"] == texts["Full depth (free)"]
    assert len(texts["FREE 0.3 (free)"]) == len(texts["Static 3 (calm)"]) == 3
    layer = load_model(str(exit_of_llama)).exit_config.shallow_exit_layer  # where alone it says something
    assert [name for name in texts if name.startswith("Static") and "free" in name] == [
        f"Static {layer} (free)"
    ]
    assert json.loads((tmp_path / "settings.json").read_text())["environment"]["exit_precision"] == "w8"


@pytest.mark.parametrize("name", ["static_layers", "shallow_layers"])
def test_a_sweep_refuses_layers_that_the_exit_does_not_stand_after(exit_of_llama, tmp_path, capsys, name):
    layer = read_exit_config(str(exit_of_llama)).layer
    flags = ["--free", LLAMA, "--exit_adapter_path", str(exit_of_llama), "--dataset_name", "debian_de_en"]
    flags += ["--methods", "FREE", "Static", "--output_dir", str(tmp_path), "--max_source_length", "60"]
    flags += ["--val_max_target_length", "12"]
    with pytest.raises(SystemExit):
        sweep.main([*flags, f"--{name}", str(layer + 1)])
    assert f"--{name}: the exit adapter stands after layer {layer} alone." in capsys.readouterr().err


@pytest.mark.slow
def test_states_computed_anew_teach_as_those_on_disk(whole, tmp_path):
    train_exit.main(command(LLAMA, tmp_path, "--cache_states", "False"))
    assert not (tmp_path / "states").exists()
    losses, others = (
        [row["loss"] for row in json.loads((folder / "curve.json").read_text())]
        for folder in (whole, tmp_path)
    )
    assert losses == pytest.approx(others, rel=0.01)  # on disk they are halves


@pytest.mark.slow
def test_forecasts_take_the_costs_of_another_machine(whole, tmp_path, capsys):
    """One on which an exit costs nothing."""
    content = json.loads((whole / "train_exit.json").read_text())
    (layer,) = content["cost_seconds"]
    costs = {
        "sample": 0.0,
        "full_step": 1.0,
        "shallow_step": 1e-3,
        "passes": [1.0] * 5,
        "passes_of_one": [1.0] * 5,
    }
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"cost_seconds": {layer: costs}}))
    train_exit.main(command(LLAMA, tmp_path / "exit", "--cost_file", str(file)))
    written = json.loads((tmp_path / "exit/train_exit.json").read_text())
    assert written["cost_seconds"][layer] == costs
    sure = next(row for row in written["forecasts"][layer] if row["threshold"] == 0 and not row["lossless"])
    assert sure["exit_share"] == 1 and sure["speedup"] > 5
    with pytest.raises(SystemExit):
        train_exit.main(command(LLAMA, tmp_path / "other", "--cost_file", str(file), "--exit_layers", "1"))
    assert "cost_seconds of layer 1 are missing; teach there with --exit_layers 1" in capsys.readouterr().err
    file.write_text(json.dumps({"cost_seconds": {layer: costs | {"passes": 3}}}))
    with pytest.raises(SystemExit):
        train_exit.main(command(LLAMA, tmp_path / "other", "--cost_file", str(file)))
    complaint = f"--cost_file {file}: cost_seconds of layer {layer}: passes must"
    assert f"{complaint} be a list" in capsys.readouterr().err
    file.write_text(json.dumps({"cost_seconds": {layer: costs | {"passes": [1.0]}}}))
    with pytest.raises(SystemExit):
        train_exit.main(command(LLAMA, tmp_path / "other", "--cost_file", str(file)))
    assert f"{complaint} hold 5 numbers, not 1." in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_prompts_and_gradients(tmp_path):
    """The adapter that is saved has learnt from both: each answers half of the prompts."""
    run_in_two_processes("scripts/train_exit.py", *command(LLAMA, tmp_path, "--exit_layers", "1"))
    shares = [(tmp_path / f"texts.{rank}-of-2.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert [len(share) for share in shares] == [12, 12] and not {*shares[0]} & {*shares[1]}
    assert load_model(str(tmp_path)).exit_config.shallow_exit_layer == 1
