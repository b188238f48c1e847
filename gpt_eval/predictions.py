"""Predictions of one or two systems, joined by id with the texts they were made from.

A sample without a text to judge (a system's empty prediction, an empty source) is left out for all systems
and named on stderr; what does not fit together is refused.
"""

from __future__ import annotations

import csv
import io
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from gpt_eval.flags import MakeArguments
from models.errors import UserError
from models.json_files import read_text
from util.evaluation.records import collect_outputs
from util.files import read_user_lines
from util.tasks import DATASETS

LONGEST_CELL = 2**31 - 1  # characters; the csv module's own limit is 131,072
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write half a character, HTTP cannot send it


@dataclass(frozen=True)
class Sample:
    """A source text and what each system made of it."""

    id: str
    source: str
    outputs: dict[str, str]


def read_samples(flags: MakeArguments) -> list[Sample]:
    """All samples, or `--num_samples` drawn by `--seed`, in the order of the first prediction file.

    Raises:
        UserError: a file cannot be read, or the ids of the files do not fit together.
    """
    systems = {name: read_predictions(path) for name, path in flags.systems.items()}
    refuse_other_ids(systems, flags.systems)
    sources, origin = read_sources(flags)
    first_name, first_path = next(iter(flags.systems.items()))
    for row, name in enumerate(systems[first_name], 1):
        if name not in sources:
            raise UserError(f"{first_path}, prediction {row}: {origin} has no text with the id {name!r}.")
    ids = leave_out_empty(systems, sources)
    if flags.num_samples is not None and flags.num_samples < len(ids):
        chosen = set(random.Random(flags.seed).sample(ids, flags.num_samples))
        ids = [name for name in ids if name in chosen]
    return [Sample(name, sources[name], {key: texts[name] for key, texts in systems.items()}) for name in ids]


def leave_out_empty(systems: dict[str, dict[str, str]], sources: dict[str, str]) -> list[str]:
    """Ids of the samples that have texts, in the order of the first system; the others are named."""
    texts = {**systems, "the source texts": sources}
    found: list[str] = []
    for name in next(iter(systems.values())):
        empty = [origin for origin in texts if not texts[origin][name].strip()]
        if empty:
            print(f"left out: {name!r} is empty in {' and '.join(empty)}", file=sys.stderr)
        else:
            found.append(name)
    if not found:
        raise UserError("--predictions: every sample has an empty prediction or source text.")
    return found


def read_predictions(path: Path) -> dict[str, str]:
    """Prediction of each id in a `predictions.jsonl` of run.py, or a CSV file with columns id, prediction."""

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for place, row in read_rows(path):
            if any(SURROGATE.search(str(row.get(name))) for name in ("id", "prediction")):
                raise UserError(f"{place}: the prediction of {row.get('id')!r} is not text.")
            yield place, row

    return {output.id: output.prediction.strip() for output in collect_outputs(rows(), str(path))}


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places ("file, line N") and rows of a .jsonl or .csv file; texts stay as they are, whatever they look
    like."""
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path}: give a .jsonl or a .csv file.")
    return read_user_lines(path) if path.suffix == ".jsonl" else read_csv(path)


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows by the names in the first line; what a reader might misunderstand is refused."""
    text = read_text(path, newline="")
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}: two columns have the same name.")
        for cells in reader:
            if len(cells) > len(header):
                raise UserError(f"{path}, line {reader.line_num}: more cells than columns; quote texts.")
            if cells:
                yield f"{path}, line {reader.line_num}", dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}).") from error


def refuse_other_ids(systems: dict[str, dict[str, str]], paths: dict[str, Path]) -> None:
    """Raise UserError unless all files hold predictions of the same samples."""
    for one in systems:
        for other in systems:
            missing = next((name for name in systems[one] if name not in systems[other]), None)
            if missing is not None:
                row = list(systems[one]).index(missing) + 1
                raise UserError(f"{paths[other]} lacks the id {missing!r}, prediction {row} of {paths[one]}.")


def read_sources(flags: MakeArguments) -> tuple[dict[str, str], str]:
    """Source text of each id, without the task's prefix, and where it is from."""
    if flags.source_file is not None:
        return read_source_file(flags.source_file, flags.source_column, flags.id_column), str(
            flags.source_file
        )
    if flags.dataset_name not in DATASETS:
        raise UserError(f"--dataset_name {flags.dataset_name}: choose one of {', '.join(DATASETS)}.")
    data = data_module()
    data_args = data.DataArguments(task=DATASETS[flags.dataset_name].task, dataset_name=flags.dataset_name)
    record = replace(data.dataset_record(data_args), prefix="")
    examples = data.load_examples(record, data_args, flags.split)
    return dict(zip(examples["id"], examples["source"], strict=True)), f"{flags.dataset_name} [{flags.split}]"


def data_module() -> ModuleType:
    """`util.data.examples`; only what reads data sets needs datasets and transformers."""
    from datasets import disable_progress_bars

    from util.data import examples

    disable_progress_bars()
    return examples


def read_source_file(path: Path, source_column: str, id_column: str | None) -> dict[str, str]:
    """Texts of a .jsonl/.json/.csv/.parquet file; ids are row numbers where run.py takes those, too."""
    if path.suffix in (".jsonl", ".csv"):
        rows = [row for _, row in read_rows(path)]
    else:
        rows = list(data_module().load_file(path))
    columns = list(rows[0]) if rows else []
    for flag, column in (("--source_column", source_column), ("--id_column", id_column)):
        if column is not None and column not in columns:
            raise UserError(f"{path}: no column {column!r}; found {', '.join(columns)}. Use {flag}.")
    if id_column is None and "id" in columns:
        id_column = "id"
    sources: dict[str, str] = {}
    for index, row in enumerate(rows):
        name = str(index if id_column is None else row.get(id_column))
        if name in sources:
            raise UserError(f"{path}, row {index + 1}: the id {name!r} is there twice.")
        text = row.get(source_column)
        if SURROGATE.search(str(text)):
            raise UserError(f"{path}, row {index + 1}: the source of {name!r} is not text.")
        sources[name] = "" if text is None else str(text)
    return sources
