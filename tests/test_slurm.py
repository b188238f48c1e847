"""The batch files of scripts/slurm, run without Slurm: what it would set is set here, and `srun` is exec."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from real_rows import ROOT
from script_commands import commands_in, write_tool
from torch.distributed.run import get_args_parser

from scripts import sweep

FILES = sorted((ROOT / "scripts/slurm").iterdir())
ROWS = ["--num_samples", "3", "--methods", "FREE", "--free_thresholds", "0.4", "--backend", "torch"]
ROWS += ["--val_max_target_length", "8"]


@pytest.fixture
def tools(tmp_path):
    """A folder with an `srun` that starts its command in place, and with this environment's `python`."""
    folder = tmp_path / "tools"
    folder.mkdir()
    write_tool(folder / "srun", '#!/bin/sh\nexec "$@"\n')
    write_tool(folder / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return folder


def submit(tools, name, *flags, check=True, **variables):
    """What a batch file does where Slurm has set these variables."""
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tools)}
    environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(ROOT / "scripts/slurm" / name), *flags]
    return subprocess.run(command, env=environment, cwd=tools, check=check, capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_batch_files_are_bash(file):
    subprocess.run(["bash", "-n", str(file)], check=True)
    lines = file.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert not directives or directives[-1] < commands[0]  # Slurm reads no further than the first command


def sweep_by(output):
    """Run the one sweep among the command lines that a batch file showed."""
    (words,) = [words for words in commands_in(output) if words[0] == "scripts/sweep.py"]
    sweep.main(words[1:])


@pytest.mark.slow
def test_an_array_decodes_and_merges(tools, tmp_path):
    """By what its jobs start, in this process, which has loaded the libraries already."""
    write_tool(tools / "python")
    model = str(ROOT / "checkpoints/debian-t5-free")
    asked = {"MODEL": model, "OUTPUT_DIR": str(tmp_path / "sweep"), "SHARDS": "2"}
    for index in ("0", "1"):
        array = {"SLURM_ARRAY_TASK_ID": index, "SLURM_ARRAY_TASK_COUNT": "2"}
        sweep_by(submit(tools, "sweep_array.sbatch", *ROWS, **asked, **array).stdout)
        assert not (tmp_path / "sweep/sweep.json").exists()
    sweep_by(submit(tools, "merge_array.sbatch", *ROWS, **asked).stdout)
    rows = json.loads((tmp_path / "sweep/sweep.json").read_text())["rows"]
    assert [(row["name"], row["samples"]) for row in rows] == [("Full depth", 3), ("FREE 0.4", 3)]


def test_what_an_array_needs_is_asked_for(tools):
    array = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}
    lacking = submit(tools, "sweep_array.sbatch", check=False, **array)
    assert lacking.returncode != 0 and "MODEL: name a checkpoint" in lacking.stderr
    lacking = submit(tools, "merge_array.sbatch", check=False, MODEL="x")
    assert lacking.returncode != 0 and "SHARDS: say how many jobs there were" in lacking.stderr
    elsewhere = submit(tools, "sweep_array.sbatch", check=False, SLURM_SUBMIT_DIR=str(tools), **array)
    assert elsewhere.returncode != 0


def torchrun_of(output):
    """How torchrun itself understands what it was given, and the words for the script."""
    (words,) = commands_in(output)
    flags = get_args_parser().parse_args(words)
    return flags, [flags.training_script, *flags.training_script_args]


@pytest.mark.slow
def test_training_on_one_node_is_that_of_the_experiment(tools):
    write_tool(tools / "torchrun")
    asked = {"EXPERIMENT": "run_sum_samsum", "METHOD": "calm", "MODEL": "google-t5/t5-small"}
    flags, words = torchrun_of(submit(tools, "train_one_node.sbatch", "--bf16", "True", **asked).stdout)
    assert flags.standalone and words[0] == str(ROOT / "run.py")
    assert words[words.index("--model_name_or_path") + 1] == "google-t5/t5-small"
    assert words[words.index("--intermediate_loss_fn") + 1] == "weighted_ce" and "--bf16" in words


@pytest.mark.slow
def test_training_on_many_nodes_meets_at_the_first(tools):
    write_tool(tools / "torchrun")
    nodes = r'[ "$*" = "show hostnames node[3-5]" ] && printf "node3\nnode4\nnode5\n"'
    write_tool(tools / "scontrol", f"#!/bin/sh\n{nodes}\n")
    job = {"SLURM_JOB_NODELIST": "node[3-5]", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_ID": "1234567"}
    flags, words = torchrun_of(submit(tools, "train_many_nodes.sbatch", **job).stdout)
    assert (flags.nnodes, flags.rdzv_backend, flags.rdzv_id) == ("3", "c10d", "1234567")
    assert flags.rdzv_endpoint == "node3:24567" and not flags.standalone
    assert words[0] == str(ROOT / "run.py") and "--do_train" in words
