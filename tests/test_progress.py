"""Progress of long loops: in a log, lines with the time left; on a terminal, a bar."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

from util import progress
from util.progress import Progress, track


def test_lines_tell_what_is_left():
    assert Progress("Decoding", 300, "sample").describe(30.0) == "Decoding: 0 of 300 samples in 0:00:30"
    half = Progress("Decoding", 300, "sample", done=100)  # of an interrupted run
    half.update(50)
    # 50 in 60 s leave 150 for 180 s
    assert half.describe(60.0) == "Decoding: 150 of 300 samples in 0:01:00, 0:03:00 to go"
    half.update(150)
    assert half.describe(240.0) == "Decoding: 300 of 300 samples in 0:04:00"
    assert progress.clock(3725.4) == "1:02:05"


def test_a_line_comes_while_one_step_takes_long(monkeypatch, capsys):
    """A step that waits until two lines have been printed: without the thread it would wait for ever."""
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    waiting = threading.Event()

    class Stream(io.StringIO):
        def flush(self):
            if self.getvalue().count("\n") >= 2:
                waiting.set()

    monkeypatch.setattr("sys.stderr", Stream())
    for _ in track([1], "Loading", "shard"):
        assert waiting.wait(60)
        lines = progress.sys.stderr.getvalue().splitlines()
    assert lines[0].startswith("Loading: 0 of 1 shards in ")
    assert progress.sys.stderr.getvalue().splitlines()[-1].startswith("Loading: 1 of 1 shards in ")


def test_short_loops_and_other_processes_print_nothing(monkeypatch, capsys):
    assert list(track([1, 2], "Decoding", "batch")) == [1, 2]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert list(track([1, 2], "Decoding", "batch")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_reports_are_due_every_half_minute(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    training = Progress("Training", 8, "step")
    for clock.now in (29.0, 31.0, 60.0, 62.0):
        training.update()
        training.report_if_due()
    shown = capsys.readouterr().err.splitlines()
    assert shown == [  # 31 s for 2 steps leave 6 steps for 93 s; 62 s for 4 leave 4 for 62 s
        "Training: 2 of 8 steps in 0:00:31, 0:01:33 to go",
        "Training: 4 of 8 steps in 0:01:02, 0:01:02 to go",
    ]


def test_terminals_get_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    assert list(track([1, 2], "Decoding", "batch")) == [1, 2]
    assert "Decoding: 100%" in progress.sys.stderr.getvalue()


def test_the_first_line_comes_soon(monkeypatch):
    """Long before half a minute has passed, and only once in it."""
    monkeypatch.setattr(progress, "FIRST", 0.01)
    waiting = threading.Event()

    class Stream(io.StringIO):
        def flush(self):
            waiting.set()

    monkeypatch.setattr("sys.stderr", Stream())
    with Progress("Decoding", 300, "block"):
        assert waiting.wait(20)
        assert not threading.Event().wait(0.1) and progress.sys.stderr.getvalue().count("\n") == 1
