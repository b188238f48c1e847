"""Speed beside rivals on one machine: Hugging Face's generate, CTranslate2, and each backend and method here.

    python scripts/benchmark.py --models embedded t5-base --samples 20

Models are `embedded` (the checkpoints trained on debian_de_en, decoding its test rows), and random weights
of the shapes t5-base, t5-large and bart-large or of a config.json, where a seeded coin decides which tokens
exit. All contestants of a model take turns, batch by batch. A table for each model is printed, then one line
of JSON.
CTranslate2 comes with `pip install -r scripts/benchmarking/requirements.txt -c constraints.txt`.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.script_arguments import BenchmarkArguments

if __name__ == "__main__":
    answer_help((BenchmarkArguments,), __doc__)  # before torch is imported

import torch

from scripts.benchmarking.contestants import Contestant, Output, announce_missing, enter_contestants
from scripts.benchmarking.figures import Floor, make_rows, measure_bandwidth
from scripts.benchmarking.speed_figure import draw_speeds
from scripts.benchmarking.subjects import Subject, open_subject, subject_names
from util.backend import limit_threads
from util.console import command
from util.environment import git_hash
from util.flags import parse_groups
from util.progress import track
from util.tables import comparison_table, print_report

WARM_UP_BATCHES = 2
COLUMNS = {
    "name": "contestant",
    "tokens_per_second": "tokens/s",
    "ms_per_token": "ms/token",
    "over_ctranslate2_float32": "x CT2 float32",
    "over_ctranslate2_int8": "x CT2 int8",
    "over_floor": "/ floor",
    "speedup": "speed-up",
    "ideal_speedup": "ideal",
    "real_over_ideal": "real/ideal",
    "average_layers": "layers/token",
    "exit_share": "exits",
    "unchanged": "= full",
    "agreement": "= fp32",
    "bleu": "BLEU",
}
LIBRARIES = ("torch", "transformers", "onnxruntime", "ctranslate2")


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((BenchmarkArguments,), __doc__, argv)
        benchmark(flags)


def benchmark(flags: BenchmarkArguments) -> None:
    limit_threads(flags)
    announce_missing(flags)
    records = []
    for name in subject_names(flags):
        record = run_model(name, flags)
        gc.collect()
        records.append(record)
        title = f"{name}: {record['samples']} samples, {record['bytes_per_second'] / 1e9:.1f} GB/s"
        print_report(comparison_table(title, COLUMNS, record["rows"]))
    print(json.dumps(records, default=str))
    if flags.figure_file is not None:
        flags.figure_file.parent.mkdir(parents=True, exist_ok=True)
        draw_speeds(records, flags.figure_file)


def run_model(name: str, flags: BenchmarkArguments) -> dict[str, Any]:
    """Everything about one model, which is gone before the next one comes."""
    print(f"{name}: preparing", file=sys.stderr)
    subject = open_subject(name, flags)
    bandwidth = measure_bandwidth(subject.loaded.model.device)
    with tempfile.TemporaryDirectory() as folder:
        contestants = list(enter_contestants(subject, flags, Path(folder)))
        outputs = decode_in_turn(subject, contestants)
    return {
        "model": name,
        "arguments": asdict(flags),
        "environment": describe_environment(),
        "samples": subject.samples,
        "bytes_per_second": bandwidth,
        "rows": make_rows(subject, contestants, outputs, Floor.of(subject, bandwidth)),
    }


def decode_in_turn(subject: Subject, contestants: list[Contestant]) -> dict[str, list[Output]]:
    """The outputs of all contestants, batch by batch, each batch starting with another one."""
    for contestant in track(contestants, f"{subject.name}: warming up", "contestant"):
        for batch in subject.batches[:WARM_UP_BATCHES]:
            contestant.decode(batch)
    outputs: dict[str, list[Output]] = {contestant.name: [] for contestant in contestants}
    for batch in track(subject.batches, f"{subject.name}: decoding", "round"):
        first = batch.number % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            outputs[contestant.name].append(contestant.decode(batch))
    return outputs


def describe_environment() -> dict[str, Any]:
    """Versions and machine; which backend and precision ran is each row's affair."""
    return {
        "python": platform.python_version(),
        **{name: find_version(name) for name in LIBRARIES},
        "git": git_hash(),
        "processor": find_processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def find_processor() -> str:
    """The processor's name, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def find_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
