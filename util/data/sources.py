"""Where rows come from: local files, folders that `datasets` saved, and the hub.

Local files are read as they are written: `030`, `1.10`, `2008`, `None` and `nan` are texts, and of a table
only an empty cell is empty. Nothing read here is kept in a cache that knows a file by its time stamp.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from models.errors import UserError
from util.data_arguments import DataArguments
from util.tasks import PARQUET, DatasetRecord

if TYPE_CHECKING:
    from _csv import _QuotingType as Quoting

SPLIT_FILES = {"train": "train_file", "validation": "validation_file", "test": "test_file"}
READ_ERRORS = (DatasetGenerationError, ValueError, OSError, StopIteration)  # of `datasets`; the last: no rows
PEEKED_ROWS = 100
QUOTED = re.compile(r'"([^"]|"")*"')  # as a writer of tables encloses a cell

Row = dict[str, Any]


@dataclass(frozen=True)
class RowFile:
    """Rows of local files, read anew by each iteration.

    Cells of .csv and .tsv are texts or, where empty, None. In .json and .jsonl numbers, true and false are
    their texts. In .parquet values have types.

    Raises:
        UserError: while rows are read: a file cannot be, or breaks off; the message names file and line.
    """

    paths: tuple[Path, ...]

    def __iter__(self) -> Iterator[Row]:
        for path in self.paths:
            with readable(path):
                yield from FORMATS[file_format(path)](path)

    @property
    def column_names(self) -> list[str]:
        return columns_of(peek(self))


Rows: TypeAlias = RowFile | Dataset | IterableDataset


def peek(rows: Rows) -> list[Row]:
    """The first rows."""
    return list(islice(rows, PEEKED_ROWS))


def columns_of(rows: list[Row]) -> list[str]:
    """Columns of any of the rows: JSON leaves some out."""
    return list(dict.fromkeys(name for row in rows for name in row))


def load_rows(
    record: DatasetRecord, data_args: DataArguments, split: str, streaming: bool = False
) -> tuple[Rows, str]:
    """Raw rows of a split and a name for error messages; a local file wins over the data set's own.

    Raises:
        UserError: there is no such split, file or data set.
    """
    local = getattr(data_args, SPLIT_FILES[split])
    if local is None and data_args.data_dir is not None:
        local = find_split_file(Path(data_args.data_dir), data_args.dataset_name, split)
        if local is None and record.folder is None:
            raise UserError(
                f"--data_dir {data_args.data_dir} has no {split} split: no file like "
                f"{data_args.dataset_name or 'data set'}.{split}.json(l), .csv, .tsv or .parquet (also .gz)."
            )
    if local is None and record.folder is not None:  # embedded rows
        local = record.folder / f"{split}.jsonl.gz"
    if local is not None:
        return load_file(Path(local)), str(local)
    if record.hub_id is None:
        raise UserError(f"There is no {split} split: give --{SPLIT_FILES[split]} or --dataset_name.")
    origin = f"{record.hub_id} [{split}]"
    try:
        return load_named(record.hub_id, record, record.splits[split], data_args.hub, streaming), origin
    except UserError:
        raise
    except READ_ERRORS as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--dataset_name {origin} cannot be loaded: {reason}") from error


def find_split_file(folder: Path, dataset_name: str | None, split: str) -> Path | None:
    """`<split>.<format>` or `<data set>.<split>.<format>` in a folder, gzipped or not."""
    stems = [split] if dataset_name is None else [f"{dataset_name}.{split}", split]
    names = [f"{stem}.{suffix}{zipped}" for stem in stems for suffix in FORMATS for zipped in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def load_file(path: Path) -> RowFile:
    """Rows of a local file, gzipped or not.

    Raises:
        UserError: there is no such file, or its name has an unknown ending.
    """
    if file_format(path) not in FORMATS:
        raise UserError(f"{path}: unknown format; use one of .{', .'.join(FORMATS)} (also .gz).")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    return RowFile((path,))


def load_named(name: str, record: DatasetRecord, split: str, hub: dict[str, Any], streaming: bool) -> Rows:
    """A split of a data set of the hub, or of a folder of files or of `save_to_disk`."""
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():
        splits = load_from_disk(folder)
        if split not in splits:
            raise UserError(f"--dataset_name {folder} has no {split} split; found {', '.join(splits)}.")
        rows = splits[split]
        return rows.to_iterable_dataset() if streaming else rows
    # The branch of converted files has a folder for each configuration, and no card that names them.
    config = {"data_dir" if record.revision == PARQUET else "name": record.config}
    source = config | {"revision": record.revision} | hub
    builder = load_dataset_builder(name, **source)
    files = (builder.config.data_files or {}).get(split, [])
    if folder.is_dir() and files and all(file_format(Path(name)) in FORMATS for name in files):
        return RowFile(tuple(map(Path, files)))
    if hasattr(builder.config, "keep_default_na"):  # CSV, whose cells would be taken for numbers and gaps
        return load_cells(name, split, source, streaming)
    return load_dataset(name, split=split, streaming=streaming, **source)


def load_cells(name: str, split: str, source: dict[str, Any], streaming: bool) -> Dataset | IterableDataset:
    """A data set of CSV files with each cell as the text that is written there."""
    texts = {"split": split, "keep_default_na": False, **source}
    first = next(iter(load_dataset(name, streaming=True, **texts)))
    features = Features({column: Value("string") for column in first})
    return load_dataset(name, streaming=streaming, features=features, **texts)


def file_format(path: Path) -> str:
    """The ending of a file's name before .gz."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[-1]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say in one line that a file cannot be read."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from error


def open_file(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


# Tables


def open_table(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="")


def read_csv(path: Path, delimiter: str = ",", quoting: Quoting = csv.QUOTE_MINIMAL) -> Iterator[Row]:
    with open_table(path) as file:
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            header = next(rows, None)
            if header is None:
                raise UserError(f"{path}: is empty.")
            repeated = next((name for name in header if header.count(name) > 1), None)
            if repeated is not None:
                raise UserError(f"{path}: two columns are named {repeated!r}.")
            for cells in rows:
                if len(cells) > len(header):
                    found = f"{len(cells)} cells, the header has {len(header)}"
                    raise UserError(f"{path}: the row that ends on line {rows.line_num} has {found}.")
                if cells:  # an empty line is no row
                    yield dict(zip_longest(header, [cell or None for cell in cells]))
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: {error}.") from error


def read_tsv(path: Path) -> Iterator[Row]:
    """Tables as spreadsheets and pandas write them, and parallel text, where quotation marks are text."""
    return read_csv(path, "\t", csv.QUOTE_NONE if is_plain(path) else csv.QUOTE_MINIMAL)


def is_plain(path: Path) -> bool:
    """Whether a file of tabs has no quoted cells: of several columns, each line has all cells, and one begins
    with a quotation mark that does not enclose it."""
    columns, found = 0, False
    with open_table(path) as file:
        for line in filter(None, (line.rstrip("\r\n") for line in file)):
            cells = line.split("\t")
            columns = columns or len(cells)
            if len(cells) != columns:
                return False
            found = found or any(cell.startswith('"') and not QUOTED.fullmatch(cell) for cell in cells)
    return found and columns > 1


def read_parquet(path: Path) -> Iterator[Row]:
    with open_file(path) as file:
        whole = io.BytesIO(file.read()) if path.suffix == ".gz" else file  # Parquet is read from its end
        for batch in pq.ParquetFile(whole).iter_batches(1000):
            yield from batch.to_pylist()


# JSON


def read_json(path: Path) -> Iterator[Row]:
    """JSON lines, or one document: a list of rows, rows under `data`, or, in a file named .json, an object of
    columns.

    Where a row is an article in the layout of SQuAD's files, its questions are the rows.
    """
    with open_file(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, first = next(lines, (0, b""))
        first = first.removeprefix(codecs.BOM_UTF8)
        if not first:
            raise UserError(f"{path}: is empty.")
        if is_document(path, first):
            yield from document_rows(path, first + file.read())
            return
        second = next(lines, None)
        if second is None and holds_columns(path, first):
            yield from document_rows(path, first)
            return
        yield from expand(parse_line(path, number, first), f"{path}, line {number}")
        for number, line in chain(filter(None, [second]), lines):
            yield from expand(parse_line(path, number, line), f"{path}, line {number}")


def is_document(path: Path, first: bytes) -> bool:
    """Whether a file is one JSON value, by its first line that is not empty."""
    if first.lstrip().startswith(b"["):
        return True
    try:
        return is_wrapped(parse(first))
    except ValueError:  # a value over several lines, or a broken row
        return file_format(path) == "json"


def holds_columns(path: Path, line: bytes) -> bool:
    """Whether the only line of a file is an object of columns: lists of one length."""
    value = parse(line) if file_format(path) == "json" else None
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return False
    return len({len(column) for column in value.values()}) == 1


def is_wrapped(value: Any) -> bool:
    """Whether rows lie under `data`, with nothing but a version beside it."""
    if not isinstance(value, dict) or not value.keys() <= {"data", "version"}:
        return False
    return isinstance(value.get("data"), list) and all(isinstance(row, dict) for row in value["data"])


def document_rows(path: Path, content: bytes) -> Iterator[Row]:
    try:
        value = parse(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}).") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from error
    if is_wrapped(value):
        value = value["data"]
    elif isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        place = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object.")
        yield from expand(row, place)


def parse_line(path: Path, number: int, line: bytes) -> Row:
    place = f"{path}, line {number}"
    try:
        row = parse(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text ({error}).") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}).") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object.")
    return row


def parse(content: bytes) -> Any:
    """JSON with numbers, true and false as texts; NaN and Infinity, which JSON does not know, are None."""
    text = content.decode("utf8")
    return as_written(json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda _: None))


def as_written(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_written(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_written(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value


def expand(row: Row, place: str) -> Iterator[Row]:
    """The row; where it is an article of a SQuAD file, its questions."""
    paragraphs = row.get("paragraphs")
    if not isinstance(paragraphs, list) or not all(
        isinstance(part, dict) and "qas" in part for part in paragraphs
    ):
        yield row
        return
    try:
        for paragraph in paragraphs:
            for question in paragraph["qas"]:
                yield {
                    "id": question["id"],
                    "title": row.get("title"),
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {"text": [answer["text"] for answer in question.get("answers") or ()]},
                }
    except (KeyError, TypeError) as error:
        raise UserError(f"{place}: `paragraphs` is not laid out as in SQuAD's files ({error!r}).") from error


FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "json": read_json,
    "jsonl": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
}
csv.field_size_limit(2**31 - 1)  # a document is longer than the module's limit
