"""Speed and peak memory of training with each exit loss, each in a process of its own.

    python scripts/benchmark_training.py --train_file samsum.train.json.gz --source_column dialogue \
        --target_column summary

The model has T5-small's shape and random weights; in the last two rows it has 24 layers, whose logits would
not fit into memory all at once.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.script_arguments import TrainingBenchmarkArguments

if __name__ == "__main__":
    answer_help((TrainingBenchmarkArguments,), __doc__)  # before torch is imported

import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

from models.families import view_for
from models.losses import INTERMEDIATE_LOSSES, ExitLoss, build_exit_loss, without_logits
from util.console import command
from util.data.examples import dataset_record, load_examples, tokenize
from util.data_arguments import DataArguments
from util.flags import parse_groups, require
from util.tables import comparison_table, print_report

SHAPE = {"d_model": 512, "d_ff": 2048, "num_heads": 8, "vocab_size": 32128}
EARLY = 10  # steps
COLUMNS = {
    "loss": "loss",
    "layers": "layers",
    "steps": "steps",
    "steps_per_second": "steps/s",
    "memory_early": f"MiB after {EARLY} steps",
    "memory_peak": "MiB at the end",
}


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((TrainingBenchmarkArguments,), __doc__, argv)
        benchmark(flags)


def benchmark(flags: TrainingBenchmarkArguments) -> None:
    if flags.only:
        name, layers = flags.only.split(":")
        print(json.dumps(measure(name, int(layers), flags)))
        return
    cases = [f"{name}:6" for name in ("none", *INTERMEDIATE_LOSSES)] + [
        "weighted_ce:24",
        "shallowdeep_kd_dyna:24",
    ]
    rows = []
    for case in cases:
        command = [sys.executable, *sys.argv, "--only", case]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if finished.returncode:  # it has said why
            sys.exit(finished.returncode)
        rows.append(json.loads(finished.stdout.splitlines()[-1]))
        print(f"{case} done", file=sys.stderr)
    print_report(comparison_table("Training", COLUMNS, rows))
    print(json.dumps(rows))


def measure(name: str, layers: int, flags: TrainingBenchmarkArguments) -> dict[str, float | str]:
    """Train some steps; median speed, and the largest resident set early and at the end."""
    torch.manual_seed(0)
    config = T5Config(**SHAPE, num_layers=layers, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).train()
    loss = None
    if name != "none":
        loss = build_exit_loss(view_for(model), name, layers // 3 if name.startswith("shallow") else None)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-4)
    batches, seconds, early = make_batches(flags, model), [], 0.0
    for step in range(flags.steps):
        start = time.perf_counter()
        run_step(model, loss, batches[step % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        early = peak_memory() if step < EARLY else early
    return {
        "loss": name,
        "layers": layers,
        "steps": flags.steps,
        "steps_per_second": 1 / statistics.median(seconds),
        "memory_early": early,
        "memory_peak": peak_memory(),
    }


def run_step(
    model: T5ForConditionalGeneration, loss: ExitLoss | None, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The loss of one batch, computed as EarlyExitTrainer does."""
    if loss is None:
        return model(**batch, use_cache=False).loss
    features = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with without_logits(model):
        outputs = model(**features, output_hidden_states=True, use_cache=False)
    return loss(view_for(model), outputs, batch["labels"]).total


def make_batches(
    flags: TrainingBenchmarkArguments, model: T5ForConditionalGeneration
) -> list[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(flags.tokenizer)
    names = {"source_column": flags.source_column, "target_column": flags.target_column}
    where = {"train_file": flags.train_file} if flags.train_file else {"dataset_name": "debian_synopsis"}
    data = DataArguments(task="summarization", max_source_length=256, max_target_length=64, **names, **where)
    rows = load_examples(dataset_record(data), data, "train", None, 400)
    encoded = list(tokenize(rows, tokenizer, data, data.max_target_length))
    collate = DataCollatorForSeq2Seq(tokenizer, model, pad_to_multiple_of=8)
    starts = range(0, len(encoded) - flags.batch_size + 1, flags.batch_size)
    require(bool(starts), f"--batch_size {flags.batch_size}: there are {len(encoded)} rows only.")
    return [dict(collate(encoded[start : start + flags.batch_size])) for start in starts]


def peak_memory() -> float:
    """Largest resident set so far, in MiB."""
    units = 2**20 if sys.platform == "darwin" else 2**10  # of a MiB: macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


if __name__ == "__main__":
    main()
