import functools
import gc
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".pytest_cache"
# Graphs are exported and compiled once for all tests, and none into the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(CACHE / "exitlm")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE / "inductor")
EXPORTER = "torch.onnx._internal.exporter._registration"
MANY = 100  # modules that tests have imported: those of a trainer, an exporter, a compiler
kept = {"modules": 0}


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Libraries make millions of objects, and keep them for good: nobody looks for garbage among them."""
    gc.disable()
    try:
        return (yield)
    finally:
        if "torch" in sys.modules:  # not where xdist only hands out the tests
            sys.modules["torch"].set_num_threads(1)  # tiny models: threads cost more than they bring
        keep_modules()
        gc.set_threshold(50_000)  # an exporter makes as many objects in a second, and needs most of them
        gc.enable()


def keep_modules():
    """What the modules that are imported by now hold is collected no more."""
    gc.collect()
    gc.freeze()
    kept["modules"] = len(sys.modules)


def pytest_runtest_setup():
    if len(sys.modules) > kept["modules"] + MANY:
        keep_modules()
    read_operators_once()


def read_operators_once():
    """Once a test has exported: torch reads its operators anew for each small graph, three times and more."""
    registry = getattr(sys.modules.get(EXPORTER), "ONNXRegistry", None)
    if registry is not None and isinstance(vars(registry)["from_torchlib"], classmethod):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
    utilities = sys.modules.get("torch._export.utils")
    if utilities is not None and not hasattr(utilities._materialize_cpp_cia_ops, "cache_info"):
        utilities._materialize_cpp_cia_ops = functools.cache(utilities._materialize_cpp_cia_ops)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of run.py's tests, whose helpers take seconds to import."""
    return import_module("tiny_runs").save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return import_module("tiny_runs").write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def base(checkpoint, rows, tmp_path):
    """Flags of a run on tiny rows."""
    return import_module("tiny_runs").base_flags(checkpoint, rows, tmp_path / "out")
