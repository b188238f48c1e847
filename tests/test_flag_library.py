"""The library of flags: words and files become values, or get one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from models.errors import UserError
from util.flags import flag, list_flag, parse_groups, required_flag


@dataclasses.dataclass
class Toy:
    _argument_group_name = "Toy"

    path: Path = required_flag("A path.")
    rates: list[float] = list_flag([0.5], "Rates, in % of 100.")
    layers: list[int] | None = flag(None, "Layers.")
    fast: bool = flag(True, "Whether.")
    body: dict | None = flag(None, "JSON.")
    batch_size: int = flag(1, "Size.")


def test_words_become_values(tmp_path):
    words = ["--path", "a b", "--rates", "1", "2.5", "--layers", "3", "--no_fast", "--body", '{"a": [1]}']
    (toy,) = parse_groups((Toy,), "", [*words, "--batch-size=7"])
    assert toy == Toy(Path("a b"), [1.0, 2.5], [3], False, {"a": [1]}, 7)
    assert parse_groups((Toy,), "", ["--path", "x", "--fast", "no"]) == (Toy(Path("x"), fast=False),)
    file = tmp_path / "toy.yaml"
    file.write_text("path: y\nrates: [1, 2]\nbody: {a: 1}\nlayers: null\nfast: false\n")
    (toy,) = parse_groups((Toy,), "", [str(file), "--batch_size", "2"])
    assert toy == Toy(Path("y"), [1.0, 2.0], None, False, {"a": 1}, 2)


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
