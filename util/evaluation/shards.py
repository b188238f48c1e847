"""Rows shared out over processes: who decodes which, into a log of its own, and all records put together.

`share_out(decode, total, settings, identity, shards)` gives the first process of torchrun, and the job that
merges, the records that a single process would have had, in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from models.errors import UserError
from util.device import best_device
from util.evaluation.prediction_log import PredictionLog, changed_names, refuse_other_identity, settings_file
from util.evaluation.records import EvaluationSettings, Record, read_records
from util.shard_arguments import ShardArguments

PATIENCE = timedelta(days=7)  # of a process that is done, until the slowest is


@dataclass(frozen=True)
class Shards:
    """This process among those that share the rows.

    They are of torchrun and wait for each other, or `apart`, in jobs of their own, one of which merges.
    """

    count: int = 1
    index: int | None = 0  # None: it merges
    apart: bool = False

    @property
    def alone(self) -> bool:
        return self.count == 1 and not self.apart

    @property
    def tells(self) -> bool:
        """Whether this process tells what all of them found."""
        return self.index is None if self.apart else self.index == 0

    def rows(self, total: int, block: int, index: int) -> range:
        """The contiguous samples of a process: whole blocks, the last share possibly shorter."""
        per_process = ceil(ceil(total / block) / self.count) * block
        start = index * per_process
        return range(start, min(total, start + per_process)) if start < total else range(0)

    def own_rows(self, total: int, block: int) -> range:
        assert self.index is not None  # who merges decodes nothing
        return self.rows(total, block, self.index)

    def file(self, whole: Path, index: int) -> Path:
        """Where a process logs what ends up in the file `whole`."""
        return whole if self.alone else whole.with_suffix(f".part{index}.jsonl")


def launched_shards() -> Shards:
    """The place of this process among those that torchrun started, if it did."""
    state = PartialState()
    return Shards(state.num_processes, state.process_index)


def join_shards(flags: ShardArguments) -> Shards:
    """The place that flags or torchrun give to this process. To be called before a model is moved: each
    process of torchrun gets a GPU, where there are any."""
    if flags.sharded:
        return Shards(flags.num_shards, flags.shard_index, apart=True)
    PartialState(cpu=best_device().type in ("cpu", "mps"), timeout=PATIENCE)  # Apple's has no collectives
    return launched_shards()


def share_out(
    decode: Callable[[range, PredictionLog], list[Record]],
    total: int,
    settings: EvaluationSettings,
    identity: dict[str, Any],
    shards: Shards,
    per_row: int = 1,
) -> list[Record] | None:
    """Let every process `decode` its share of `total` rows into a log of its own.

    Blocks of `settings.batch_size` rows stay whole, so that batches are as one process would form them.
    Returns `per_row` records a row, in order, to the process that tells of them; None to the others. That
    process removes `settings.outcomes` where it begins afresh.

    Raises:
        UserError: to be merged, but a share is missing, unfinished, or was decoded with another `identity`.
    """
    identity = identity | {"processes": shards.count}
    path = settings.predictions_file
    if shards.index is not None:
        if settings.resume and not shards.alone and path.is_file():  # gathered, perhaps of one process
            refuse_other_identity(path, identity)
        with PredictionLog(shards.file(path, shards.index), identity, settings.resume) as log:
            if shards.tells and not log.records:
                remove_outcomes(settings, shards)
            records = decode(shards.own_rows(total, settings.batch_size), log)
        if shards.alone:
            return records
    if not shards.apart:
        PartialState().wait_for_everyone()
    if not shards.tells:
        return None
    shares = [shards.rows(total, settings.batch_size, index) for index in range(shards.count)]
    files = [shards.file(path, index) for index in range(shards.count)]
    records = gather_shares(files, [len(rows) * per_row for rows in shares], identity)
    if shards.index is None:
        remove_outcomes(settings, shards)
    with PredictionLog(path, identity) as log:
        log.keep(records)
    return records


def remove_outcomes(settings: EvaluationSettings, shards: Shards) -> None:
    """Take away what an earlier evaluation left, lest a report after a kill show its figures beside the new
    records."""
    path = settings.predictions_file
    gathered = () if shards.alone else (path, settings_file(path))  # written once all processes are done
    for left in (*settings.outcomes, *gathered):
        left.unlink(missing_ok=True)


def gather_shares(files: list[Path], expected: list[int], identity: dict[str, Any]) -> list[Record]:
    """Records of all shares, in order; `expected` are their numbers."""
    records, missing = [], []
    for index, (file, count) in enumerate(zip(files, expected, strict=True)):
        share = read_share(file, identity) if count else []
        if len(share) != count:
            missing.append(f"{index} ({len(share)} of {count} outputs)")
        records += share
    if missing:
        raise UserError(
            f"{files[0].parent}: of {len(files)} shards these are missing or unfinished: "
            f"{', '.join(missing)}. Run the same command for them with --shard_index and --resume_eval True, "
            "then merge."
        )
    return records


def read_share(file: Path, identity: dict[str, Any]) -> list[Record]:
    """A process's records, none if it has not begun; UserError if it was asked for something else."""
    if not file.is_file() or not settings_file(file).is_file():
        return []
    changed = changed_names(file, identity)
    if changed:
        raise UserError(
            f"{file} was decoded with other {', '.join(changed)}: decode all shards, and merge them, with "
            "the same flags."
        )
    return [record for _, record in read_records(file)]


def tell_shard(shards: Shards, folder: Path) -> None:
    """Say what is left to do after the share of a job of its own."""
    if shards.apart:
        print(
            f"Decoded shard {shards.index} of {shards.count} into {folder}. Next: when all are there, the "
            "same command with --merge_shards True in place of --shard_index"
        )


def refuse_state_across_samples(shards: Shards, methods: Iterable[str], flag: str) -> None:
    """Raise UserError for methods that learn from one sample for the next: shares would change outputs."""
    learning = ", ".join(methods)
    if learning and not shards.alone:
        raise UserError(
            f"--{flag}: {learning} learns from sample to sample, and would not learn the same from a share: "
            "leave it out, or decode in one process."
        )
