"""Rows to batches: formats, columns, languages, lengths, embedded data."""

from __future__ import annotations

import gzip
import json
from functools import partial
from itertools import pairwise

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, T5Tokenizer

from models.errors import UserError
from util.data.examples import dataset_record, load_examples, tokenize
from util.data.streaming import stream_training_rows
from util.data_arguments import DataArguments
from util.tasks import DATASETS, PARQUET, DatasetRecord

WORDS = " ".join(f"word{number}" for number in range(60))
ROWS = [{"text": "ein paket", "title": "a package"}, {"text": "zwei", "title": "two"}]


def arguments(**settings):
    return DataArguments(
        **{"task": "summarization", "source_column": "text", "target_column": "title"} | settings
    )


def write(path, rows):
    if path.suffix == ".gz":
        plain = path.with_suffix("")
        write(plain, rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        return str(path)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        path.write_text("text,title\n" + "".join(f"{row['text']},{row['title']}\n" for row in rows))
    else:
        path.write_text(lines)
    return str(path)


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_local_formats(tmp_path, name, zipped):
    flags = arguments(train_file=write(tmp_path / (name + zipped), ROWS), source_prefix="summarize: ")
    examples = load_examples(dataset_record(flags), flags, "train")
    assert list(examples["source"]) == ["summarize: ein paket", "summarize: zwei"]
    assert list(examples["target"]) == ["a package", "two"] and list(examples["id"]) == ["0", "1"]


def test_rows_without_text_are_skipped_and_listed(tmp_path, caplog):
    rows = [*ROWS, {"text": "drei", "title": None}, {"text": " ", "title": "four"}]
    flags = arguments(train_file=write(tmp_path / "rows.jsonl", rows))
    flags.report_dir = str(tmp_path)
    assert len(load_examples(dataset_record(flags), flags, "train")) == 2
    assert "skipped 2 of 4 rows" in caplog.text
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.train.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in listed] == [(2, "empty target"), (3, "empty source")]


def test_values_that_are_no_text_are_skipped_numbers_are_not(tmp_path):
    rows = [{"text": "a", "title": {"nested": "b"}}, {"text": "a", "title": None}]
    flags = arguments(train_file=write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match="none of 2 rows can be used; row 0: target is of type dict"):
        load_examples(dataset_record(flags), flags, "train")
    flags = arguments(train_file=write(tmp_path / "rows.csv", [{"text": "when", "title": 1999}]))
    assert load_examples(dataset_record(flags), flags, "train")[0]["target"] == "1999"


def test_repeated_ids_become_row_numbers(tmp_path, caplog):
    rows = [{"id": "x", **row} for row in ROWS]
    flags = arguments(train_file=write(tmp_path / "rows.jsonl", rows))
    assert list(load_examples(dataset_record(flags), flags, "train")["id"]) == ["0", "1"]
    assert "rows 0 and 1 share the id 'x'" in caplog.text


def test_row_numbers_are_those_of_the_file(tmp_path, caplog):
    rows = [{"id": "a", "text": "", "title": "x"}, *({"id": "a", **row} for row in ROWS)]
    flags = arguments(train_file=write(tmp_path / "rows.jsonl", rows))
    assert list(load_examples(dataset_record(flags), flags, "train")["id"]) == ["1", "2"]
    assert "rows 1 and 2 share the id 'a'" in caplog.text
    write(tmp_path / "rows.jsonl", rows[:2])  # the first cannot be used: nothing shares its id
    assert list(load_examples(dataset_record(flags), flags, "train")["id"]) == ["a"]


@pytest.mark.parametrize("name", ["corpus.test.jsonl.gz", "test.csv"])
def test_data_dir_replaces_the_hub(tmp_path, name):
    write(tmp_path / name, ROWS)
    flags = arguments(dataset_name="corpus", data_dir=str(tmp_path))
    assert len(load_examples(dataset_record(flags), flags, "test")) == 2
    with pytest.raises(UserError, match="no validation split"):
        load_examples(dataset_record(flags), flags, "validation")


def test_embedded_rows_stand_in_for_files_that_data_dir_lacks(tmp_path):
    flags = DataArguments(task="translation", dataset_name="debian_de_en", data_dir=str(tmp_path))
    assert len(load_examples(dataset_record(flags), flags, "test")) > 800
    write(tmp_path / "debian_de_en.test.jsonl", [{"translation": {"de": "eins", "en": "one"}}])
    assert list(load_examples(dataset_record(flags), flags, "test")["target"]) == ["one"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("checkpoints/debian-t5-free")


def test_long_sources_are_counted(tmp_path, tokenizer, caplog):
    flags = arguments(train_file=write(tmp_path / "rows.jsonl", ROWS), max_source_length=2)
    tokenize(load_examples(dataset_record(flags), flags, "train"), tokenizer, flags, 4)
    assert "1 of 2 sources are cut" in caplog.text


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet.gz"])
def test_streamed_rows_equal_loaded_ones(tmp_path, tokenizer, name):
    rows = [*ROWS, {"text": "drei", "title": None}] * 3
    flags = arguments(train_file=write(tmp_path / name, rows))
    record = dataset_record(flags)
    streamed = list(stream_training_rows(record, flags, tokenizer, seed=0))
    loaded = list(tokenize(load_examples(record, flags, "train"), tokenizer, flags, 128))
    assert sorted(map(str, streamed)) == sorted(map(str, loaded)) and len(streamed) == 6


def test_streams_count_and_list_what_they_skip_and_cut(tmp_path, tokenizer, caplog):
    rows = [*ROWS, {"text": "drei", "title": None}, {"id": "x", "text": " ", "title": "four"}]
    flags = arguments(train_file=write(tmp_path / "rows.jsonl", rows), max_source_length=2)
    flags.report_dir = str(tmp_path)
    stream = stream_training_rows(dataset_record(flags), flags, tokenizer, seed=0)
    for _ in range(2):  # epochs: a row is listed once
        assert len(list(stream)) == 2
    assert "row 2 is skipped: empty target" in caplog.text and "skipped 2 of 4 rows" in caplog.text
    assert "cut to --max_source_length 2 (1 so far)" in caplog.text
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.train.jsonl").read_text().splitlines()]
    assert [(row["row"], row["id"], row["reason"]) for row in listed] == [
        (2, "2", "empty target"),
        (3, "x", "empty source"),
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_of_skipped_rows_does_not_outlive_its_cause(tmp_path, tokenizer, streaming):
    flags = arguments(train_file=write(tmp_path / "rows.jsonl", [*ROWS, {"text": "", "title": "a"}]))
    flags.report_dir = str(tmp_path)

    def read():
        if streaming:
            list(stream_training_rows(dataset_record(flags), flags, tokenizer, seed=0))
        else:
            load_examples(dataset_record(flags), flags, "train")

    read()
    assert (tmp_path / "skipped_rows.train.jsonl").is_file()
    write(tmp_path / "rows.jsonl", ROWS)
    read()
    assert not (tmp_path / "skipped_rows.train.jsonl").exists()


BAD_FILES = {
    "broken.jsonl": (
        b'{"text": "a", "title": "b"}\n' * 2 + b'{"text": \n',
        r"broken.jsonl, line 3: not JSON",
    ),
    "latin.jsonl": (b'{"text": "a", "title": "f\xfcr"}\n', r"latin.jsonl, line 1: not UTF-8"),
    "latin.csv": (b"text,title\na,f\xfcr\n", "latin.csv: cannot be read as UTF-8"),
    "ragged.csv": (b"text,title\na,b\nc,d,e\n", "ragged.csv: .* line 3"),
    "empty.csv": (b"", "empty.csv: is empty"),
    "header.csv": (b"text,title\n", "header.csv: .*is empty"),
    "empty.jsonl": (b"", "empty.jsonl: is empty"),
    "zip.jsonl.gz": (b'{"text": "a", "title": "b"}\n', "zip.jsonl.gz: cannot be read"),
    "cut.parquet": (b"PAR1", "cut.parquet: "),
    "columns.jsonl": (b'{"text": "a", "titel": "b"}\n', "no column 'title'; found text, titel"),
    "useless.jsonl": (b'{"text": "a", "title": ""}\n', "none of 1 rows can be used; row 0: empty target"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_get_one_line(tmp_path, tokenizer, name, streaming):
    content, complaint = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    flags = arguments(train_file=str(tmp_path / name))
    with pytest.raises(UserError, match=complaint):
        if streaming:
            list(stream_training_rows(dataset_record(flags), flags, tokenizer, seed=0))
        else:
            load_examples(dataset_record(flags), flags, "train")


def test_converted_hub_files_are_read_by_configuration(tmp_path):
    """The hub's branch of converted files: a folder for each configuration, no card."""
    for config in ("d", "e"):
        for split in ("train", "validation"):
            folder = tmp_path / config / split
            folder.mkdir(parents=True)
            write(folder / "0000.parquet", [{"text": config, "title": split}])
    record = DatasetRecord("summarization", "text", "title", str(tmp_path), config="e", revision=PARQUET)
    for split in ("train", "validation"):
        examples = load_examples(record, arguments(dataset_name="x"), split)
        assert (list(examples["source"]), list(examples["target"])) == (["e"], [split])


def question_rows(tmp_path, split, context, answers, tokenizer, **settings):
    row = {"id": "q", "question": "Who wrote it?", "context": context, "answers": {"text": answers}}
    settings |= {"task": "question_answering", f"{split}_file": write(tmp_path / f"{split}.jsonl", [row])}
    flags = DataArguments(**settings)
    return load_examples(dataset_record(flags), flags, split, tokenizer)


def test_long_contexts_become_overlapping_windows(tmp_path, tokenizer):
    words = [f"word{number}" for number in range(60)]
    lengths = {"max_source_length": 80, "doc_stride": 20}
    rows = question_rows(tmp_path, "test", " ".join(words), ["word5", "word41"], tokenizer, **lengths)
    assert len(rows) > 2 and list(rows["window"]) == list(range(len(rows))) and set(rows["id"]) == {"q"}
    assert max(len(tokenizer(source).input_ids) for source in rows["source"]) <= 80
    contexts = [source.split("context: ")[1] for source in rows["source"]]
    assert all(any(word in text.split() for text in contexts) for word in words)
    assert all(set(first.split()) & set(second.split()) for first, second in pairwise(contexts))
    trained = question_rows(tmp_path, "train", " ".join(words), ["word41"], tokenizer, **lengths)
    assert 0 < len(trained) < len(rows) and all("word41" in source for source in trained["source"])
    flags = DataArguments(task="question_answering", train_file=str(tmp_path / "train.jsonl"), **lengths)
    streamed = list(stream_training_rows(dataset_record(flags), flags, tokenizer, seed=0))
    assert sorted(row["input_ids"] for row in streamed) == sorted(
        tokenizer(list(trained["source"])).input_ids
    )


QUESTIONS = [  # contexts of several windows, but for the last; of the answers, some are not written there
    {"id": "held", "context": WORDS, "answers": ["word41", "the 41st"]},
    {"id": "second", "context": WORDS, "answers": ["the 7th", "word7"]},
    {"id": "bad", "context": WORDS, "answers": []},
    {"id": "nowhere", "context": WORDS, "answers": ["the 9th"]},
    {"id": "short", "context": "word1 word2", "answers": ["two"]},
]


def windows_of(tmp_path, rows, tokenizer, streaming):
    path = write(tmp_path / "rows.jsonl", [{"question": "Which?", **row} for row in rows])
    lengths = {"max_source_length": 80, "doc_stride": 20}
    flags = DataArguments(task="question_answering", train_file=path, **lengths)
    flags.report_dir = str(tmp_path)
    record = dataset_record(flags)
    if streaming:
        examples = list(stream_training_rows(record, flags, tokenizer, seed=0))
    else:
        examples = tokenize(load_examples(record, flags, "train", tokenizer), tokenizer, flags, 8)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return {(decode(row["input_ids"]), decode(row["labels"])) for row in examples}


@pytest.mark.parametrize("streaming", [False, True])
def test_questions_are_trained_where_an_answer_is_written(tmp_path, tokenizer, streaming, caplog):
    found = windows_of(tmp_path, QUESTIONS, tokenizer, streaming)
    assert {target for _, target in found} == {"word41", "word7", "two"}
    assert all(target in source.split() for source, target in found if target != "two")
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.train.jsonl").read_text().splitlines()]
    assert [(row["row"], row["id"]) for row in listed] == [(2, "bad"), (3, "nowhere")]
    assert "longer than --max_source_length" in listed[1]["reason"]
    skipped = "skipped 2 of 5 rows" if streaming else "skipped 1 of 4 rows"
    assert skipped in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_questions_without_any_written_answer_are_refused(tmp_path, tokenizer, streaming):
    with pytest.raises(UserError, match="none of 2 rows can be used; row 0: its context is longer"):
        windows_of(tmp_path, [QUESTIONS[3], QUESTIONS[3] | {"id": "other"}], tokenizer, streaming)


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
    assert examples[0]["target"] == "Ada" and examples[0]["references"] == ["Ada", "Ada L."]


@pytest.mark.parametrize("name", [name for name, record in DATASETS.items() if record.folder])
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
