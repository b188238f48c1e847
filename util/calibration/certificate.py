"""The file that scripts/calibrate.py writes and `run.py --calibrated_threshold_file` obeys.

A certificate holds for one model, one policy and one way of decoding; all three are recorded, and checked
where the threshold is used.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from datasets import Dataset

from models.choices import EXACT_PRECISIONS
from models.errors import UserError
from models.json_files import check_fields, read_mapping
from models.loading import LoadedModel
from util.data.examples import dataset_record
from util.data_arguments import DataArguments
from util.exit_arguments import ExitArguments
from util.files import content_hash, file_hash, write_json

logger = logging.getLogger(__name__)

FLAG = "--calibrated_threshold_file"
HASHES = {  # of a model, by what they are of
    "weights": "weights or precision",
    "configuration": "configuration",
    "tokenizer": "tokenizer",
}


@dataclass
class CalibratedThreshold:
    """With probability 1 - epsilon, or in expectation where there is none (crc), the loss of `threshold` is
    at most delta.

    `candidates` has one row a threshold that was tried, from conservative to liberal.
    """

    threshold: float | None  # None: nothing was certified
    delta: float
    epsilon: float | None
    method: str
    p_value: str | None
    consistency: str
    fastest_by: str
    samples: int
    needed_samples: int | None  # of the first candidate that failed; None: none suffice, or all passed
    model: dict[str, str]  # util.evaluation.identity.identify_model
    data: dict[str, Any]
    settings: dict[str, Any]
    candidates: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> CalibratedThreshold:
        """Raises UserError if the file holds something else."""
        content, hints = read_mapping(path, FLAG), get_type_hints(cls)
        missing = [name for name in hints if name not in content]
        if missing:
            raise UserError(
                f"{FLAG} {path} is not what scripts/calibrate.py writes: it lacks {', '.join(missing)}."
            )
        model = content["model"]
        if not isinstance(model, dict) or not {*HASHES} <= {*model}:
            raise UserError(
                f"{FLAG} {path} does not record the model's configuration and tokenizer: calibrate again."
            )
        check_fields({name: content[name] for name in hints}, hints, f"{FLAG} {path}")
        if "hash" not in content["data"]:
            raise UserError(f"{FLAG} {path}: data lacks a hash.")
        return cls(**{name: content[name] for name in hints})

    def certified(self, path: Path, model: dict[str, str], settings: dict[str, Any]) -> float:
        """The threshold, if it was certified for this model, as `identify_model` tells it from others, and
        these settings; `path` is for the message.

        Raises:
            UserError: it was not.
        """
        if self.threshold is None:
            raise UserError(f"{FLAG} {path}: no threshold was certified; its candidates say why.")
        others = [what for name, what in HASHES.items() if self.model[name] != model[name]]
        if others:
            raise UserError(f"{FLAG} {path} was calibrated with other {', '.join(others)}: calibrate again.")
        ours, given = self.model | self.settings, model | settings
        differences = [
            f"{name} {ours.get(name)!r}, not {given.get(name)!r}"
            for name in sorted({*ours, *given})
            if ours.get(name) != given.get(name)
        ]
        if differences:
            raise UserError(f"{FLAG} {path} was calibrated with {'; '.join(differences)}.")
        return self.threshold

    def warn_of_data(self, path: Path, data: dict[str, Any]) -> None:
        """The guarantee is for fresh samples of what was calibrated on: warn of the same, and of others."""
        if self.data["hash"] == data["hash"]:
            logger.warning("%s %s was calibrated on these samples: it promises nothing for them.", FLAG, path)
        names = sorted(
            name for name, value in data.items() if name != "hash" and value != self.data.get(name)
        )
        if names:
            logger.warning("%s %s was calibrated on data with another %s.", FLAG, path, ", ".join(names))


def decoding_settings(
    flags: ExitArguments, data: DataArguments, loaded: LoadedModel, max_length: int, batch_size: int
) -> dict[str, Any]:
    """All that an output depends on besides model, source and threshold; `flags` are resolved."""
    settings = flags.certified() | {
        "method": " ".join(flags.methods),
        "task": data.task,
        "max_source_length": data.max_source_length,
        "max_length": max_length,
        "conf_shortlist": None if flags.conf_shortlist is None else file_hash(Path(flags.conf_shortlist)),
    }
    if loaded.prompt is not None:
        settings["prompt"] = content_hash([asdict(loaded.prompt)])
    if data.task == "question_answering":
        settings["doc_stride"] = data.doc_stride
    if flags.max_pending_tokens is not None:  # rows of a batch share their deep passes
        settings["batch_size"] = batch_size
    windows_matter = flags.max_pending_tokens is not None or loaded.precision not in EXACT_PRECISIONS
    if flags.lookup_tokens is not None and windows_matter:  # which lookups fill
        settings["lookup_tokens"] = flags.lookup_tokens
    return settings


def describe_data(examples: Dataset, data: DataArguments) -> dict[str, Any]:
    """What samples these are."""
    record = dataset_record(data)
    source, target = record.languages or (None, None)
    return {
        "hash": data_hash(examples),
        "dataset_name": data.dataset_name,
        "dataset_config_name": data.dataset_config_name,
        "source_prefix": record.prefix,
        "source_lang": source,
        "target_lang": target,
        "drop_long_samples": data.drop_long_samples,
    }


def data_hash(examples: Dataset) -> str:
    """Tells samples, in their order, from others: by sources and references."""
    return content_hash([row["source"], row.get("references") or row["target"]] for row in examples)
