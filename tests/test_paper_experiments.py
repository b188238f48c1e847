"""The tables of docs/paper_experiments.md against the records, the scripts and the flags' defaults."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from real_rows import ROOT
from script_commands import words_for_run

from util.arguments import parse_arguments
from util.data.examples import dataset_record, load_examples
from util.tasks import DATASETS

PAGE = (ROOT / "docs" / "paper_experiments.md").read_text(encoding="utf8")
SCRIPTS = {
    "samsum": "run_sum_samsum.sh",
    "cnn_dailymail": "run_sum_cnndm.sh",
    "multi_news": "run_sum_multinews.sh",
    "big_patent": "run_sum_bigpatent.sh",
    "squad": "run_qa_squad.sh",
    "iwslt2017": "run_tr_iwslt.sh",
}


def read_tables():
    """Tables of the page, without their headings, as lists of cells."""
    tables = re.findall(r"((?:^\|.*\n)+)", PAGE, re.MULTILINE)
    split = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in t.splitlines()] for t in tables]
    return [table[2:] for table in split]


EXPERIMENTS, SHARED = read_tables()


def parse(name, *flags):
    words = ["--model_name_or_path", "x", "--dataset_name", name, "--task", DATASETS[name].task, *flags]
    return parse_arguments(
        [*words, "--paper_settings", "True", "--do_train", "--output_dir", "save", "--use_cpu"]
    )


def test_the_page_has_all_experiments():
    assert [row[0] for row in EXPERIMENTS] == list(SCRIPTS)


@pytest.mark.parametrize("row", EXPERIMENTS, ids=lambda row: row[0])
def test_records_and_scripts_are_the_pages(row, tmp_path):
    name, config, model, batches, epochs, prefix, lengths, eval_batch = row
    arguments = parse(name)
    record, training = dataset_record(arguments.data), arguments.training
    processes, batch = map(int, batches.split(" x "))
    assert training.per_device_train_batch_size == batch
    assert training.gradient_accumulation_steps == processes  # here there is one process
    assert training.num_train_epochs == int(epochs)
    assert training.per_device_eval_batch_size == int(eval_batch)
    assert record.prefix == prefix.strip("`") and (record.config or "") == config
    data = arguments.data
    assert f"{data.max_source_length} / {data.max_target_length}" == lengths
    words = words_for_run(tmp_path, SCRIPTS[name], "train", "free")
    started = dict(pairwise(words))
    assert started["--model_name_or_path"].split("/")[-1] == model
    assert (started["--dataset_name"], started["--task"]) == (name, DATASETS[name].task)
    assert started["--paper_settings"] == "True"


def test_shared_settings_are_the_pages():
    flags = {row[0].strip("`"): row[1:] for row in SHARED if row[0].startswith("`")}
    assert len(flags) == 10
    for name in SCRIPTS:
        arguments = parse(name)
        groups = (arguments.training, arguments.data, arguments.exit)
        for flag, (original, here, why) in flags.items():
            value = next(getattr(group, flag) for group in groups if hasattr(group, flag))
            assert str(getattr(value, "value", value)) == here == original and not why
        assert arguments.data.val_max_target_length == arguments.data.max_target_length


def test_what_differs_says_why():
    assert all(
        why for _, original, here, why in SHARED if here not in (original, "the same", "the same, and chrF")
    )


def test_questions_are_asked_as_the_original_asked_them(tmp_path):
    """`question: {question.lstrip()} context: {context.lstrip()}`, and the first answer."""
    question = {"id": "a", "question": "  Who? ", "context": "\n Ada wrote it. "}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(question | {"answers": {"text": ["Ada", "it"]}}))
    arguments = parse("squad", "--train_file", str(path))
    row = load_examples(dataset_record(arguments.data), arguments.data, "train")[0]
    assert row["source"] == "question: Who?  context: Ada wrote it. " and row["target"] == "Ada"
