"""What an output depends on, as hashes: weights, configuration, tokenizer, samples, files that flags name.

What was interrupted continues only where all of them are what they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.loading import LoadedModel
from util.exit_arguments import ExitArguments
from util.files import content_hash, file_hash
from util.flags import flags_in

STATE_OF_THE_LAST_CALL = ("truncation", "padding")
NOT_A_SETTING = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
BATCH = 1000


def identify(loaded: LoadedModel, examples: Dataset) -> dict[str, str]:
    """What outputs depend on besides flags."""
    return identify_model(loaded) | {"samples": hash_rows(examples)}


def identify_model(loaded: LoadedModel) -> dict[str, str]:
    return {
        "weights": fingerprint(loaded),
        "configuration": hash_configuration(loaded),
        "tokenizer": hash_tokenizer(loaded.tokenizer),
        "backend": loaded.backend,
        **loaded.precisions,
        "device": loaded.model.device.type,
    }


def fingerprint(loaded: LoadedModel) -> str:
    """Tells weights (and their precision) from others: sums that any training step changes."""
    sums = [total(weight) for weight in loaded.model.parameters()]
    return f"{loaded.model.dtype}:{hashlib.sha256(repr(sums).encode()).hexdigest()[:16]}"


def total(values: Tensor) -> float:
    """The sum in float64, which not every device has."""
    return values.detach().cpu().double().sum().item()


def hash_configuration(loaded: LoadedModel) -> str:
    """Settings of the model, of its `generate` and its exits, and buffers such as BART's logit bias."""
    configs = [loaded.model.config.to_dict(), loaded.model.generation_config.to_dict()]
    settings = [
        [name, repr(config[name])]
        for config in configs
        for name in sorted(config)
        if name not in NOT_A_SETTING
    ]
    buffers = [[name, total(value)] for name, value in loaded.model.named_buffers()]
    return content_hash([asdict(loaded.exit_config), settings, buffers])


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, special tokens and the rules or models that cut text into pieces."""
    parts: list[Any] = [type(tokenizer).__name__, repr(tokenizer.special_tokens_map)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        parts.append({name: rules[name] for name in rules if name not in STATE_OF_THE_LAST_CALL})
    else:
        models = [part for part in vars(tokenizer).values() if isinstance(part, SentencePieceProcessor)]
        parts += sorted({hashlib.sha256(model.serialized_model_proto()).hexdigest() for model in models})
        parts.append(sorted(tokenizer.get_vocab().items()))
    return content_hash(parts)


def hash_rows(rows: Dataset) -> str:
    """All columns of all rows in their order: of samples, ids, sources and references."""

    def columns() -> Iterator[Any]:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            yield [[name, batch[name]] for name in sorted(batch)]

    return content_hash(columns())


def hash_named_files(arguments: dict[str, Any]) -> dict[str, str]:
    """The contents of the files that `arguments` name and outputs depend on."""
    files = [spec.name for spec in flags_in(ExitArguments) if spec.metadata["file"]]
    named = {name: arguments[name] for name in files if arguments.get(name)}
    return {f"content of {name}": file_hash(Path(path)) for name, path in named.items()}
