"""run.py from the outside: bad input, training, evaluation, interruption. Everything runs on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import tiny_model
from transformers import PLBartConfig, PLBartForConditionalGeneration, T5Tokenizer

import run
from models.errors import UserError
from models.exit_heads import ExitConfig
from util.evaluation.prediction_log import PredictionLog
from util.evaluation.records import Record
from util.files import locked_output_dir

ROOT = Path(__file__).resolve().parent.parent
GERMAN = ["ein", "das", "paket", "enthält", "die", "bibliothek", "für", "programm", "daten"]
ENGLISH = ["the", "package", "library", "for", "program", "data"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A saved tiny model with a word-level vocabulary, trained (so it says) to exit after layer 2."""
    folder = tmp_path_factory.mktemp("checkpoint")
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in GERMAN + ENGLISH]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    ExitConfig("shallowdeep_ce", 2).save(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Twelve rows in a .jsonl file."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = []
    for index in range(12):
        german, english = GERMAN[index % 5 :][:5], ENGLISH[index % 4 :][:3]
        row = {"id": f"row-{index}", "translation": {"de": " ".join(german), "en": " ".join(english)}}
        lines.append(json.dumps(row | {"seen_in_train": index % 4 == 0}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def base(checkpoint, rows, tmp_path):
    return {
        "model_name_or_path": str(checkpoint),
        "task": "translation",
        "train_file": str(rows),
        "validation_file": str(rows),
        "test_file": str(rows),
        "source_lang": "de",
        "target_lang": "en",
        "output_dir": str(tmp_path / "out"),
        "max_target_length": "10",
        "use_cpu": "True",
        "backend": "torch",
        "report_to": "none",
        "disable_tqdm": "True",
    }


def as_argv(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def results_of(flags, stage="eval"):
    return json.loads(Path(flags["output_dir"], f"{stage}_results.json").read_text())


FREE = {"use_shallow_deep": True}
BAD_FLAGS = {
    "nothing to do": ({"do_eval": False}, "--do_train"),
    "two methods": (FREE | {"static_exit_layer": 2}, "--static_exit_layer and --use_shallow_deep"),
    "layer too deep": ({"static_exit_layer": 6}, "--static_exit_layer must lie in 1..5"),
    "layer zero": ({"static_exit_layer": 0}, "--static_exit_layer must be positive"),
    "latency with a batch": ({"deploy_scenario": True}, "--per_device_eval_batch_size 1"),
    "threshold above one": (FREE | {"shallow2deep_conf_threshold": 1.5}, "--shallow2deep_conf_threshold"),
    "threshold below zero": ({"use_early_exit": True, "exit_conf_threshold": -0.1}, "--exit_conf_threshold"),
    "no confidence head": ({"use_early_exit": True, "exit_conf_type": "meta"}, "--train_meta_cm_head"),
    "confidence of another method": (FREE | {"exit_conf_threshold": 0.5}, "--use_early_exit True"),
    "output is a file": ({"output_dir": str(Path(__file__))}, "--output_dir"),
    "no room for a token": ({"val_max_target_length": 1}, "--val_max_target_length"),
    "batch of none": ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size"),
    "wrong resume": ({"do_train": True, "resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint"),
    "idle flag": ({"use_adapt_threshold": True}, "--use_shallow_deep True"),
    "rollback without a pass": (
        FREE | {"rollback_conf_threshold": 1.0, "copy_skipped_hidden_states": True},
        "--rollback_conf_threshold",
    ),
    "no keys for skipped tokens": (FREE | {"parallel_gen_token": False}, "--copy_skipped_hidden_states"),
    "beams": (FREE | {"num_beams": 4}, "--num_beams"),
    "unknown flag": ({"shalow_exit_layer": 2}, "did you mean --shallow_exit_layer?"),
    "unknown choice": ({"intermediate_loss_fn": "kd"}, "intermediate_loss_fn"),
    "missing file": ({"validation_file": "nowhere.jsonl"}, "nowhere.jsonl"),
    "missing model": ({"model_name_or_path": "./nowhere"}, "./nowhere"),
    "wrong language": ({"source_lang": "fr"}, "found ['de', 'en']"),
    "distillation without a layer": (
        {"do_train": True, "intermediate_loss_fn": "shallowdeep_ce", "model_name_or_path": "PLAIN"},
        "--shallow_exit_layer",
    ),
    "FREE without a layer": (FREE | {"model_name_or_path": "PLAIN"}, "--shallow_exit_layer"),
    "truth that is neither": ({"paper_settings": "maybe"}, "--paper_settings"),
    "misspelt folder": ({"model_name_or_path": str(ROOT / "checkpoints/debian-t5-fre")}, "debian-t5-free"),
    "no baseline": ({"baseline_predictions": str(ROOT / "README.md")}, "README.md, line 1"),
    "no adaptive threshold": (
        FREE | {"use_adapt_threshold": True, "adapt_threshold_file": str(ROOT / "README.md")},
        "--adapt_threshold_file",
    ),
    "loss without a name": ({"output_hidden_states_decoder": True}, "--intermediate_loss_fn"),
}


@pytest.fixture(scope="session")
def plain_checkpoint(checkpoint, tmp_path_factory):
    """The same model, saved by someone who knows nothing of exits."""
    folder = tmp_path_factory.mktemp("plain")
    for file in checkpoint.iterdir():
        if file.name != "exit_config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_get_one_line(base, plain_checkpoint, capsys, name):
    changes, expected = BAD_FLAGS[name]
    flags = base | {"do_eval": True} | changes
    if flags["model_name_or_path"] == "PLAIN":
        flags["model_name_or_path"] = str(plain_checkpoint)
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(flags))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    assert len(errors) == 1 and expected in errors[0]


BAD_FILES = {
    "not JSON": ('{"translation": {"de": "a", "en": "b"}}\n{"translation": \n', "line 2"),
    "no such column": ('{"text": "a"}\n', "found text"),
    "empty": ("", "empty"),
    "not text": (b"\xff\xfe\x00\x01\x02\n", "bad.jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_get_one_line(base, tmp_path, capsys, name):
    content, expected = BAD_FILES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(base | {"do_eval": True, "validation_file": path}))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    assert len(errors) == 1 and expected in errors[0] and "bad.jsonl" in errors[0]


def test_bad_input_shows_no_traceback(base):
    command = [sys.executable, str(ROOT / "run.py"), *as_argv(base | {"do_eval": True, "source_lang": "fr"})]
    finished = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr and "error: " in finished.stderr


METHODS = {
    "full": {},
    "static": {"static_exit_layer": 3},
    "calm": {"use_early_exit": True, "exit_conf_threshold": 0.3, "exit_position_temp": 4.0},
    "free": FREE | {"shallow2deep_conf_threshold": 0.3},
    "free-adaptive": FREE | {"use_adapt_threshold": True},
    "free-copy": FREE | {"copy_skipped_hidden_states": True, "shallow2deep_conf_threshold": 0.3},
    "free-rollback": FREE | {"rollback_conf_threshold": 2.0, "shallow2deep_conf_threshold": 0.3},
}


DEPTHS = {"full": 6, "static": 3}


def layers_by_hand(name, exit_layers):
    """Layers that the tokens of one sequence went through, those made up for later included."""
    if not name.startswith("free") or name == "free-copy":
        return sum(exit_layers)
    if name == "free-adaptive":  # learns from every token, at the latest after the last
        return 6 * len(exit_layers)
    deep = [index for index, layer in enumerate(exit_layers) if layer == 6]
    return 2 * len(exit_layers) + 4 * (max(deep, default=-1) + 1)


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_of_every_method(base, name):
    flags = base | METHODS[name]
    flags |= {"do_eval": True, "do_predict": True, "deploy_scenario": True, "per_device_eval_batch_size": 1}
    run.main(as_argv(flags))
    results = results_of(flags)
    predictions = Path(flags["output_dir"], "predictions.jsonl").read_text().splitlines()
    first = json.loads(predictions[0])
    assert results["samples"] == len(predictions) == 12
    assert results["tokens_per_second"] > 0 and {"bleu", "chrf", "bleu_unseen"} <= results.keys()
    assert first["id"] == "row-0" and len(first["exit_layers"]) == first["tokens"] == len(first["pieces"])
    depths = [json.loads(line)["exit_layers"] for line in predictions]
    by_hand = sum(layers_by_hand(name, row) for row in depths) / sum(map(len, depths))
    if name == "free-rollback":  # and what it took back
        assert results["average_layers"] >= by_hand
    else:
        assert results["average_layers"] == pytest.approx(by_hand)
    assert name not in ("full", "static") or {layer for row in depths for layer in row} == {DEPTHS[name]}
    assert results_of(flags, "predict")["samples"] == 12


def test_adaptive_threshold_is_carried_over(base):
    flags = base | FREE | {"do_eval": True, "use_adapt_threshold": True, "adapt_zeta": 0.9}
    run.main(as_argv(flags))
    saved = Path(flags["output_dir"], "adaptive_threshold.json")
    before = json.loads(saved.read_text())["observed"]
    run.main(as_argv(flags | {"adapt_threshold_file": str(saved)}))
    after = json.loads(saved.read_text())["observed"]
    assert after["num_sequences"] == 2 * before["num_sequences"]
    assert after["confidences"][: len(before["confidences"])] == before["confidences"]


def test_exit_layer_of_the_checkpoint_is_the_default(base):
    flags = base | FREE | {"do_eval": True, "shallow2deep_conf_threshold": 0.0}
    run.main(as_argv(flags))
    first = json.loads(Path(flags["output_dir"], "predictions.jsonl").read_text().splitlines()[0])
    assert set(first["exit_layers"]) == {2}


def test_batches_and_argument_files_give_the_same_text(base, tmp_path):
    texts = []
    for size in (1, 5):
        flags = base | FREE | {"do_eval": True, "per_device_eval_batch_size": size}
        flags |= {"shallow2deep_conf_threshold": 0.3, "output_dir": str(tmp_path / f"batch{size}")}
        file = tmp_path / f"arguments{size}.yaml"
        file.write_text("\n".join(f"{name}: {value}" for name, value in flags.items()))
        run.main([str(file)])
        lines = Path(flags["output_dir"], "predictions.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["prediction"] for line in lines])
    assert texts[0] == texts[1]


LOSSES = {
    "ce": {"intermediate_loss_fn": "weighted_ce"},
    "distillation": {"intermediate_loss_fn": "shallowdeep_kd_dyna", "do_layer_transformation": True},
    "head": {"train_meta_cm_head": True},
    "plain": {},
    "muon": {"intermediate_loss_fn": "shallowdeep_ce", "use_muon": True},
}
TRAINING = {
    "do_train": True,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_train_save_reload_evaluate(base, name):
    train = base | TRAINING | LOSSES[name] | {"shallow_exit_layer": 2}
    evaluation = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 3, "predict_with_generate": True}
    run.main(as_argv(train | evaluation))
    trained = results_of(train)
    history = json.loads(Path(train["output_dir"], "trainer_state.json").read_text())["log_history"]
    assert any("eval_bleu" in entry for entry in history)
    parts = {"ce": "ce_layer_1", "distillation": "distillation", "head": "cm_layer_2", "muon": "ce_layer_6"}
    assert name not in parts or sum(parts[name] in entry for entry in history) == 6
    again = base | {"model_name_or_path": train["output_dir"], "do_eval": True}
    again["output_dir"] += "-again"
    run.main(as_argv(again))
    assert results_of(again)["tokens"] == trained["tokens"]
    texts = [Path(flags["output_dir"], "predictions.jsonl").read_text() for flags in (train, again)]
    assert predictions_in(texts[0]) == predictions_in(texts[1])
    if name == "head":
        meta = again | FREE | {"shallow2deep_conf_type": "meta", "shallow2deep_conf_threshold": 0.5}
        run.main(as_argv(meta))


def predictions_in(text):
    return [json.loads(line)["prediction"] for line in text.splitlines()]


def start(flags):
    command = [sys.executable, str(ROOT / "run.py"), *as_argv(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_when(process, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def losses_of(folder):
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.slow
def test_killed_training_continues_with_the_same_losses(base, tmp_path):
    flags = (
        base | TRAINING | {"max_steps": 24, "save_steps": 4, "intermediate_loss_fn": "shallowdeep_kd_unif"}
    )
    flags |= {"shallow_exit_layer": 2}
    killed = flags | {"output_dir": str(tmp_path / "killed")}
    kill_when(
        start(killed), lambda: Path(killed["output_dir"], "checkpoint-8", "trainer_state.json").exists()
    )
    steps = [int(path.name[11:]) for path in Path(killed["output_dir"]).glob("checkpoint-*")]
    newest = Path(killed["output_dir"], f"checkpoint-{max(steps)}")
    (newest / "trainer_state.json").write_text('{"half": ')  # as if killed while this was written
    for folder in (flags, killed):
        run.main(as_argv(folder))
    expected, continued = losses_of(flags["output_dir"]), losses_of(killed["output_dir"])
    assert len(continued) == 24 and continued == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_killed_evaluation_continues_to_the_same_result(base, rows, tmp_path):
    many = tmp_path / "many.jsonl"
    lines = rows.read_text().splitlines() * 12
    many.write_text("\n".join(json.dumps(json.loads(line) | {"id": str(i)}) for i, line in enumerate(lines)))
    flags = base | FREE | {"use_adapt_threshold": True, "do_eval": True, "validation_file": str(many)}
    flags |= {"per_device_eval_batch_size": 1, "resume_eval": True, "adapt_zeta": 0.1}
    killed = flags | {"output_dir": str(tmp_path / "killed")}
    log = Path(killed["output_dir"], "predictions.jsonl")
    kill_when(start(killed), lambda: log.is_file() and log.read_text().count("\n") > 20)
    done = log.read_text().splitlines()
    assert len(done) < len(lines)
    log.write_text("\n".join(done[:20]) + "\n" + done[20][:30])  # a line cut in half
    for settings in (flags, killed):
        run.main(as_argv(settings))
    timed = ("seconds", "seconds_per_sample_median", "tokens_per_second", "ms_per_token")
    results = [
        {name: value for name, value in results_of(settings).items() if name not in timed}
        for settings in (flags, killed)
    ]
    assert results[0] == results[1]
    assert log.read_text().splitlines()[:20] == done[:20]


def test_resume_can_be_switched_on_later(base, tmp_path):
    flags = base | {"do_eval": True}
    run.main(as_argv(flags))
    log = Path(flags["output_dir"], "predictions.jsonl")
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])
    run.main(as_argv(flags | {"resume_eval": True}))
    ours, theirs = ([json.loads(line) for line in data.splitlines()] for data in (log.read_bytes(), whole))
    assert [row["prediction"] for row in ours] == [row["prediction"] for row in theirs]


def test_resuming_with_other_weights_is_refused(base, tmp_path, capsys):
    run.main(as_argv(base | {"do_eval": True}))
    other = tmp_path / "other"
    shutil.copytree(base["model_name_or_path"], other)
    tiny_model(seed=9).save_pretrained(other)
    with pytest.raises(SystemExit):
        run.main(as_argv(base | {"do_eval": True, "resume_eval": True, "model_name_or_path": str(other)}))
    assert "weights" in capsys.readouterr().err


def test_continuing_a_training_with_another_loss_is_refused(base, capsys):
    flags = base | TRAINING | {"intermediate_loss_fn": "weighted_ce"}
    run.main(as_argv(flags))
    with pytest.raises(SystemExit):
        run.main(as_argv(flags | {"intermediate_loss_fn": "shallowdeep_ce", "shallow_exit_layer": 3}))
    assert "other exit settings" in capsys.readouterr().err


def test_unsupported_families_get_one_line(base, tmp_path, capsys):
    config = PLBartConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=8)
    config.decoder_ffn_dim, config.encoder_attention_heads, config.decoder_attention_heads = 8, 2, 2
    shutil.copytree(base["model_name_or_path"], tmp_path / "plbart")
    PLBartForConditionalGeneration(config).save_pretrained(tmp_path / "plbart")
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(base | {"do_eval": True, "model_name_or_path": str(tmp_path / "plbart")}))
    assert stop.value.code == 2 and "view" in capsys.readouterr().err


def test_corrupt_weights_get_one_line(base, tmp_path, capsys):
    folder = tmp_path / "corrupt"
    shutil.copytree(base["model_name_or_path"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(base | {"do_eval": True, "model_name_or_path": str(folder)}))
    assert stop.value.code == 2 and str(folder) in capsys.readouterr().err


def test_resuming_with_other_flags_is_refused(base, capsys):
    flags = base | {"do_eval": True, "resume_eval": True}
    run.main(as_argv(flags))
    with pytest.raises(SystemExit):
        run.main(as_argv(flags | {"static_exit_layer": 2}))
    assert "static_exit_layer" in capsys.readouterr().err


def test_log_drops_only_the_line_that_was_cut(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with PredictionLog(path, {"a": 1}) as log:
        rest = {"reference": "", "tokens": 1, "pieces": ["a"], "exit_layers": None, "seconds": 1.0}
        log.append([Record("1", "a\u2028b", **rest), Record("2", "", **rest)])
    with path.open("a") as file:
        file.write('{"id": "3 \u2028 ü')
    path.write_bytes(path.read_bytes()[:-1])  # within a character
    with PredictionLog(path, {"a": 1}, resume=True) as log:
        assert log.records == [Record("1", "a\u2028b", **rest), Record("2", "", **rest)]


def refused(flags, capsys):
    """The one line that run.py answers with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(flags))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(errors) == 1
    return errors[0]


def replace_unnoticed(path, content):
    """Other content under the same time stamp."""
    stamp = path.stat()
    path.write_text(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


CHANGES = {
    "reference": lambda text: text.replace("the package", "the library", 1),
    "source": lambda text: text.replace("ein das", "das ein", 1),
    "id": lambda text: text.replace("row-11", "row-99"),
    "fewer rows": lambda text: "".join(text.splitlines(keepends=True)[:2]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_evaluation_does_not_continue_on_changed_data(base, rows, tmp_path, capsys, name):
    data = tmp_path / "rows.jsonl"
    shutil.copy(rows, data)
    flags = base | {"do_eval": True, "validation_file": str(data), "per_device_eval_batch_size": 4}
    run.main(as_argv(flags))
    before = Path(flags["output_dir"], "predictions.jsonl").read_bytes()
    changed = CHANGES[name](data.read_text())
    assert changed != data.read_text()
    replace_unnoticed(data, changed)
    assert "other samples" in refused(flags | {"resume_eval": True}, capsys)
    assert Path(flags["output_dir"], "predictions.jsonl").read_bytes() == before
    run.main(as_argv(flags))
    assert results_of(flags)["samples"] == changed.count("\n")


def test_an_evaluation_does_not_continue_with_another_tokenizer_or_configuration(base, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(base["model_name_or_path"], model)
    flags = base | {"do_eval": True, "resume_eval": True, "model_name_or_path": str(model)}
    run.main(as_argv(flags))
    run.main(as_argv(flags))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"relative_attention_max_distance": 2}))
    assert "other configuration" in refused(flags, capsys)
    (model / "config.json").write_text(json.dumps(settings))
    pieces = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(pieces.replace("▁ein", "▁kein"))
    assert "other tokenizer" in refused(flags, capsys)


def test_an_evaluation_does_not_continue_with_another_threshold_file(base, tmp_path, capsys):
    flags = base | FREE | {"do_eval": True, "use_adapt_threshold": True}
    run.main(as_argv(flags))
    file = tmp_path / "threshold.json"
    shutil.copy(Path(flags["output_dir"], "adaptive_threshold.json"), file)
    flags |= {"adapt_threshold_file": str(file), "resume_eval": True, "output_dir": str(tmp_path / "second")}
    run.main(as_argv(flags))
    content = json.loads(file.read_text())
    content["observed"]["num_sequences"] += 1
    file.write_text(json.dumps(content))
    assert "other content of adapt_threshold_file" in refused(flags, capsys)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_does_not_continue_on_changed_rows(base, rows, tmp_path, capsys, streaming):
    data = tmp_path / "rows.jsonl"
    shutil.copy(rows, data)
    flags = base | TRAINING | {"max_steps": 2, "train_file": str(data), "streaming": streaming}
    run.main(as_argv(flags))
    run.main(as_argv(flags | {"max_steps": 4}))  # more steps are no other rows
    assert set(losses_of(flags["output_dir"])) == {1, 2, 3, 4}
    replace_unnoticed(data, CHANGES["reference"](data.read_text()))
    assert "other training rows" in refused(flags | {"max_steps": 6}, capsys)


def test_a_second_run_on_one_output_folder_is_refused(base, capsys, monkeypatch):
    flags = base | {"do_eval": True}
    folder = Path(flags["output_dir"])
    with locked_output_dir(folder):
        assert f"--output_dir {folder}: another run is writing there" in refused(flags, capsys)
        monkeypatch.setenv("RANK", "1")  # another process of the run that holds the lock
        with locked_output_dir(folder):
            assert sorted(path.name for path in folder.iterdir()) == [".lock", ".lock.1"]
        monkeypatch.delenv("RANK")
        assert "another run" in refused(flags, capsys)
    run.main(as_argv(flags))
    assert not [path.name for path in folder.iterdir() if "lock" in path.name]


def test_a_lock_that_a_killed_run_left_is_no_obstacle(base):
    flags = base | {"do_eval": True}
    lock = Path(flags["output_dir"], ".lock")
    code = (
        "import sys, time; from pathlib import Path; from util.files import locked\n"
        f"with locked(Path({str(lock)!r}), ''):\n    print('held', flush=True); time.sleep(600)"
    )
    lock.parent.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run is writing"), locked_output_dir(lock.parent):
        pass
    holder.kill()
    holder.wait()
    assert lock.exists()
    run.main(as_argv(flags))
    assert results_of(flags)["samples"] == 12


def test_help_shows_all_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    shown = capsys.readouterr().out
    flags = ("--model_name_or_path", "--use_shallow_deep", "--intermediate_loss_fn", "--paper_settings")
    assert stop.value.code == 0 and all(flag in shown for flag in flags)


def test_missing_evaluation_rows_are_found_before_training(base, capsys):
    flags = base | TRAINING | {"do_eval": "True"}
    del flags["validation_file"]
    with pytest.raises(SystemExit):
        run.main(as_argv(flags))
    assert "--validation_file" in capsys.readouterr().err
    assert not Path(flags["output_dir"], "model.safetensors").exists()
