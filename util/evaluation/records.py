"""What crosses files: a decoded sample, a way of decoding, a traced output.

    for place, record in read_records(folder / "predictions.jsonl"): ...

Every result file is written by the `as_row` and read by the `from_row` of its class, which raises a UserError
that names the file and the line. Nothing here needs a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import numpy as np

from models.errors import UserError
from models.json_files import check_fields, fits
from util.files import read_json_lines, write_json_lines

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SETTING_COLUMNS = (
    "name",
    "method",
    "checkpoint",
    "threshold",
    "zeta",
    "shallow_layer",
    "batch_size",
    "num_layers",
)
TRACE_TABLES = {"confidences": list[list[float]], "agrees": list[list[int]]}  # as files hold a trace's arrays

AnyOutput = TypeVar("AnyOutput", bound="Output")
AnySetting = TypeVar("AnySetting", bound="Setting")
Row = TypeVar("Row", bound="DataclassInstance")


@dataclass
class EvaluationSettings:
    """`arguments` are recorded, and compared before an evaluation is continued."""

    task: str
    max_source_length: int
    max_length: int
    predictions_file: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    num_beams: int = 1
    synchronize: bool = True
    resume: bool = False
    baseline_predictions: Path | None = None
    language: str | None = None  # of targets, for metrics
    outcomes: tuple[Path, ...] = ()  # files made of the records, which go when decoding begins afresh


@dataclass
class Output:
    """A system's text for a sample. Where a long context was split, its windows compete by their scores."""

    id: str
    prediction: str
    window: int | None = field(default=None, kw_only=True)
    sequence_score: float | None = field(default=None, kw_only=True)  # mean log-probability

    @classmethod
    def from_row(cls: type[AnyOutput], row: dict[str, Any], place: str) -> AnyOutput:
        named = row | {"id": str(row["id"])} if fits(row.get("id"), int) else row
        output = parse_row(cls, named, place)
        if output.window is not None and output.sequence_score is None:
            raise UserError(f"{place}: a window lacks its sequence_score.")
        return output

    def as_row(self) -> dict[str, Any]:
        return format_row(self)


@dataclass
class Referenced(Output):
    """An output beside what it is judged by."""

    reference: str | list[str]


@dataclass
class Record(Referenced):
    """One decoded sample of T tokens. Time and work of a batch are shared out evenly over its samples."""

    tokens: int  # T, end of sequence included
    pieces: list[str | None]  # (T); None where the vocabulary ends before the model's
    exit_layers: list[int] | None  # (T); None where the layers are not seen
    seconds: float
    source: str | None = field(default=None, kw_only=True)
    layer_calls: float = 0.0
    layer_tokens: float = 0.0  # layers run, each counted once a token in it
    full_layer_calls: float = 0.0  # of full depth in as many steps
    deep_passes: float = 0.0
    rollbacks: float = 0.0
    proposed_tokens: float = 0.0  # by lookups
    accepted_proposals: float = 0.0
    threshold: float | None = None  # of the first token; an adaptive one moves from sequence to sequence
    calibration: list[list[float | bool]] | None = None  # of a batch: shallow confidence, agreement
    seen_in_train: bool | None = None  # whether the target is in the training data, where that is known
    setting: str | None = None  # of a comparison: its name,
    row: int | None = None  # and the sample's number


@dataclass
class Setting:
    """A method with its parameters on one checkpoint."""

    name: str
    method: str
    checkpoint: str
    threshold: float | None = None
    shallow_layer: int | None = None
    batch_size: int = 1
    num_layers: int | None = None
    zeta: float | None = field(default=None, kw_only=True)  # of an adaptive threshold
    records: list[Record] = field(default_factory=list, kw_only=True)  # in files of their own

    @property
    def depth(self) -> int:
        """`num_layers`, where there are exit layers or traces: both are checked against it."""
        assert self.num_layers is not None
        return self.num_layers

    @property
    def exit_layers(self) -> list[int]:
        """Of all tokens."""
        return [layer for record in self.records for layer in record.exit_layers or ()]

    @classmethod
    def from_row(cls: type[AnySetting], row: dict[str, Any], place: str) -> AnySetting:
        return parse_row(cls, {name: row[name] for name in SETTING_COLUMNS if name in row}, place)

    def as_row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTING_COLUMNS}


@dataclass
class Trace:
    """What each of L layers predicted at the T tokens of an output."""

    setting: str
    row: int
    id: str
    pieces: list[str | None]  # (T)
    exit_layers: list[int] | None  # (T)
    confidences: np.ndarray  # (T, L) as measured: files hold all digits of a 32-bit number
    agrees: np.ndarray  # (T, L) whether the layer's prediction is the last one's
    deep: list[str | None]  # (T) the last layer's predictions

    @classmethod
    def from_row(cls, row: dict[str, Any], num_layers: int, place: str) -> Trace:
        trace = parse_row(cls, row, place, TRACE_TABLES)
        count = len(trace.pieces)
        for name in ("exit_layers", "deep"):
            entries = getattr(trace, name)
            if entries is not None and len(entries) != count:
                raise UserError(f"{place}: {len(entries)} {name} for {count} pieces.")
        for name, dtype in (("confidences", np.float32), ("agrees", bool)):
            table = getattr(trace, name)
            if len(table) != count or any(len(token) != num_layers for token in table):
                raise UserError(f"{place}: {name} must have {count} rows of {num_layers} layers.")
            setattr(trace, name, np.array(table, dtype).reshape(count, num_layers))
        trace.confidences = trace.confidences.astype(float)
        if not trace.agrees[:, -1].all():
            raise UserError(f"{place}: the last layer must agree with itself.")
        return trace

    def as_row(self) -> dict[str, Any]:
        digits = self.confidences.astype(np.float32).astype(str)
        return vars(self) | {
            "confidences": digits.astype(float).tolist(),
            "agrees": self.agrees.astype(int).tolist(),
        }


# Files


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Place ("file, line N") and record of each line."""
    return ((place, Record.from_row(row, place)) for place, row in read_json_lines(path))


def collect_outputs(rows: Iterable[tuple[str, dict[str, Any]]], origin: str) -> list[Output]:
    """A system's output for each sample from places and rows of its file, `origin`.

    Raises:
        UserError: a row is not an output, a sample has several that are no windows, or there are none.
    """
    return collect_samples(((place, Output.from_row(row, place)) for place, row in rows), origin)


def collect_samples(placed: Iterable[tuple[str, AnyOutput]], origin: str) -> list[AnyOutput]:
    """The same from outputs that were read already."""
    outputs: dict[tuple[str, int | None], AnyOutput] = {}
    for place, output in placed:
        if outputs.setdefault((output.id, output.window), output) is not output:
            raise UserError(f"{place}: the id {output.id!r} is there twice.")
    if not outputs:
        raise UserError(f"{origin}: there are no predictions.")
    if len({output.window is None for output in outputs.values()}) > 1:
        raise UserError(f"{origin}: some predictions are of windows, others of whole samples.")
    return best_windows(list(outputs.values()))


def write_records(path: Path, records: Iterable[Record | Trace]) -> None:
    """Replace a file as a whole."""
    write_json_lines(path, (record.as_row() for record in records))


def parse_row(cls: type[Row], row: dict[str, Any], place: str, written: dict[str, Any] | None = None) -> Row:
    """An instance from a JSON object, which may hold more; `written` are types in which a file differs."""
    known = {entry.name: row[entry.name] for entry in fields(cls) if entry.name in row}
    missing = [entry.name for entry in fields(cls) if is_required(entry) and entry.name not in known]
    if missing:
        raise UserError(f"{place}: lacks {', '.join(missing)}.")
    check_fields(known, type_hints(cls) | (written or {}), place)
    return cls(**known)


def format_row(instance: Output) -> dict[str, Any]:
    """A JSON object without what is None by default."""
    entries = {entry: getattr(instance, entry.name) for entry in fields(instance)}
    return {entry.name: value for entry, value in entries.items() if value is not None or is_required(entry)}


def is_required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


@cache
def type_hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def best_windows(outputs: Sequence[AnyOutput]) -> list[AnyOutput]:
    """One output a sample: where a long context was split, its most probable answer."""
    if not outputs or outputs[0].window is None:
        return list(outputs)
    best: dict[str, AnyOutput] = {}
    for output in outputs:
        rival = best.get(output.id)
        if rival is None or window_score(output) > window_score(rival):
            best[output.id] = output
    return list(best.values())


def window_score(output: Output) -> float:
    assert output.sequence_score is not None  # windows have one: see `Output.from_row`
    return output.sequence_score
