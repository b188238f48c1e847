"""The experiment scripts: each trains, decodes with its method and writes results, offline."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("scripts/run_*.sh"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
METHODS = ("free", "calm", "static", "full")


def run_script(name, *arguments, check=True):
    command = ["bash", f"scripts/{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=check, capture_output=True, text=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(script, method):
    output = run_script(script, "smoke", method).stdout
    figures = dict(re.findall(r"│ (\w+)\s+│\s+([\d.]+) │", output))
    assert figures["samples"] == "3" and float(figures["ms_per_token"]) > 0
    assert (figures["average_layers"] == "2.00") == (method == "static")


def test_there_is_a_script_for_every_data_set_of_the_paper():
    text = "".join((ROOT / "scripts" / name).read_text() for name in SCRIPTS)
    for name in ("samsum", "cnn_dailymail", "multi_news", "big_patent", "squad", "iwslt2017"):
        assert f" {name} " in text


@pytest.mark.parametrize("arguments", [[], ["train"], ["fly", "free"], ["eval", "greedy"]])
def test_wrong_usage_is_one_line(arguments):
    result = run_script("run_tr_debian.sh", *arguments, check=False)
    assert result.returncode == 2 and "usage: bash scripts/run_tr_debian.sh" in result.stderr


def test_eval_decodes_the_embedded_checkpoint(tmp_path):
    flags = [
        "--max_eval_samples",
        "2",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--max_target_length",
        "24",
    ]
    run_script("run_tr_debian.sh", "eval", "free", *flags)
    assert (tmp_path / "eval_results.json").is_file()
