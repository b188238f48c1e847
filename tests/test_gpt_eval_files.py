"""What the judge reads: texts and ids as they were written, whatever wrote them; nothing is lost unnamed."""

from __future__ import annotations

import csv
import json

import pytest

from gpt_eval.__main__ import main
from gpt_eval.judgements import read_requests


def make(folder, free, full, source):
    """Exit code of `make` for three files, and the samples in its requests: id -> (source, free, full)."""
    requests = folder / "requests.jsonl"
    systems = ["--predictions", f"free={free}", f"full={full}", "--source_file", str(source)]
    code = main(["make", "--requests", str(requests), *systems, "--judgements", "pairwise"])
    rows = read_requests(requests) if code == 0 else []
    texts = {}
    for row in rows:
        if row["systems"] == ["free", "full"]:
            article, _, rest = (
                row["body"]["messages"][-1]["content"].partition("Article: ")[2].partition("\nSummary 0: ")
            )
            texts[row["id"]] = (article, *rest.split("\nSummary 1: "))
    return code, texts


def write(path, rows, columns):
    """Rows as a file of the kind that the suffix names, as Excel and others write it."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        return path
    lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_ids_texts_and_order(tmp_path, kind):
    """Byte order marks, CRLF, a blank last line, `001` beside `1`, other orders, texts like values."""
    ids = ["001", "1", "1.10", "null", "é"]
    texts = ["030", "NA", 'say "hi", twice', "two\r\nlines", "long " * 40_000 + "end"]
    rows = list(zip(ids, texts, strict=True))
    free = write(tmp_path / f"free.{kind}", rows, ["id", "prediction"])
    full = write(tmp_path / f"full.{kind}", rows[::-1], ["id", "prediction"])
    source = write(tmp_path / f"source.{kind}", rows[2:] + rows[:2], ["id", "document"])
    assert make(tmp_path, free, full, source) == (0, {name: (text,) * 3 for name, text in rows})


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_samples_without_a_text_are_left_out_and_named(tmp_path, capsys, kind):
    ids = ["a", "b", "c", "d"]
    files = [
        write(tmp_path / f"{name}.{kind}", list(zip(ids, texts, strict=True)), ["id", column])
        for name, texts, column in (
            ("free", ["1", "", "3", " \n"], "prediction"),
            ("full", ["1", "2", "3", ""], "prediction"),
            ("source", ["x", "y", "", "z"], "document"),
        )
    ]
    code, texts = make(tmp_path, *files)
    assert (code, texts) == (0, {"a": ("x", "1", "1")})
    assert capsys.readouterr().err.splitlines() == [
        "left out: 'b' is empty in free",
        "left out: 'c' is empty in the source texts",
        "left out: 'd' is empty in free and full",
    ]
    files[0] = write(tmp_path / f"none.{kind}", [(name, "") for name in ids], ["id", "prediction"])
    assert make(tmp_path, *files)[0] == 2
    assert "every sample has an empty prediction or source text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,prediction\na,one, two\n", "line 2: more cells than columns"),
        ('id,prediction\na,"one\nb,two\n', "not CSV (unexpected end of data)"),
        ('id,prediction\na,"one" two\n', "not CSV"),
        ("id,prediction,prediction\na,b,c\n", "two columns have the same name"),
        ("id;prediction\na;one\n", "line 2: lacks id, prediction"),
        ("id,prediction\na\n", "line 2: lacks prediction"),
        ("id,prediction\na,x\n\na,y\n", "line 4: the id 'a' is there twice"),
        ("id,prediction\n", "there are no predictions"),
    ],
)
def test_csv_that_would_be_misread_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "free.csv"
    path.write_text(text)
    source = write(tmp_path / "source.csv", [("a", "x")], ["id", "document"])
    assert make(tmp_path, path, path, source)[0] == 2
    output = capsys.readouterr().err
    assert output.startswith(f"error: {path}") and message in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--seed", "-1"),
        ("--num_samples", "1" + "0" * 30),
        ("--temperature", "nan"),
        ("--body", "[" * 100_000),
    ],
)
def test_numbers_out_of_range_are_refused_by_flag(tmp_path, capsys, flag, value):
    assert main(["make", "--predictions", "a=b.csv", "--source_file", "c.csv", flag, value]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ") and flag in output and output.count("\n") == 1
