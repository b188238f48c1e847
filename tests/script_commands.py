"""What an experiment script starts: the words that it hands to run.py, without starting it."""

from __future__ import annotations

import os
import subprocess

from real_rows import ROOT

SHOW_WORDS = '#!/bin/sh\nprintf "%s\\n" "$@"\n'


def words_for_run(folder, script, *arguments, cwd=ROOT, **variables):
    """The command line of run.py; `folder` takes a `python` and a `torchrun` that only show their words."""
    for name in ("python", "torchrun"):
        (folder / name).write_text(SHOW_WORDS)
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
    command = ["bash", os.path.relpath(ROOT / "scripts" / script, cwd), *arguments]
    words = subprocess.check_output(command, cwd=cwd, env=environment | variables, text=True).splitlines()
    return words[words.index(str(ROOT / "run.py")) + 1 :]
