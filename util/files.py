"""Files that runs write: logs of one JSON object a line, whole files replaced at once, locks, output folders.

Every .json and .jsonl of this project is written and read here. The module knows nothing of models.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from models.errors import UserError
from models.json_files import decode_json, read_text


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file beside `path`, to be written in the block, that then takes its place; an error or an
    interruption leaves `path` as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole, so that no reader sees half of it."""
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def json_line(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Replace a file as a whole by one line a row, so that no reader sees half of it."""
    with written_aside(path) as temporary, temporary.open("wb") as file:
        for row in rows:
            file.write(encode(row))
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place ("file, line N") and object of each line; a last line that a kill cut off does not count.

    Raises:
        UserError: a whole line holds no JSON object.
    """
    for place, row, _ in scan_json_lines(path):
        yield place, row


def scan_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """What `read_json_lines` gives, and the bytes of each line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                row = decode_json(line.rstrip(b"\r\n"), place)
            except UserError as error:
                if not line.endswith(b"\n"):  # the start of an object is never a whole one
                    return
                raise UserError(f"{error} Take that line out.") from error
            yield place, as_object(row, place), line


def read_user_lines(path: Path, flag: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and object of each line of a file that a user hands over with `flag`.

    A byte order mark and blank lines are skipped; every other line counts, the last one, too.
    """
    for number, line in enumerate(read_text(path, flag, newline="").split("\n"), 1):
        if line.strip():
            place = f"{flag} {path}, line {number}".strip()
            yield place, as_object(decode_json(line, place), place)


def as_object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object.")
    return row


class JsonLog:
    """A file of one JSON object a line, open for its only writer; `rows` are those that it held.

    What is appended has left the process when `append` returns and, if `durable`, is on the disk. A last
    line that a kill cut off is overwritten; nothing else is touched before the first `append` or `keep`.

    Raises:
        UserError: another run has the file open, or (unless `fresh`: empty it) a line is not an object.
    """

    def __init__(self, path: Path, durable: bool = False, fresh: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.durable = durable
        self._lock = acquire_lock(
            path.with_name(f".{path.name}.lock"), f"{path}: another run is writing to it."
        )
        self._file: int | None = None
        self._size = 0  # bytes of whole lines
        self._gap = b""  # the line break that the last of them lacks
        try:
            self.rows = [] if fresh else self._scan()
            if fresh:
                self.keep([])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> JsonLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add one line a row; a failed write leaves the file as it was."""
        rows = list(rows)
        lines = self._gap + b"".join(map(encode, rows))
        file = self._open()
        os.ftruncate(file, self._size)  # drops the cut line
        try:
            if os.write(file, lines) != len(lines):
                raise OSError(errno.ENOSPC, "the disk is full", str(self.path))
            if self.durable:
                os.fsync(file)
        except OSError:
            os.ftruncate(file, self._size)
            raise
        self._size += len(lines)
        self._gap = b""
        self.rows += rows

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Leave exactly these rows in the file."""
        self._close_file()
        write_json_lines(self.path, rows)
        self.rows, self._gap, self._size = list(rows), b"", self.path.stat().st_size

    def close(self) -> None:
        self._close_file()
        release_lock(self._lock)

    def _scan(self) -> list[dict[str, Any]]:
        rows, line = [], b"\n"
        for _, row, line in scan_json_lines(self.path) if self.path.is_file() else ():
            rows.append(row)
            self._size += len(line)
        self._gap = b"" if line.endswith(b"\n") else b"\n"
        return rows

    def _open(self) -> int:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            sync_folder(self.path.parent)
        return self._file

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def encode(row: Any) -> bytes:
    """A line's bytes; half a surrogate pair, which UTF-8 does not have, stays escaped."""
    try:
        return json_line(row).encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Make a new file's name as durable as its lines."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def locked(path: Path, complaint: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for the block; what a killed run left behind is no obstacle.

    Raises:
        UserError: another run holds it, and not to `wait` for it: `complaint`.
    """
    lock = acquire_lock(path, complaint, wait)
    try:
        yield
    finally:
        release_lock(lock)


def acquire_lock(path: Path, complaint: str, wait: bool = False) -> FileLock:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise UserError(complaint) from error
    return lock


def release_lock(lock: FileLock) -> None:
    """Let go, and leave no lock file behind; who opened it meanwhile finds it unlinked and makes another."""
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def content_hash(values: Iterable[Any]) -> str:
    """Tells JSON values, in their order, from others."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def make_output_dir(folder: Path, name: str | None = None) -> Path:
    """Make --output_dir, or the folder of that `name`.

    Raises:
        UserError: it cannot be made or written to.
    """
    name = name or f"--output_dir {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name} cannot be made: {error.strerror}.") from error
    try:
        TemporaryFile(dir=folder).close()  # permissions alone promise too much: of /proc, say
    except OSError as error:
        raise UserError(f"{name} is not writable.") from error
    return folder


@contextmanager
def locked_output_dir(folder: Path, shard: int | None = None) -> Iterator[Path]:
    """Make --output_dir and keep other runs out of it, or others that decode the same `shard` into it.

    Under torchrun each process holds a lock for its part: the first is refused where another run writes, the
    others wait, to be ended by torchrun together with it.

    Raises:
        UserError: it cannot be made or written to, or another run writes there.
    """
    make_output_dir(folder)
    what = "another run is writing there" if shard is None else f"another run is decoding shard {shard}"
    complaint = f"--output_dir {folder}: {what}; wait for it, or name another folder."
    rank = int(os.environ.get("RANK", 0))
    part = f".{rank}" if rank else ""
    name = f".lock{part}" if shard is None else f".lock.shard{shard}"
    with locked(folder / name, complaint, wait=rank > 0):
        yield folder


@contextmanager
def locked_output_file(path: Path) -> Iterator[Path]:
    """Make the folder of --output_file and keep other runs from writing the same file.

    Raises:
        UserError: that is no file, its folder cannot be made or written to, or another run writes the file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"--output_file {path} is a folder or a device: name a file.")
    make_output_dir(path.parent, f"--output_file {path}: its folder")
    complaint = f"--output_file {path}: another run is writing it; wait for it, or name another file."
    with locked(path.with_name(f".{path.name}.lock"), complaint):
        yield path
