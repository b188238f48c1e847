"""The library of flags: words and files become values, or get one line."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from real_rows import ROOT

from models.errors import UserError
from util.data_arguments import DataArguments
from util.flags import flag, list_flag, parse_groups, required_flag
from util.script_arguments import CalibrationArguments, ShortlistArguments, SimulationArguments


@dataclasses.dataclass
class Toy:
    _argument_group_name = "Toy"

    path: Path = required_flag("A path.")
    rates: list[float] = list_flag([0.5], "Rates, in % of 100.")
    layers: list[int] | None = flag(None, "Layers.")
    fast: bool = flag(True, "Whether.")
    body: dict | None = flag(None, "JSON.")
    batch_size: int = flag(1, "Size.")
    names: list[str] = list_flag([], "Names.")
    words: list[str] = list_flag(["a"], "Words.")


def test_words_become_values(tmp_path):
    words = ["--path", "a b", "--rates", "1", "2.5", "--layers", "3", "--no_fast", "--body", '{"a": [1]}']
    (toy,) = parse_groups((Toy,), "", [*words, "--batch-size=7"])
    assert toy == Toy(Path("a b"), [1.0, 2.5], [3], False, {"a": [1]}, 7)
    assert parse_groups((Toy,), "", ["--path", "x", "--fast", "no"]) == (Toy(Path("x"), fast=False),)
    file = tmp_path / "toy.yaml"
    file.write_text("path: y\nrates: [1, 2]\nbody: {a: 1}\nlayers: null\nfast: false\n")
    (toy,) = parse_groups((Toy,), "", [str(file), "--batch_size", "2"])
    assert toy == Toy(Path("y"), [1.0, 2.0], None, False, {"a": 1}, 2)


def test_files_hold_what_flags_can(tmp_path):
    file = tmp_path / "toy.json"
    body = {"a": "--b"}
    file.write_text(json.dumps({"path": "-x", "names": [], "rates": [-1, 2], "words": ["-y"], "body": body}))
    (toy,) = parse_groups((Toy,), "", [str(file)])
    assert toy == Toy(Path("-x"), [-1.0, 2.0], body=body, words=["-y"])
    assert parse_groups((Toy,), "", [f"--path={file}"]) == (Toy(file),), "no file of flags, but a flag's"
    file.write_text('{"path": "", "names": ["a", null, "b"], "words": [null, "-y"]}')
    assert parse_groups((Toy,), "", [str(file)]) == (Toy(Path(""), names=["a", "b"], words=["-y"]),)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("lairs: [3]", "Unknown flag --lairs: did you mean --layers?"),
        ("batch_size: many", "Argument --batch_size: invalid int value: 'many'"),
        ("rates: []", "Argument --rates: expected at least one argument"),
    ],
)
def test_what_is_wrong_in_a_file_names_it(content, line, tmp_path):
    file = tmp_path / "toy.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as refusal:
        parse_groups((Toy,), "", [str(file), "--path", "x"])
    assert str(refusal.value) == f"{file}: {line}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "Missing: --path. See --help."),
        (["--path", "x", "--lairs", "3"], "Unknown flag --lairs: did you mean --layers?"),
        (["--path", "x", "--layer", "3"], "Unknown flag --layer: did you mean --layers?"),
        (["--path", "x", "y"], "y: no flag takes this word."),
        (["--path", "x", "--fast", "maybe"], "Argument --fast: maybe is neither True nor False"),
        (["--path", "x", "--body", "[]"], "Argument --body: give a JSON object"),
        (["--path", "x", "--batch_size", "many"], "Argument --batch_size: invalid int value: 'many'"),
        (
            ["--path", "x", "--layers", str(2**63)],
            f"--layers {2**63} is too large: whole numbers have 64 bits.",
        ),
    ],
)
def test_wrong_words_get_one_line(words, line):
    with pytest.raises(UserError) as refusal:
        parse_groups((Toy,), "", words)
    assert str(refusal.value) == line


IDLE = [  # by hand: a group, flags of which the last has no effect, and what would give it one
    (CalibrationArguments, "--method crc --epsilon 0.1", "add --method ltt or --method ucb"),
    (CalibrationArguments, "--method crc --p_value betting", "add --method ltt or --method ucb"),
    (SimulationArguments, "--methods crc --epsilon 0.1", "add ltt to --methods or ucb to --methods"),
    (SimulationArguments, "--methods crc --p_values betting", "add ltt to --methods or ucb to --methods"),
    (DataArguments, "--shot_seed 3", "add --num_shots"),
    (DataArguments, "--task summarization --doc_stride 16", "add --task question_answering"),
]
REQUIRED = {
    SimulationArguments: ["--losses_file", "x", "--output_dir", "y"],
    DataArguments: ["--dataset_name", "debian_de_en"],
}


@pytest.mark.parametrize(("group", "words", "way"), IDLE)
def test_flags_without_effect_are_refused(group, words, way):
    with pytest.raises(UserError) as refusal:
        parse_groups((group,), "", [*REQUIRED.get(group, []), *words.split()])
    assert str(refusal.value) == f"{words.split()[-2]} has no effect here: {way}."


@pytest.mark.parametrize(("group", "words"), [
    (CalibrationArguments, "--method ucb --epsilon 0.1 --p_value betting"),
    (SimulationArguments, "--methods crc ltt --epsilon 0.1 --p_values betting"),
    (DataArguments, "--num_shots 2 --shot_seed 3"),
    (DataArguments, "--task question_answering --doc_stride 16")])  # fmt: skip
def test_flags_with_effect_are_taken(group, words):
    parse_groups((group,), "", [*REQUIRED.get(group, []), *words.split()])


def test_a_shortlist_is_compared_behind_a_layer():
    with pytest.raises(UserError, match="--shallow_layer must be positive, got 0"):
        parse_groups((ShortlistArguments,), "", ["--model_name_or_path", "x", "--shallow_layer", "0"])


@pytest.mark.parametrize("name", ["run", "scripts.sweep", "scripts.calibrate", "scripts.choose_exit"])
def test_every_program_names_its_file(name, tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text("thread: 2\n")
    with pytest.raises(SystemExit):
        importlib.import_module(name).main([str(file), "--threads", "2"])
    assert capsys.readouterr().err == f"error: {file}: Unknown flag --thread: did you mean --threads?\n"


MODEL = ["--model_name_or_path", str(ROOT / "checkpoints/debian-t5-free")]
UNREAD = [  # the command, a flag that it shares with run.py and does not read, and what to do instead
    ("sweep", "--max_predict_samples 1", "use --num_samples"),
    ("sweep", "--num_beams 4", "leave it out"),
    ("sweep", f"--baseline_predictions {__file__}", "leave it out"),
    ("choose_exit", "--max_eval_samples 1", "use --num_samples"),
    ("choose_exit", "--resume_eval True", "leave it out"),
    ("learn_shortlist", "--max_train_samples 1", "--num_samples compared"),
    ("train_exit", "--max_eval_samples 1", "use --max_train_samples"),
    ("train_exit", "--resume_eval True", "goes on by itself"),
    ("train_tokenizer", "--drop_long_samples True", "leave it out"),
    ("calibrate", "--max_eval_samples 3 --split test", "with --split test, use --max_predict_samples"),
    ("calibrate", "--max_predict_samples 3", "with --split validation, use --max_eval_samples"),
    ("calibrate", f"--baseline_predictions {__file__}", "leave it out"),
    ("calibrate", "--intermediate_loss_fn ce", "leave it out"),
]
ENOUGH = {
    "sweep": ["--free", "x"],
    "train_tokenizer": [],
    "calibrate": [*MODEL, "--use_shallow_deep", "True"],
}


@pytest.mark.parametrize(("name", "words", "instead"), UNREAD)
def test_flags_that_a_script_does_not_read_are_refused(name, words, instead, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    enough = [*ENOUGH.get(name, MODEL), "--dataset_name", "debian_de_en"]
    with pytest.raises(SystemExit):
        importlib.import_module(f"scripts.{name}").main([*enough, *words.split()])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words.split()[0]} has no effect here: ") and instead in error
    assert not list(tmp_path.iterdir())
