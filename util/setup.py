"""What programs do before the first sample: load a checkpoint onto a device, read a split."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from models.loading import LoadedModel, load_model
from util.backend import run_by_backend
from util.backend_arguments import BackendArguments
from util.data.examples import dataset_record, load_examples, target_language
from util.data.preparation import prepare
from util.data_arguments import DataArguments
from util.device import move_model
from util.evaluation.records import EvaluationSettings


def open_checkpoint(
    path: str,
    data: DataArguments,
    backend: BackendArguments | None = None,
    exit_adapter: str | None = None,
) -> LoadedModel:
    """Load a checkpoint on the best device, with an exit adapter if one is named, ready to decode the data,
    run by the backend asked for.

    Raises:
        UserError: nothing loadable there, or a language or length of the data that the model cannot take.
    """
    loaded = load_model(path, exit_adapter=exit_adapter)
    prepare(loaded, data)
    move_model(loaded.model)
    return loaded if backend is None else run_by_backend(loaded, backend)


def read_split(data: DataArguments, split: str, loaded: LoadedModel, limit: int | None = None) -> Dataset:
    """Rows (id, source, target) of a split, the first `limit` of them."""
    return load_examples(dataset_record(data), data, split, loaded.tokenizer, limit, loaded.prompt)


def comparison_settings(data: DataArguments, records_file: Path) -> EvaluationSettings:
    """How a comparison decodes the data; `records_file` gets every output."""
    return EvaluationSettings(
        data.task,
        data.max_source_length,
        data.val_max_target_length,
        records_file,
        language=target_language(data),
    )
