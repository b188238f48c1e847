"""CTranslate2 on the weights of a loaded model, by its own converter. Imported only where it is installed."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.errors import UserError
from models.loading import LoadedModel

FAMILIES = ("t5", "bart", "marian")
Translator = Callable[[list[list[str]], int, int], list[list[str]]]
"""From sources, the least and the greatest number of tokens to outputs, end included."""


def is_installed() -> bool:
    return importlib.util.find_spec("ctranslate2") is not None


def open_translator(loaded: LoadedModel, folder: Path, compute_type: str, threads: int) -> Translator:
    """Greedy decoding with weights of `compute_type`; `folder` takes the conversion.

    Raises:
        UserError: a family that is not compared.
    """
    import ctranslate2

    converted = folder / "ctranslate2"
    if not converted.exists():
        convert(loaded, converted)
    limits = {"intra_threads": threads, "inter_threads": 1}
    translator = ctranslate2.Translator(str(converted), "cpu", compute_type=compute_type, **limits)

    def translate(sources: list[list[str]], shortest: int, longest: int) -> list[list[str]]:
        results = translator.translate_batch(
            sources,
            beam_size=1,
            max_input_length=0,
            min_decoding_length=shortest,
            max_decoding_length=longest,
            return_end_token=True,
        )
        return [result.hypotheses[0] for result in results]

    return translate


def convert(loaded: LoadedModel, target: Path) -> None:
    """Write a model in CTranslate2's format, in float32; it is quantized when it is opened."""
    from ctranslate2.converters import TransformersConverter

    family = loaded.model.config.model_type
    if family not in FAMILIES:
        raise UserError(
            f"--rivals: CTranslate2 is compared on {', '.join(FAMILIES)}, not on {family}: name others."
        )

    class Converter(TransformersConverter):
        """Of a model in memory; the file it reads is the config."""

        def load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            model = copy.copy(loaded.model)  # which shares the weights
            model.config = copy.deepcopy(model.config)
            if not hasattr(model.config, "normalize_before"):  # BART's, which transformers 5 dropped
                model.config.normalize_before = False
            return model

        def load_tokenizer(self, *_: Any, **__: Any) -> PreTrainedTokenizerBase:
            tokenizer = copy.deepcopy(loaded.tokenizer)
            if tokenizer.bos_token is None:  # no source or output has one, but its name must be a string
                tokenizer.bos_token = tokenizer.pad_token
            return tokenizer

    with tempfile.TemporaryDirectory() as folder:
        loaded.model.config.save_pretrained(folder)
        Converter(folder).convert(str(target))
