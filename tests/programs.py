"""Programs of this repository in processes of their own, which begin with the libraries imported.

They are forked from a server that has imported what takes seconds, and has done nothing else.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers.trainer_seq2seq", "datasets", "run", "scripts.sweep", "scripts.calibrate")
SERVER = multiprocessing.get_context("forkserver")


@functools.cache
def serve():
    """Start the server of this process, unless it runs."""
    SERVER.set_forkserver_preload([*LIBRARIES])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


def enter(path, argv, cwd, environment, output):
    """Be `python path argv` from here on, with both outputs in one file."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path.insert(0, os.path.dirname(path))
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")


class Program:
    """A program under way; `output` names the file of what it prints."""

    def __init__(self, path, *argv, cwd=ROOT, **variables):
        serve()
        file, self.output = tempfile.mkstemp(suffix=".txt")
        os.close(file)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        given = str(ROOT / path), [str(word) for word in argv], cwd, environment, self.output
        self.process = SERVER.Process(target=enter, args=given)
        self.process.start()

    @property
    def code(self):
        """Its exit status; None while it runs."""
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join()

    def wait(self):
        """What it printed, once it has ended."""
        self.process.join()
        printed = Path(self.output).read_text()
        os.unlink(self.output)
        return printed


def run_program(path, *argv):
    """What a program prints that ends well."""
    program = Program(path, *argv)
    printed = program.wait()
    assert program.code == 0, printed
    return printed


def run_in_two_processes(path, *argv):
    """As torchrun starts a program on this machine: when one process fails, the other one is stopped."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    programs = [Program(path, *argv, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    while not any(one.code for one in programs) and (
        running := [one for one in programs if one.code is None]
    ):
        connection.wait([one.process.sentinel for one in running])
    for program in programs:
        program.process.kill()  # which those that ended do not notice
    printed = [program.wait() for program in programs]
    assert [program.code for program in programs] == [0, 0], printed
