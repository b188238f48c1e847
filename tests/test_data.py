"""Rows to batches: formats, columns, languages, lengths, embedded data."""

from __future__ import annotations

import gzip
import json

import pytest
from transformers import T5Tokenizer

from models.errors import UserError
from util.arguments import DataArguments
from util.data import dataset_record, load_examples, tokenize
from util.tasks import DATASETS

ROWS = [{"text": "ein paket", "title": "a package"}, {"text": "zwei", "title": "two"}]


def arguments(**settings):
    return DataArguments(
        **{"task": "summarization", "source_column": "text", "target_column": "title"} | settings
    )


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".csv":
        path.write_text("text,title\n" + "".join(f"{row['text']},{row['title']}\n" for row in rows))
    else:
        path.write_text(lines)
    return str(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.csv"])
def test_local_formats(tmp_path, name):
    flags = arguments(train_file=write(tmp_path / name, ROWS), source_prefix="summarize: ")
    examples = load_examples(dataset_record(flags), flags, "train")
    assert list(examples["source"]) == ["summarize: ein paket", "summarize: zwei"]
    assert list(examples["target"]) == ["a package", "two"] and list(examples["id"]) == ["0", "1"]


def test_rows_without_text_are_skipped(tmp_path, caplog):
    rows = [*ROWS, {"text": "drei", "title": None}, {"text": " ", "title": "four"}]
    flags = arguments(train_file=write(tmp_path / "rows.jsonl", rows))
    assert len(load_examples(dataset_record(flags), flags, "train")) == 2
    assert "skipped 2 rows" in caplog.text


def test_missing_split_names_the_flag(tmp_path):
    flags = arguments(train_file=write(tmp_path / "rows.jsonl", ROWS))
    with pytest.raises(UserError, match="--validation_file"):
        load_examples(dataset_record(flags), flags, "validation")


def test_unknown_format_is_refused(tmp_path):
    path = tmp_path / "rows.xml"
    path.write_text("<rows/>")
    flags = arguments(train_file=str(path))
    with pytest.raises(UserError, match=r"\.csv"):
        load_examples(dataset_record(flags), flags, "train")


def test_data_set_of_another_task_is_refused():
    with pytest.raises(UserError, match="--task translation"):
        dataset_record(DataArguments(task="summarization", dataset_name="debian_de_en"))


def test_hub_ids_keep_their_settings():
    flags = DataArguments(
        task="translation",
        dataset_name="some/corpus",
        dataset_config_name="de-en",
        dataset_revision="refs/convert/parquet",
        source_lang="de",
        target_lang="en",
    )
    record = dataset_record(flags)
    assert (record.hub_id, record.config, record.revision) == ("some/corpus", "de-en", "refs/convert/parquet")
    assert record.languages == ("de", "en")


def test_question_answering_rows(tmp_path):
    row = {"question": "Who?", "context": "Ada wrote it.", "answers": {"text": ["Ada", "Ada L."]}}
    flags = DataArguments(task="question_answering", test_file=write(tmp_path / "rows.jsonl", [row]))
    examples = load_examples(dataset_record(flags), flags, "test")
    assert examples[0]["source"] == "question: Who? context: Ada wrote it."
    assert examples[0]["target"] == "Ada"


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_embedded_data(name, split):
    flags = DataArguments(task=DATASETS[name].task, dataset_name=name)
    examples = load_examples(dataset_record(flags), flags, split)
    assert len(examples) > 800 and {"id", "source", "target", "seen_in_train"} == set(examples.column_names)
    assert 0 < sum(examples["seen_in_train"]) < 0.1 * len(examples)


def test_long_rows_are_dropped_or_cut(tmp_path):
    words = [(f"▁{word}", -1.0) for word in ("a", "b", "c", "d")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *words]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    rows = [{"text": "a b c d", "title": "a"}, {"text": "a", "title": "a b c d"}, {"text": "a", "title": "b"}]
    path = write(tmp_path / "rows.jsonl", rows)
    lengths = {"max_source_length": 3, "max_target_length": 4, "train_file": path}
    flags = arguments(**lengths)
    encoded = tokenize(load_examples(dataset_record(flags), flags, "train"), tokenizer, flags, 4)
    assert [len(ids) for ids in encoded["input_ids"]] == [3, 2, 2]
    assert [len(ids) for ids in encoded["labels"]] == [2, 4, 2]
    flags = arguments(**lengths, drop_long_samples=True)
    kept = load_examples(dataset_record(flags), flags, "train", tokenizer)
    assert list(kept["target"]) == ["b"]
