"""The environment that scripts run in: which versions, where from, and when it is made anew."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OPTIONAL = (
    "scripts/benchmarking/requirements.txt",
    "scripts/benchmarking/requirements-llama.txt",
    "requirements-demo.txt",
    "tests/requirements-browser.txt",
)
BRINGS = {"llama-cpp-python": "llama_cpp"}  # modules that are named otherwise
CODE = [ROOT / "run.py", *(path for name in ("models", "util", "gpt_eval", "scripts", "tests")
                           for path in ROOT.glob(f"{name}/**/*.py"))]  # fmt: skip
OWN = {"models", "util", "gpt_eval", "scripts", "run", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
OF_TYPES = {"_typeshed"}  # there for type checkers alone
OF_TORCH = ("nvidia-", "cuda-", "triton", "pytorch-triton")  # each build of torch names its own
WITH_PYTHON = {"pip", "setuptools"}
STUB = """#!/usr/bin/env bash
echo "$@" >>calls.txt
"""


def read_versions(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert all(str(one.specifier).startswith("==") and not one.extras for one in requirements)
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in requirements}


def imported_modules():
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.split(".")[0]


def needed_by(names):
    """All that the named distributions need here, themselves included; extras aside."""
    found, left = set(), list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requirements = map(Requirement, distribution(name).requires or ())
        except PackageNotFoundError:  # another platform's
            continue
        left += [one.name for one in requirements if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.slow
def test_every_library_that_is_imported_is_required_at_one_version():
    homes, required = packages_distributions(), read_versions("requirements.txt")
    optional = {BRINGS.get(name, name) for file in OPTIONAL for name in read_versions(file)}
    assert optional <= set(imported_modules()) and not optional & set(required)
    modules = set(imported_modules()) - set(sys.stdlib_module_names) - OWN - OF_TYPES - optional
    assert {"torch", "transformers", "markupsafe"} <= modules
    lacking = {name for name in modules if not {*map(canonicalize_name, homes[name])} & set(required)}
    assert not lacking


def test_constraints_hold_all_that_the_libraries_need_but_the_builds_of_torch():
    required, held = read_versions("requirements.txt"), read_versions("constraints.txt")
    assert not set(required) & set(held)
    assert not [name for name in held if name.startswith(OF_TORCH) or name in WITH_PYTHON]
    assert not [version for version in {*required.values(), *held.values()} if "+" in version]
    free = {name for name in needed_by(required) if not name.startswith(OF_TORCH)} - WITH_PYTHON
    assert free <= set(required) | set(held)


def test_venv_is_brought_up_to_date_when_either_file_changes(tmp_path):
    """With an interpreter that only notes what it is called with."""
    for name in ("scripts/environment.sh", "requirements.txt", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(STUB)
    (binaries / "python").chmod(0o755)
    (binaries / "activate").touch()

    def installs(**variables):
        environment = {**os.environ, "VIRTUAL_ENV": "", "CONDA_PREFIX": "", **variables}
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "source scripts/environment.sh"],
            cwd=tmp_path, env=environment, check=True,
        )  # fmt: skip
        calls = tmp_path / "calls.txt"
        return calls.read_text().splitlines() if calls.exists() else []

    (first,) = installs()
    assert first.endswith("-r requirements.txt -c constraints.txt")
    assert len(installs()) == 1  # up to date
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("six==0\n")
    assert len(installs(VIRTUAL_ENV=str(tmp_path / ".venv"))) == 2  # although it is the active one
    assert len(installs()) == 2
    os.utime(tmp_path / "requirements.txt")  # as a checkout does
    assert len(installs()) == 2
