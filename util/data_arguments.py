"""The flags of data, lengths and evaluation, and what programs that take them refuse. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.flags import (
    flag,
    refuse_unread_flags,
    require,
    require_file,
    require_not_negative,
    require_positive,
)
from util.tasks import DATASETS, TASKS


def refuse_misspelt_dataset(name: str) -> None:
    """Raise UserError for a name that is nearly a known one, before the hub is asked for it."""
    if name in DATASETS or "/" in name:
        return
    near = difflib.get_close_matches(name.lower().replace("-", "_"), DATASETS, n=1, cutoff=0.8)
    require(
        not near,
        f"--dataset_name {name}: did you mean {''.join(near)}? Others of the hub are named OWNER/NAME.",
    )


def require_split(data: DataArguments, split: str) -> None:
    """Raise UserError, naming the other split, if only that one's local file was given."""
    other = {"test": "validation", "validation": "test"}.get(split)
    if other is None or data.dataset_name or data.data_dir or getattr(data, f"{split}_file"):
        return
    require(
        getattr(data, f"{other}_file") is None,
        f"There is no --{split}_file: give one, or decode --{other}_file with --split {other}.",
    )


@dataclass
class DataArguments:
    _argument_group_name = "Data, lengths and evaluation"

    task: str = flag("translation", "What the model learns or is judged by.", tuple(TASKS))
    dataset_name: str | None = flag(None, f"One of {', '.join(DATASETS)}, or any hub id.")
    dataset_config_name: str | None = flag(None, "Configuration of the data set.")
    dataset_revision: str | None = flag(None, "Branch, tag or commit of the data set.")
    train_file: str | None = flag(
        None, "Local .json/.jsonl/.csv/.tsv/.parquet (also .gz) with training rows."
    )
    validation_file: str | None = flag(None, "The same, for --do_eval.")
    test_file: str | None = flag(None, "The same, for --do_predict.")
    source_column: str | None = flag(None, "Column with the input text (default: the data set's).")
    target_column: str | None = flag(None, "Column with the reference text (default: the data set's).")
    source_lang: str | None = flag(
        None, "Source language: key in a `translation` column, and what a multilingual tokenizer encodes as."
    )
    target_lang: str | None = flag(
        None, "Target language: the same for targets and outputs; it also chooses BLEU's tokenizer."
    )
    source_prefix: str | None = flag(None, "Text put before every source (default: the data set's).")
    prompt_template: str | None = flag(
        None,
        "How a model without an encoder is asked; {source} is the place of the source, \\n a line break "
        "(default: the task's).",
    )
    use_chat_template: bool = flag(
        False, "Ask it by a message of its tokenizer's chat template, which holds the prompt."
    )
    num_shots: int = flag(0, "Examples of the training split that a prompt shows first.")
    shot_seed: int = flag(0, "Seed by which they are drawn.")
    data_dir: str | None = flag(
        None, "Folder of local files, named <split> or <data set>.<split>, read instead of the hub."
    )
    streaming: bool = flag(False, "Read training rows as they are needed; needs --max_steps.")
    max_source_length: int = flag(None, "Sources are cut to this many tokens (default: the data set's).")
    max_target_length: int = flag(
        None, "Training targets are cut to this many tokens (default: the data set's)."
    )
    doc_stride: int = flag(
        128, "Question answering: tokens that neighbouring windows of a long context share."
    )
    val_max_target_length: int = flag(None, "Longest output of an evaluation (default: --max_target_length).")
    drop_long_samples: bool = flag(False, "Leave out rows over these lengths instead of cutting them.")
    max_train_samples: int | None = flag(None, "Use only the first rows for training.")
    max_eval_samples: int | None = flag(None, "Use only the first rows for --do_eval.")
    max_predict_samples: int | None = flag(None, "Use only the first rows for --do_predict.")
    num_beams: int = flag(1, "Beams of an evaluation at full depth; early exits are greedy.")
    preprocessing_num_workers: int | None = flag(None, "Processes that tokenize.", changes_outputs=False)
    resume_eval: bool = flag(
        False, "Continue an interrupted evaluation from its predictions.jsonl.", changes_outputs=False
    )
    baseline_predictions: str | None = flag(
        None,
        "Full depth's predictions.jsonl for the same rows: test whether quality differs (paired bootstrap).",
        changes_outputs=False,
    )
    sources_alone: bool = field(default=False, init=False)  # rows of prompts, which may lack targets
    report_dir: str | None = field(default=None, init=False)  # where skipped rows are listed
    hub: dict[str, Any] = field(default_factory=dict, init=False)  # --token and --cache_dir, for downloads

    def __post_init__(self) -> None:
        local = [self.train_file, self.validation_file, self.test_file]
        require(
            bool(self.dataset_name or self.data_dir or any(local)),
            "No data: give --dataset_name, --data_dir, or --train_file / --validation_file / --test_file.",
        )
        for name in ("train_file", "validation_file", "test_file", "baseline_predictions"):
            require_file(name, getattr(self, name))
        if self.dataset_name and not (self.data_dir or any(local)):
            refuse_misspelt_dataset(self.dataset_name)
        known = DATASETS.get(self.dataset_name or "")
        if self.max_source_length is None:
            self.max_source_length = known.max_source_length if known else 512
        if self.max_target_length is None:
            self.max_target_length = known.max_target_length if known else 128
        require(
            0 < self.doc_stride < self.max_source_length or self.task != "question_answering",
            f"--doc_stride must be below --max_source_length {self.max_source_length}.",
        )
        require(
            self.data_dir is None or Path(self.data_dir).exists(), f"--data_dir: there is no {self.data_dir}."
        )
        for name in ("max_source_length", "max_target_length", "val_max_target_length", "num_beams"):
            require_positive(name, getattr(self, name))
        require_not_negative("num_shots", self.num_shots)
        for name in ("max_target_length", "val_max_target_length"):
            length = getattr(self, name)
            require(length is None or length > 1, f"--{name} must leave room for a token: at least 2.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            require_positive(name, getattr(self, name))
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length
        self._refuse_idle_flags()

    def _refuse_idle_flags(self) -> None:
        idle = {} if self.num_shots else {"shot_seed": "add --num_shots"}
        if self.task != "question_answering":
            idle["doc_stride"] = "add --task question_answering"
        refuse_unread_flags(self, idle)


LIMITS = ("max_train_samples", "max_eval_samples", "max_predict_samples")
LEAVE_IT_OUT = "leave it out"
OF_RUN_ALONE = {  # of DataArguments what no script reads, and what to do instead
    **dict.fromkeys(("streaming", "preprocessing_num_workers"), "it is for run.py --do_train; leave it out"),
    "baseline_predictions": "it is for run.py; leave it out",
}
OF_RUN = {  # what most do not read, either
    **OF_RUN_ALONE,
    **dict.fromkeys(LIMITS, LEAVE_IT_OUT),
    "num_beams": "this decodes greedily; leave it out",
    "resume_eval": "this begins anew each time; leave it out",
}


def refuse_flags_of_run(
    data: DataArguments, *, reads: Iterable[str] = (), limits: str = LEAVE_IT_OUT, **instead: str
) -> None:
    """Raise UserError for flags of run.py that a script takes with its data and does not read: all but those
    that it `reads`. `limits` says what to do instead of limiting rows as run.py does, `instead` of others."""
    ways = OF_RUN | dict.fromkeys(LIMITS, limits) | instead
    refuse_unread_flags(data, {name: way for name, way in ways.items() if name not in set(reads)})
