"""What a shell script starts: the words that it hands to Python, without starting it."""

from __future__ import annotations

import os
import subprocess

from real_rows import ROOT

UNIT, RECORD = "\037", "\036"  # what ends a word, and a command line
SHOW_WORDS = """#!/bin/sh
printf '%s\\037' "$@"; printf '\\036'
"""


def commands_in(shown):
    """The command lines, each a list of words, in what SHOW_WORDS printed."""
    return [line.split(UNIT)[:-1] for line in shown.split(RECORD)[:-1]]


def write_tool(path, text=SHOW_WORDS):
    path.write_text(text)
    path.chmod(0o755)


def shown_words(folder, script, *arguments, cwd=ROOT, **variables):
    """The command lines of Python that a script starts; `folder` takes a `python` and a `torchrun` that only
    show their words."""
    for name in ("python", "torchrun"):
        write_tool(folder / name)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
    command = ["bash", os.path.relpath(ROOT / script, cwd), *arguments]
    shown = subprocess.check_output(command, cwd=cwd, env=environment | variables, text=True)
    return commands_in(shown)


def words_for_run(folder, script, *arguments, **options):
    """The command line of run.py."""
    commands = shown_words(folder, f"scripts/{script}", *arguments, **options)
    (words,) = [words for words in commands if str(ROOT / "run.py") in words]
    return words[words.index(str(ROOT / "run.py")) + 1 :]
