"""Logs of JSON lines, whole files and locks: nothing is lost, mixed or half read."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from models.errors import UserError
from util.files import (
    JsonLog,
    content_hash,
    locked,
    locked_output_file,
    make_output_dir,
    read_json_lines,
    write_json_lines,
)

WHOLE = b'{"a": 1}\n{"a": "\xc3\xbc"}\n'


def rows_of(path):
    return [row for _, row in read_json_lines(path)]


@pytest.mark.parametrize(
    "cut", [b'{"a": ', b'{"a": "\xc3', b"\0\0\0", b'{"a": 3'], ids=["value", "character", "zeros", "brace"]
)
def test_a_line_that_was_cut_off_does_not_count_and_is_written_over(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + cut)
    assert rows_of(path) == [{"a": 1}, {"a": "ü"}]
    with JsonLog(path) as log:
        assert log.rows == [{"a": 1}, {"a": "ü"}]
        assert path.read_bytes() == WHOLE + cut  # opening alone changes nothing
        log.append([{"a": 3}, {"a": 4}])
    assert path.read_bytes() == WHOLE + b'{"a": 3}\n{"a": 4}\n'


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE[:-1])
    with JsonLog(path) as log:
        log.append([{"a": 3}])
        log.append([{"a": 4}])
    assert path.read_bytes() == WHOLE + b'{"a": 3}\n{"a": 4}\n'


@pytest.mark.parametrize("line", [b'{"a": \n', b"[1]\n", b"\n", b"\xff\n", b"3"])
def test_whole_lines_that_are_no_objects_are_refused(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + line)
    with pytest.raises(UserError, match=r"log.jsonl, line 3: not (JSON|a JSON object|UTF-8 text)"):
        rows_of(path)
    with pytest.raises(UserError, match="line 3"):
        JsonLog(path)
    with JsonLog(path, fresh=True) as log:  # the refusal let go of the file
        assert log.rows == []
    assert path.read_bytes() == b""


def test_two_writers_on_one_file_are_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonLog(path) as log:
        for fresh in (False, True):
            with pytest.raises(UserError, match=r"log\.jsonl: another run is writing to it"):
                JsonLog(path, fresh=fresh)
        log.append([{"a": 1}])
    with JsonLog(path) as log:
        log.append([{"a": 2}])
    assert rows_of(path) == [{"a": 1}, {"a": 2}] and os.listdir(tmp_path) == ["log.jsonl"]


def test_a_lock_can_be_waited_for(tmp_path):
    held = threading.Event()

    def wait():
        with locked(tmp_path / ".lock", "refused", wait=True):
            held.set()

    waiting = threading.Thread(target=wait)
    with locked(tmp_path / ".lock", ""):
        waiting.start()
        with pytest.raises(UserError, match="refused"), locked(tmp_path / ".lock", "refused"):
            pass
        assert not held.is_set()
    waiting.join(timeout=60)
    assert held.is_set() and not os.listdir(tmp_path)


def test_only_kept_rows_stay(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + b'{"a": ')
    with JsonLog(path, durable=True) as log:
        log.keep(log.rows[:1])
        log.append([{"a": 5}])
        assert log.rows == rows_of(path) == [{"a": 1}, {"a": 5}]


def test_a_failed_write_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    with JsonLog(path, durable=True) as log:
        log.append([{"a": 1}])
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:5]))
        with pytest.raises(OSError, match="disk is full"):
            log.append([{"a": 2}])
        monkeypatch.undo()
        assert path.read_bytes() == b'{"a": 1}\n'
        log.append([{"a": 3}])
    assert rows_of(path) == [{"a": 1}, {"a": 3}]


def test_durable_lines_are_synced_before_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    with JsonLog(tmp_path / "a.jsonl", durable=True) as log:
        log.append([{"a": 1}])
    assert synced[-1] == len('{"a": 1}\n')


def test_files_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_json_lines(path, [{"a": "half \ud800"}, {"a": "ü"}])
    assert rows_of(path) == [{"a": "half \ud800"}, {"a": "ü"}]
    before = path.read_bytes()

    def broken():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_json_lines(path, broken())
    assert path.read_bytes() == before


def test_what_cannot_be_replaced_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        write_json_lines(tmp_path / "rows.jsonl", [{"a": 1}])
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_an_output_file_must_be_one_that_can_be_written(tmp_path):
    """Whoever asks: even root writes nothing into /proc."""
    (tmp_path / "file").touch()
    refused = {
        tmp_path: "is a folder or a device: name a file",
        Path("/dev/null"): "is a folder or a device: name a file",
        tmp_path / "file" / "x.json": "its folder cannot be made: (Not a directory|File exists)",
        Path("/proc/x.json"): r"its folder (is not writable|cannot be made: .*)",
    }
    for path, complaint in refused.items():
        with (
            pytest.raises(UserError, match=rf"^--output_file {path}:? {complaint}"),
            locked_output_file(path),
        ):
            pytest.fail("locked")
    with pytest.raises(UserError, match=r"^--output_dir /proc (is not writable|cannot be made)"):
        make_output_dir(Path("/proc"))
    with locked_output_file(tmp_path / "new" / "x.json"):
        assert os.listdir(tmp_path / "new") == [".x.json.lock"]


def test_hashes_tell_values_and_their_order_apart():
    assert content_hash([{"a": 1, "b": 2}]) == content_hash([{"b": 2, "a": 1}])
    different = [[1, 2], [2, 1], ["1", 2], [[1, 2]], [12]]
    assert len({content_hash(values) for values in different}) == len(different)
