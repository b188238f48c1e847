"""The experiment scripts: each trains, decodes with its method and writes results, offline."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from real_rows import REAL_ROWS
from script_commands import words_for_run, write_tool

import run
from util.script_arguments import TrainingBenchmarkArguments

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("scripts/run_*.sh"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
METHODS = ("free", "lossless", "calm", "static", "full")


def run_script(name, *arguments, check=True, cwd=ROOT, **variables):
    command = ["bash", os.path.relpath(ROOT / "scripts" / name, cwd), *arguments]
    environment = ENVIRONMENT | variables
    return subprocess.run(command, cwd=cwd, env=environment, check=check, capture_output=True, text=True)


# Every script with some method, and one with every method: which methods there are is none of a script's.
SMOKES = [(script, METHODS[number % len(METHODS)]) for number, script in enumerate(SCRIPTS)]
SMOKES = sorted({*SMOKES, *(("run_tr_debian.sh", method) for method in METHODS)})


def smoke_here(folder, script, method, **variables):
    """Run what a script starts in this process, which has loaded torch already. One exports its model, which
    is the default."""
    words = words_for_run(folder, script, "smoke", method, **variables)
    backend = [] if (script, method) == ("run_tr_debian.sh", "free") else ["--backend", "torch"]
    run.main([*words, *backend, "--output_dir", str(folder / "output")])


@pytest.mark.slow
@pytest.mark.parametrize(("script", "method"), SMOKES)
def test_smoke(script, method, tmp_path, capsys):
    """On the data set's own rows where they are there, on embedded ones elsewhere."""
    smoke_here(tmp_path, script, method, **({"DATA_DIR": str(REAL_ROWS)} if REAL_ROWS.is_dir() else {}))
    check_smoke(capsys.readouterr().out, method)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason="test_smoke has used the embedded rows")
@pytest.mark.parametrize("script", ["run_sum_samsum.sh", "run_qa_squad.sh", "run_tr_iwslt.sh"])
def test_smoke_without_data_dir(script, tmp_path, capsys):
    smoke_here(tmp_path, script, "free")
    check_smoke(capsys.readouterr().out, "free")


@pytest.mark.slow
def test_smoke_from_the_shell():
    check_smoke(run_script("run_tr_debian.sh", "smoke", "free").stdout, "free")


def check_smoke(output, method):
    figures = dict(re.findall(r"│ (\w+)\s+│\s+([\d.]+) │", output))
    assert figures["samples"] == "3" and float(figures["ms_per_token"]) > 0
    assert (figures["average_layers"] == "2.00") == (method == "static")


def folder_of_commands(tmp_path):
    folder = tmp_path / "commands"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_train_and_eval_of_local_files_from_another_folder(tmp_path, monkeypatch):
    """DATA_DIR, MODEL and flags name paths as seen from the caller's folder; later flags override."""
    rows = [
        {"id": str(number), "dialogue": f"Ann: we use tool {number}", "summary": f"Tool {number}."}
        for number in range(8)
    ]
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows" / f"samsum.{split}.jsonl").write_text(lines)
    shutil.copytree(ROOT / "checkpoints/debian-t5-free", tmp_path / "tiny")
    variables = {"cwd": tmp_path, "DATA_DIR": "rows", "CUDA_VISIBLE_DEVICES": ""}
    short = ["--max_steps", "2", "--gradient_accumulation_steps", "1", "--shallow_exit_layer", "2"]
    run_script("run_sum_samsum.sh", "train", "free", "--output_dir", "new", *short, **variables, MODEL="tiny")
    assert json.loads((tmp_path / "new/trainer_state.json").read_text())["global_step"] == 2
    assert json.loads((tmp_path / "new/exit_config.json").read_text())["shallow_exit_layer"] == 2
    short = ["--max_eval_samples", "2", "--static_exit_layer", "3", "--max_target_length", "8", "--use_cpu"]
    arguments = ["run_sum_samsum.sh", "eval", "static", "--output_dir", "out", *short]
    words = words_for_run(folder_of_commands(tmp_path), *arguments, **variables, MODEL="new")
    monkeypatch.chdir(tmp_path)
    run.main(words)
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert results["samples"] == 2 and results["average_layers"] == 3


def in_experiment(command, **variables):
    """What a command prints where scripts/experiment.sh was sourced."""
    command = ["bash", "-euc", f"source scripts/experiment.sh; {command}"]
    environment = ENVIRONMENT | {"OLDPWD": "."} | variables
    return subprocess.check_output(command, cwd=ROOT, env=environment, text=True)


@pytest.mark.slow
def test_training_takes_every_core():
    """Although each process has one thread only."""
    assert ENVIRONMENT["OMP_NUM_THREADS"] == "1"
    cores = len(os.sched_getaffinity(0))
    assert int(in_experiment("count_processes; echo $PROCESSES")) == (torch.cuda.device_count() or cores)


@pytest.mark.slow
def test_training_takes_every_core_without_nproc(tmp_path):
    """As on macOS."""
    for name, text in {"nproc": "exit 127", "getconf": '[ "$*" = _NPROCESSORS_ONLN ] && echo 7'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    found = {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shown = in_experiment("count_processes; echo $PROCESSES", **found)
    assert shown.strip() == "7"


@pytest.mark.slow
def test_only_devices_of_this_process_count(tmp_path):
    """Not all that the machine has."""
    write_tool(tmp_path / "nvidia-smi", "#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: B\\n'\n")
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert in_experiment("count_processes; echo $GPUS", **hidden).strip() == "0"


@pytest.mark.parametrize(("rows", "cores", "shared"), [(96, 2, "2 48"), (64, 6, "4 16"), (96, 128, "96 1")])
def test_a_step_has_the_same_rows_on_any_machine(rows, cores, shared):
    shown = in_experiment(f"PROCESSES={cores}; divide_batch {rows}; echo $PROCESSES $ROWS_EACH")
    assert shown.strip() == shared


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/**/*.sh")), ids=lambda path: path.name)
def test_scripts_run_in_the_bash_of_macos(path):
    """3.2 knows neither later syntax nor, with `set -u`, the "${NAME[@]}" of an empty array."""
    text = path.read_text()
    for name in re.findall(r"\b(\w+)=\(\)", text):
        assert f'"${{{name}[@]}}"' not in text.replace(f'${{{name}[@]+"${{{name}[@]}}"}}', "")
    assert not re.findall(r"\b(?:mapfile|readarray|realpath|readlink -f|declare -A|date -d|sed -i)\b", text)
    assert not re.findall(r"\$\{\w+(?:,,?|\^\^?|@[A-Z])\}", text)


@pytest.mark.parametrize("model, layer", [("checkpoints/debian-t5-free", "2"), ("google-t5/t5-large", "6")])
def test_lossless_exits_where_the_checkpoint_does(model, layer):
    """After the checkpoint's own exit layer, and the script's where it has none."""
    shown = in_experiment(f"choose_method lossless $(exit_layer {model} 6); echo ${{DECODING[@]}}")
    assert shown.strip() == f"--use_shallow_deep True --shallow_exit_layer {layer} --lossless True"


def test_lossless_decodes_the_model_of_free(tmp_path):
    for name in ("toy-free", "toy-full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    take = f"output={tmp_path}/toy-$method; take_trained_model; basename $model"
    shown = in_experiment(f"for method in lossless full calm; do model=hub; {take}; done")
    assert shown.split() == ["toy-free", "toy-full", "hub"]


@pytest.mark.parametrize("arguments", [[], ["train"], ["fly", "free"], ["eval", "greedy"]])
def test_wrong_usage_is_one_line(arguments):
    result = run_script("run_tr_debian.sh", *arguments, check=False)
    assert result.returncode == 2 and "usage: bash scripts/run_tr_debian.sh" in result.stderr


@pytest.mark.slow
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
    run.main(words_for_run(folder_of_commands(tmp_path), "run_tr_debian.sh", "eval", "free", *flags))
    assert (tmp_path / "eval_results.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["none", "weighted_ce", "shallowdeep_kd_dyna"])
def test_training_benchmark_measures(loss, monkeypatch):
    from scripts import benchmark_training

    tiny = {"d_model": 16, "d_ff": 16, "num_heads": 2, "d_kv": 8, "vocab_size": 4096}
    monkeypatch.setattr(benchmark_training, "SHAPE", tiny)
    row = benchmark_training.measure(loss, 6, TrainingBenchmarkArguments(steps=12, batch_size=2))
    assert row["steps_per_second"] > 0 and 0 < row["memory_early"] <= row["memory_peak"]


@pytest.mark.parametrize(("platform", "largest"), [("linux", 3 * 1024), ("darwin", 3 * 1024**2)])
def test_training_benchmark_shows_mebibytes(platform, largest, monkeypatch):
    """getrusage counts KiB on Linux, bytes on macOS."""
    from scripts import benchmark_training

    usage = type("Usage", (), {"ru_maxrss": largest})
    monkeypatch.setattr(benchmark_training.resource, "getrusage", lambda _: usage)
    monkeypatch.setattr(benchmark_training.sys, "platform", platform)
    assert benchmark_training.peak_memory() == 3
