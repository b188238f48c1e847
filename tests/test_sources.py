"""Values arrive as they are written, whatever the format, and a replaced file is read anew."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import os
from decimal import Decimal

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from models.errors import UserError
from util.data.examples import dataset_record, load_examples, tokenize
from util.data.sources import load_cells, load_file
from util.data.streaming import stream_training_rows
from util.data_arguments import DataArguments

# What spreadsheets, pandas and JSON readers change: id, source, target.
VALUES = [
    ("001", "030", "1.10"),
    ("002", "2008", "None"),
    ("1e3", "null", "NA"),
    ("nan", "N/A", "2008-01-01"),
    ("007", 'a "b", c\td', "two\nlines"),
    ("008", "true", "1,000"),
    ("1.50", " 12345678901234567890123 ", "-0.0"),
]


def arguments(**settings):
    columns = {"source_column": "text", "target_column": "title"}
    return DataArguments(**{"task": "summarization"} | columns | settings)


def load(path, split="test", **settings):
    flags = arguments(**{f"{split}_file": str(path)} | settings)
    return load_examples(dataset_record(flags), flags, split)


def triples(examples):
    return list(zip(examples["id"], examples["source"], examples["target"], strict=True))


def write_table(path, rows, delimiter=",", encoding="utf8"):
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("id", "text", "title"), *rows])
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz", "marked.csv"])
def test_cells_are_the_texts_that_are_written(tmp_path, name):
    plain = tmp_path / name.removesuffix(".gz")
    encoding = "utf-8-sig" if name == "marked.csv" else "utf8"
    rows = [*VALUES, ("", "no id", "a"), ("9", "no target", "")]
    write_table(plain, rows, "\t" if name == "rows.tsv" else ",", encoding)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert triples(load(tmp_path / name)) == [*VALUES, ("7", "no id", "a")]


def test_long_cells_and_strange_tables(tmp_path):
    long = "word " * 60_000  # the module's own limit is 131,072 characters
    assert load(write_table(tmp_path / "long.csv", [("1", long, "a")]))["source"][0] == long
    for content, complaint in {
        b"id,text,text\n1,a,b\n": "two columns are named 'text'",
        b'id,text,title\n1,"a,b\n2,c,d\n': "line 3: unexpected end of data",
        b"id,text,title\n1,a,b\n2,c,d,e\n": "ends on line 3 has 4 cells, the header has 3",
    }.items():
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            load(tmp_path / "bad.csv")
    (tmp_path / "short.csv").write_text("id,text,title\n\n1,a,b\n2,c\n")
    assert triples(load(tmp_path / "short.csv")) == [("1", "a", "b")]


def test_quotation_marks_of_parallel_text_are_text(tmp_path):
    """Nothing is enclosed there: an unmatched mark would swallow the lines that follow."""
    lines = ["id\ttext\ttitle", '1\t"Hallo" sagte er.\t"Hello," he said.', '2\t"Ja"\t"Yes"', '3\t"a\tb"']
    path = tmp_path / "plain.tsv"
    path.write_text("\n".join(lines) + "\n")
    assert triples(load(path)) == [tuple(line.split("\t")) for line in lines[1:]]


@pytest.mark.parametrize("text", ['"Hallo" sagte er.', "two\nlines", "tab\tand\nline", '"', '"a'])
def test_quoted_cells_of_tables_are_taken_out(tmp_path, text):
    rows = [("1", text, "a"), ("2", "b", text)]
    assert triples(load(write_table(tmp_path / "rows.tsv", rows, "\t"))) == rows


JSON_ROWS = """\
{"id": 1.10, "text": 2008, "title": true}
{"id": "001", "text": "030", "title": 1.10}

{"text": "2008-01-01", "title": "2008-01-01T00:00:00", "more": {"a": [1]}}
{"id": 12345678901234567890123, "text": "None", "title": 1e5, "more": 3}
{"id": 4, "text": "gap", "title": NaN}
{"id": 5, "text": null, "title": "x"}
{"id": 6, "text": "left out"}
{"id": 7, "text": "half \\ud800", "title": "x"}
"""
JSON_VALUES = [
    ("1.10", "2008", "true"),
    ("001", "030", "1.10"),
    ("2", "2008-01-01", "2008-01-01T00:00:00"),
    ("12345678901234567890123", "None", "1e5"),
]


def layouts(lines):
    """The same rows as lines, as a list, under `data`, and over several lines."""
    rows = ",".join(line for line in lines.splitlines() if line)
    return {
        "lines.jsonl": lines,
        "lines.json": lines,
        "marked.jsonl": "\ufeff" + lines,
        "list.json": f"[{rows}]",
        "list.jsonl": f" [\n{rows}\n]\n",
        "data.json": f'{{"version": 1, "data": [{rows}]}}',
        "indented.json": f'{{\n"data": [\n{rows}\n]\n}}',
    }


@pytest.mark.parametrize("name", layouts(""))
def test_json_values_are_the_texts_that_are_written(tmp_path, name):
    (tmp_path / name).write_text(layouts(JSON_ROWS)[name], encoding="utf8")
    flags = arguments(test_file=str(tmp_path / name))
    flags.report_dir = str(tmp_path)
    assert triples(load_examples(dataset_record(flags), flags, "test")) == JSON_VALUES
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.test.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"].split(",")[0]) for row in listed] == [
        (4, "empty target"),
        (5, "empty source"),
        (6, "empty target"),
        (7, "source holds half a character"),
    ]


def test_json_columns_and_broken_documents(tmp_path):
    columns = tmp_path / "columns.json"
    for space in ("\n", "", " "):
        parts = ["{", '"id": ["01", 2.50],', '"text": ["a", 7],', '"title": [false, "b"]', "}\n"]
        columns.write_text(space.join(parts))
        assert triples(load(columns)) == [("01", "a", "false"), ("2.50", "7", "b")]
    for content, complaint in {
        '[\n{"text": "a", "title": "b"},\n{"text": \n]': "line 4: not JSON",
        '[{"text": "a", "title": "b"}, 3]': "row 1: not a JSON object",
        '{"text": "a", "title": "b"}\n7\n': "line 2: not a JSON object",
    }.items():
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=complaint):
            load(tmp_path / "bad.json")


def test_rows_of_lists_stay_rows(tmp_path):
    """A line of several, of lists of different lengths, or of a .jsonl file, is no object of columns."""
    one, two = {"question": ["Who?"], "answers": ["Ada"]}, {"question": ["Who?"], "answers": ["Ada", "A."]}
    for name, rows in (("a.json", [one, one]), ("b.json", [two]), ("c.jsonl", [one])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert list(load_file(tmp_path / name)) == rows


def test_parquet_values_become_text_and_gaps_stay_gaps(tmp_path):
    rows = {
        "id": ["001", "nan", None, "3"],
        "text": [2008, None, 7, 8],  # pandas would make 2008.0 of it
        "title": [datetime.date(2008, 1, 1), datetime.date(2008, 1, 2), datetime.date(2008, 1, 3), None],
        "price": [Decimal("1.10"), Decimal("2.00"), Decimal("0.50"), None],
        "ratio": [1.5, float("nan"), 2.0, 3.0],
        "right": [True, False, None, True],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / "rows.parquet"
    assert triples(load(path)) == [("001", "2008", "2008-01-01"), ("2", "7", "2008-01-03")]
    assert list(load(path, source_column="price", target_column="right")["source"]) == ["1.10", "2.00"]
    assert list(load(path, source_column="price", target_column="right")["target"]) == ["true", "false"]
    assert list(load(path, target_column="ratio")["target"]) == ["1.5", "2.0", "3.0"]


def test_streams_read_the_same_texts(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/debian-t5-free")
    write_table(tmp_path / "rows.csv", VALUES)
    (tmp_path / "rows.jsonl").write_text(JSON_ROWS)
    for name, expected in (("rows.csv", VALUES), ("rows.jsonl", JSON_VALUES)):
        flags = arguments(train_file=str(tmp_path / name), max_train_samples=5)
        streamed = stream_training_rows(dataset_record(flags), flags, tokenizer, seed=0)
        texts = [tuple(expected_row[1:]) for expected_row in expected[:5]]
        encoded = [
            (tokenizer(source).input_ids, tokenizer(text_target=target).input_ids) for source, target in texts
        ]
        assert sorted((row["input_ids"], row["labels"]) for row in streamed) == sorted(encoded)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "rows.jsonl.gz"])
def test_a_file_replaced_under_the_same_time_stamp_is_read_anew(tmp_path, name):
    path = tmp_path / name
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/debian-t5-free")
    found = []
    for title in ("first", "other"):
        row = {"id": "1", "text": "a", "title": title}
        if name.endswith("parquet"):
            Dataset.from_list([row]).to_parquet(path)
        elif name.endswith("csv"):
            write_table(path, [row.values()])
        else:
            line = json.dumps(row).encode()
            path.write_bytes(gzip.compress(line) if name.endswith("gz") else line)
        os.utime(path, (1e9, 1e9))
        examples = load(path, "train")
        flags = arguments(train_file=str(path))
        encoded = tokenize(examples, tokenizer, flags, 8)
        found.append(
            (examples["target"][0], tokenizer.decode(encoded["labels"][0], skip_special_tokens=True))
        )
    assert found == [("first", "first"), ("other", "other")]


def test_folders_of_data_sets(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    write_table(files / "train.csv", VALUES)
    (files / "test.csv").write_bytes(write_table(tmp_path / "rows.csv", VALUES[:2]).read_bytes())
    flags = arguments(dataset_name=str(files))
    record = dataset_record(flags)
    assert triples(load_examples(record, flags, "train")) == VALUES
    assert triples(load_examples(record, flags, "test")) == VALUES[:2]
    with pytest.raises(UserError, match="cannot be loaded"):
        load_examples(record, flags, "validation")
    rows = [dict(zip(("id", "text", "title"), row, strict=True)) for row in VALUES]
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    flags = arguments(dataset_name=str(tmp_path / "saved"))
    assert triples(load_examples(dataset_record(flags), flags, "test")) == VALUES
    with pytest.raises(UserError, match="has no train split; found test"):
        load_examples(dataset_record(flags), flags, "train")


def test_cells_of_the_hub_are_texts(tmp_path):
    """What `load_named` does for CSV files that are not here, on files that are."""
    write_table(tmp_path / "test.csv", [*VALUES, ("9", "gap", "")])
    for streaming in (False, True):
        rows = list(load_cells(str(tmp_path), "test", {}, streaming))
        assert [tuple(row.values()) for row in rows[:-1]] == VALUES and not rows[-1]["title"]


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Ada",
            "paragraphs": [
                {
                    "context": "Ada wrote it in 1843.",
                    "qas": [
                        {
                            "id": "001",
                            "question": "Who?",
                            "answers": [
                                {"text": "Ada", "answer_start": 0},
                                {"text": "ada", "answer_start": 0},
                            ],
                        },
                        {"id": "2", "question": "When?", "answers": [{"text": "1843", "answer_start": 16}]},
                        {
                            "id": "3",
                            "question": "Where?",
                            "is_impossible": True,
                            "answers": [],
                            "plausible_answers": [{"text": "it", "answer_start": 10}],
                        },
                    ],
                }
            ],
        }
    ],
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_squad_files_are_read_in_their_own_layout(tmp_path, caplog, split, indent):
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(SQUAD, indent=indent))
    flags = DataArguments(task="question_answering", **{f"{split}_file": str(path)})
    flags.report_dir = str(tmp_path)
    examples = load_examples(dataset_record(flags), flags, split)
    assert list(examples["id"]) == ["001", "2"] and list(examples["target"]) == ["Ada", "1843"]
    assert list(examples["references"]) == [["Ada", "ada"], ["1843"]]
    assert examples["source"][0] == "question: Who? context: Ada wrote it in 1843."
    (skipped,) = (tmp_path / f"skipped_rows.{split}.jsonl").read_text().splitlines()
    assert json.loads(skipped)["reason"].startswith("no answer") and "skipped 1 of 3 rows" in caplog.text


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        ({"text": ["1.10", None, "x"]}, ["1.10", "x"]),
        ({"text": [2008, 1.5, True]}, ["2008", "1.5", "true"]),
        ([{"text": "Ada", "answer_start": 0}, {"text": "A."}], ["Ada", "A."]),
        (["None", "nan", ""], ["None", "nan"]),
        ("2008", ["2008"]),
        (2008, ["2008"]),
    ],
)
def test_references_are_texts(tmp_path, answers, references):
    row = {"question": 2008, "context": "c", "answers": answers}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    flags = DataArguments(task="question_answering", test_file=str(tmp_path / "rows.jsonl"))
    examples = load_examples(dataset_record(flags), flags, "test")
    assert examples["references"][0] == references and examples["target"][0] == references[0]
    assert examples["source"][0] == "question: 2008 context: c"


def test_a_file_without_any_answer_says_so(tmp_path):
    row = {"question": "Who?", "context": "c", "answers": {"text": [], "answer_start": []}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    flags = DataArguments(task="question_answering", test_file=str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="row 0: no answer"):
        load_examples(dataset_record(flags), flags, "test")


def test_broken_squad_files_get_one_line(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": [{"paragraphs": [{"qas": [{"id": "1"}]}]}]}))
    flags = DataArguments(task="question_answering", test_file=str(tmp_path / "rows.json"))
    with pytest.raises(UserError, match="row 0: `paragraphs` is not laid out as in SQuAD's files"):
        load_examples(dataset_record(flags), flags, "test")


def test_raw_rows_keep_ids_and_texts(tmp_path):
    """The interface that reads the judge's source texts."""
    rows = load_file(write_table(tmp_path / "rows.csv", VALUES))
    assert rows.column_names == ["id", "text", "title"]
    assert [tuple(row.values()) for row in rows] == VALUES


def test_a_translation_column_of_texts_names_the_flags(tmp_path):
    (tmp_path / "rows.csv").write_text("translation\na\n")
    flags = DataArguments(
        task="translation", source_lang="de", target_lang="en", test_file=str(tmp_path / "rows.csv")
    )
    with pytest.raises(UserError, match=r"does not hold a text for each language.* --source_column"):
        load_examples(dataset_record(flags), flags, "test")
