"""Sequence-level distillation: replace training targets by a model's own hypotheses.

    python scripts/distill_targets.py --model_name_or_path save/teacher --dataset_name debian_de_en \
        --max_length 28 --output_file save/distilled.jsonl.gz

Of each source's beam the hypothesis closest to the reference is kept (sequence-level interpolation, Kim and
Rush, 2016). Such targets have fewer ways to be right, which shallow exits learn better than references.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.backend_arguments import AUTOMATIC, BackendArguments
from util.flag_help import answer_help
from util.script_arguments import DistillationArguments

if __name__ == "__main__":
    answer_help((DistillationArguments, BackendArguments), __doc__)  # before torch is imported

import torch
from datasets import Dataset
from sacrebleu.metrics import CHRF
from transformers import set_seed

from models.loading import LoadedModel, load_model
from util.backend import limit_threads, run_by_backend
from util.console import command
from util.data.encoding import encoder_for
from util.data.preparation import prepare
from util.data_arguments import DataArguments
from util.device import best_device, move_model
from util.exit_arguments import ExitArguments
from util.files import json_line, locked_output_file, written_aside
from util.flags import parse_groups, require
from util.generate_options import greedy_options
from util.progress import track
from util.setup import read_split
from util.tasks import DATASETS

MARGIN = 4  # tokens by which a hypothesis may exceed --max_length


def main(argv: list[str] | None = None) -> None:
    with command():
        flags, backend = parse_groups((DistillationArguments, BackendArguments), __doc__, argv)
        refuse_beams(backend, flags.num_beams)
        backend = backend.for_evaluation(ExitArguments(), flags.num_beams)
        with locked_output_file(flags.output_file):
            distill(flags, backend)


def refuse_beams(backend: BackendArguments, num_beams: int) -> None:
    """Raise UserError, which names what to add, where the backend decodes no beams: they are the default."""
    for name, ways in {
        "backend": (AUTOMATIC, "torch"),
        "precision": ("fp32",),
        "exit_precision": (None,),
    }.items():
        value = getattr(backend, name)
        require(num_beams == 1 or value in ways, f"--{name} {value} decodes one beam: add --num_beams 1.")


def distill(flags: DistillationArguments, backend: BackendArguments) -> None:
    """Write the source and the chosen hypothesis of each training row."""
    set_seed(0)
    loaded = open_teacher(flags.model_name_or_path, backend)
    examples = load_training_rows(flags, loaded)
    targets = choose_targets(loaded, examples, flags)
    with written_aside(flags.output_file) as aside, gzip.open(aside, "wt", encoding="utf8") as out:
        for row, target in zip(examples, targets, strict=True):
            out.write(json_line({"id": row["id"], "source": row["source"], "target": target}))


def choose_targets(loaded: LoadedModel, examples: Dataset, flags: DistillationArguments) -> list[str]:
    """The chosen hypothesis of each row; decoded together are sources alike in length."""
    lengths = [len(source) for source in examples["source"]]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    targets: dict[int, str] = {}
    for start in track(range(0, len(order), flags.batch_size), "Distilling", "batch"):
        numbers = order[start : start + flags.batch_size]
        rows = examples.select(numbers)
        beams = decode_beams(loaded, list(rows["source"]), flags)
        for number, hypotheses, reference in zip(numbers, beams, rows["target"], strict=True):
            targets[number] = closest(hypotheses, reference)
    return [targets[number] for number in range(len(examples))]


def open_teacher(path: str, backend: BackendArguments) -> LoadedModel:
    """The model, run by the backend: torch's in bfloat16."""
    limit_threads(backend)
    loaded = load_model(path)
    modules = backend.backend == "torch" or best_device().type != "cpu"
    move_model(loaded.model, dtype=torch.bfloat16 if modules else torch.float32)
    return run_by_backend(loaded, backend)


def load_training_rows(flags: DistillationArguments, loaded: LoadedModel) -> Dataset:
    data = DataArguments(
        task=DATASETS[flags.dataset_name].task,
        dataset_name=flags.dataset_name,
        drop_long_samples=True,
        max_source_length=flags.max_length,
        max_target_length=flags.max_length,
    )
    prepare(loaded, data, {"--max_length": flags.max_length + MARGIN})
    return read_split(data, "train", loaded)


@torch.inference_mode()
def decode_beams(loaded: LoadedModel, sources: list[str], flags: DistillationArguments) -> list[list[str]]:
    """All finished beams of each source."""
    encoder = encoder_for(loaded)
    inputs = encoder.inputs(sources).to(loaded.model.device)
    decode = loaded.generate if flags.num_beams == 1 else loaded.model.generate  # beams are Hugging Face's
    options = greedy_options(encoder.output_limit(flags.max_length + MARGIN))
    options |= {"num_beams": flags.num_beams, "num_return_sequences": flags.num_beams}
    outputs = decode(**inputs, **options)
    texts = encoder.texts(outputs[:, encoder.output_start(inputs["input_ids"]) :].tolist())
    return [texts[row : row + flags.num_beams] for row in range(0, len(texts), flags.num_beams)]


def closest(hypotheses: list[str], reference: str) -> str:
    """The hypothesis with the highest chrF against the reference."""
    chrf = CHRF()
    return max(hypotheses, key=lambda text: chrf.sentence_score(text, [reference]).score)


if __name__ == "__main__":
    main()
