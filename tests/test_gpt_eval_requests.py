"""The judge's requests: prompts, draws, and wrong input."""

from __future__ import annotations

import csv
import re
from collections import Counter

import pytest
from judge_runs import make, make_flags, write_inputs, write_rows

from gpt_eval.__main__ import main
from gpt_eval.judgements import read_requests


def test_requests_hold_the_papers_prompts_in_both_orders(tmp_path):
    requests = make(tmp_path, 2, "--repeats", "2", first="$source {}")
    assert Counter((row["judgement"], row["repeat"]) for row in requests) == {
        (judgement, repeat): 4 for judgement in ("likert", "pairwise") for repeat in (0, 1)
    }
    orders = [row for row in requests if row["judgement"] == "pairwise" and row["id"] == "s0"][:2]
    assert [row["systems"] for row in orders] == [["free", "full"], ["full", "free"]]
    assert orders[1]["body"]["messages"][-1]["content"] == (
        'Given a new article, which summary is better? Answer "Summary 0" or "Summary 1". You do not need to '
        "explain the reason.\nArticle: good source s0\nSummary 0: bad s0\nSummary 1: $source s0"
    )
    assert requests[0]["body"]["messages"][-1]["content"].endswith("Summary: $source s0")
    assert len({row["key"] for row in requests}) == 16


def test_requests_are_drawn_by_seed_and_equal_texts_share_an_answer(tmp_path):
    flags = ["--num_samples", "3", "--judgements", "likert"]
    drawn = [make(tmp_path, 20, *flags, "--seed", seed) for seed in ("1", "1", "2")]
    ids = [{row["id"] for row in requests} for requests in drawn]
    assert len(ids[0]) == 3 and ids[0] == ids[1] != ids[2]
    requests = make(tmp_path, 5, second="good {}")
    assert len(requests) == 20 and len({row["key"] for row in requests}) == 10


def test_csv_and_data_sets_without_their_prefix(tmp_path):
    names = ["python3-zope.testing", "gedit-plugins"]
    with (tmp_path / "free.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "prediction"], *([name, "null"] for name in names)])
    path = tmp_path / "requests.jsonl"
    flags = ["--predictions", f"free={tmp_path / 'free.csv'}", "--dataset_name", "debian_synopsis"]
    assert main(["make", "--requests", str(path), *flags]) == 0
    text = read_requests(path)[0]["body"]["messages"][-1]["content"]
    assert "\nArticle: This package provides" in text and text.endswith("Summary: null")


def test_body_flags_override_and_take_out(tmp_path):
    extra = '{"seed": null, "max_tokens": null, "max_completion_tokens": 9}'
    body = make(tmp_path, 1, "--body", extra, "--structured_output", "none")[0]["body"]
    assert set(body) == {"messages", "temperature", "max_completion_tokens"}


def test_repeats_need_their_seeds(tmp_path, capsys):
    flags = ["make", "--predictions", "a=b.csv", "--source_file", "c.csv", "--repeats", "3"]
    assert main([*flags, "--body", '{"seed": null}']) == 2
    assert "--repeats 3 asks with another seed each time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "flag", "wanted"),
    [
        (["--dataset_name", "samsum"], ["--source_column", "x"], "source_file"),
        (["--dataset_name", "samsum"], ["--id_column", "x"], "source_file"),
        (["--source_file", "c.csv"], ["--split", "train"], "dataset_name"),
    ],
)
def test_flags_of_other_texts_are_refused(capsys, texts, flag, wanted):
    assert main(["make", "--predictions", "a=b.csv", *texts, *flag]) == 2
    assert f"{flag[0]} has no effect here: add --{wanted}" in capsys.readouterr().err


ROW = {"id": "s0", "prediction": "x"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW], r"free.jsonl, line 2: the id 's0' is there twice"),
        ([{"id": "s0"}], r"free.jsonl, line 1: lacks prediction"),
        ([ROW], r"free.jsonl lacks the id 's1', prediction 2 of \S*full.jsonl"),
        ([ROW, ROW | {"id": "s1"}, ROW | {"id": "s9"}], r"full.jsonl lacks the id 's9', prediction 3 of"),
        (
            [ROW | {"prediction": "\ud800"}],
            r"free.jsonl, line 1: the prediction of 's0' is not text",
        ),
        ([], r"free.jsonl: there are no predictions"),
        (["text"], r"free.jsonl, line 1: not a JSON object"),
    ],
)
def test_predictions_that_do_not_fit_are_named(tmp_path, capsys, rows, message):
    write_inputs(tmp_path, 2)
    write_rows(tmp_path / "free.jsonl", rows)
    assert main(make_flags(tmp_path)) == 2
    assert re.search(rf"^error: .*{message}", capsys.readouterr().err, re.MULTILINE)


def test_other_wrong_input_is_named(tmp_path, capsys):
    write_inputs(tmp_path, 2)
    write_rows(tmp_path / "source.jsonl", [{"id": "s0", "document": "text"}])
    (tmp_path / "cut.jsonl").write_text('{"id": "s0", "prediction": "x"}\n{"id": ')
    (tmp_path / "likert.txt").write_text("Rate $summary, it cost $5.")
    wrong = {
        r"free.jsonl, prediction 2: \S*source.jsonl has no text with the id 's1'": make_flags(tmp_path),
        r"cut.jsonl, line 2: not JSON": make_flags(tmp_path, systems=["cut"]),
        r"none.jsonl cannot be read: No such file": make_flags(tmp_path, systems=["none"]),
        r"pairwise needs two files": make_flags(tmp_path, "--judgements", "pairwise", systems=["free"]),
        r"no column 'text'": make_flags(tmp_path, "--source_column", "text"),
        r"under different names": make_flags(tmp_path, systems=["free", "free"]),
    }
    for message, flags in wrong.items():
        assert main(flags) == 2
        assert re.search(message, capsys.readouterr().err)
    write_inputs(tmp_path, 1)
    assert main(make_flags(tmp_path, "--prompts", str(tmp_path), systems=["free"])) == 2
    assert "use exactly the fields $source, $summary; write a dollar sign as $$" in capsys.readouterr().err
