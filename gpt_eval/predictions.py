"""Predictions of one or two systems, joined by id with the texts they were made from."""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.errors import UserError
from util.arguments import DataArguments
from util.data import dataset_record, load_examples, load_file
from util.evaluation import best_windows
from util.tasks import DATASETS

COLUMNS = ("id", "prediction")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write half a character, HTTP cannot send it


@dataclass(frozen=True)
class Sample:
    """A source text and what each system made of it."""

    id: str
    source: str
    outputs: dict[str, str]


def read_samples(flags: argparse.Namespace) -> list[Sample]:
    """All samples, or `--num_samples` drawn by `--seed`, in the order of the first prediction file.

    Raises:
        UserError: a file cannot be read, or the ids of the files do not fit together.
    """
    systems = {name: read_predictions(path) for name, path in flags.predictions.items()}
    refuse_other_ids(systems, flags.predictions)
    sources, origin = read_sources(flags)
    first_name, first_path = next(iter(flags.predictions.items()))
    ids = list(systems[first_name])
    for row, name in enumerate(ids, 1):
        if not sources.get(name, "").strip():
            raise UserError(f"{first_path}, prediction {row}: {origin} has no text with the id {name!r}.")
    if flags.num_samples is not None and flags.num_samples < len(ids):
        chosen = set(random.Random(flags.seed).sample(ids, flags.num_samples))
        ids = [name for name in ids if name in chosen]
    return [Sample(name, sources[name], {key: texts[name] for key, texts in systems.items()}) for name in ids]


def read_predictions(path: Path) -> dict[str, str]:
    """Prediction of each id in a `predictions.jsonl` of run.py, or a CSV file with columns id, prediction."""
    predictions: dict[str, str] = {}
    rows = list(read_rows(path))
    if rows and all("window" in row for _, row in rows):
        rows = list(enumerate(best_windows([row for _, row in rows]), 1))
    for line, row in rows:
        missing = [column for column in COLUMNS if row.get(column) is None]
        if missing:
            raise UserError(f"{path}, line {line}: no {' and no '.join(missing)}.")
        name, prediction = str(row["id"]), row["prediction"]
        if name in predictions:
            raise UserError(f"{path}, line {line}: the id {name!r} is there twice.")
        if not isinstance(prediction, str) or not prediction.strip() or SURROGATE.search(prediction):
            raise UserError(f"{path}, line {line}: the prediction of {name!r} is empty or not text.")
        predictions[name] = prediction.strip()
    if not predictions:
        raise UserError(f"{path}: there are no predictions.")
    return predictions


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a .jsonl or .csv file; texts stay as they are, whatever they look like."""
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path}: give a .jsonl or a .csv file.")
    try:
        with path.open(encoding="utf8", newline="" if path.suffix == ".csv" else "\n") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                yield from ((reader.line_num, row) for row in reader)
                return
            for line, text in enumerate(file, 1):
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {line}: not a JSON object.")
                yield line, row
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line}: not JSON ({error.msg}).") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error


def refuse_other_ids(systems: dict[str, dict[str, str]], paths: dict[str, Path]) -> None:
    """Raise UserError unless all files hold predictions of the same samples."""
    for one in systems:
        for other in systems:
            missing = next((name for name in systems[one] if name not in systems[other]), None)
            if missing is not None:
                row = list(systems[one]).index(missing) + 1
                raise UserError(f"{paths[other]} lacks the id {missing!r}, prediction {row} of {paths[one]}.")


def read_sources(flags: argparse.Namespace) -> tuple[dict[str, str], str]:
    """Source text of each id, without the task's prefix, and where it is from."""
    if flags.source_file is not None:
        return read_source_file(flags.source_file, flags.source_column, flags.id_column), str(
            flags.source_file
        )
    if flags.dataset_name not in DATASETS:
        raise UserError(f"--dataset_name {flags.dataset_name}: choose one of {', '.join(DATASETS)}.")
    data_args = DataArguments(task=DATASETS[flags.dataset_name].task, dataset_name=flags.dataset_name)
    record = replace(dataset_record(data_args), prefix="")
    examples = load_examples(record, data_args, flags.split)
    return dict(zip(examples["id"], examples["source"], strict=True)), f"{flags.dataset_name} [{flags.split}]"


def read_source_file(path: Path, source_column: str, id_column: str | None) -> dict[str, str]:
    """Texts of a .jsonl/.json/.csv/.parquet file; ids are row numbers where run.py takes those, too."""
    rows = load_file(path)
    for flag, column in (("--source_column", source_column), ("--id_column", id_column)):
        if column is not None and column not in rows.column_names:
            raise UserError(
                f"{path}: no column {column!r}; found {', '.join(rows.column_names)}. Use {flag}."
            )
    if id_column is None and "id" in rows.column_names:
        id_column = "id"
    sources: dict[str, str] = {}
    for index, row in enumerate(rows):
        name = str(index if id_column is None else row[id_column])
        if name in sources:
            raise UserError(f"{path}, row {index + 1}: the id {name!r} is there twice.")
        sources[name] = "" if row[source_column] is None else str(row[source_column])
    return sources
