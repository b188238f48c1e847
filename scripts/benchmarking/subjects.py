"""What the benchmark decodes: embedded checkpoints on real sentences, random weights on random ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedTokenizerFast

from models.checkpoint_files import LOADING_ERRORS, first_line
from models.errors import UserError
from models.exit_heads import ExitConfig
from models.loading import LoadedModel, check_config, load_model
from util.data_arguments import DataArguments
from util.device import move_model
from util.flags import require
from util.methods import CALM, FREE, FREE_LOSSLESS, STATIC
from util.script_arguments import BENCHMARK_SHAPES, BenchmarkArguments
from util.setup import read_split

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
EMBEDDED = {  # with the methods that each was trained for
    "debian-t5-free": (FREE, FREE_LOSSLESS, STATIC),
    "debian-t5-calm": (CALM,),
    "debian-bart-free": (FREE, FREE_LOSSLESS, STATIC),
}
RANDOM = (FREE, CALM, STATIC)  # methods on random weights; how many drafts they accept would be chance
SOURCE_LENGTH, MAX_LENGTH = 28, 56  # of the embedded rows, as their checkpoints were trained


@dataclass
class Batch:
    """B samples as every contestant takes them."""

    number: int
    inputs: dict[str, Tensor]  # (B, S) ids and mask
    pieces: list[list[str]]  # the same tokens by name, without padding
    references: list[str]  # none of random samples


@dataclass
class Subject:
    """One model with its samples. If it was not trained, every output has `max_tokens`."""

    name: str
    loaded: LoadedModel
    batches: list[Batch]
    methods: list[str]
    exit_layer: int | None
    max_tokens: int
    trained: bool

    @property
    def samples(self) -> int:
        return sum(len(batch.pieces) for batch in self.batches)


def subject_names(flags: BenchmarkArguments) -> list[str]:
    """What --models names, one by one; embedded checkpoints for which a method was chosen."""
    names = []
    for name in flags.models:
        chosen = [one for one, methods in EMBEDDED.items() if {*methods} & {*flags.methods}]
        names += chosen if name == "embedded" else [name]
    return list(dict.fromkeys(names))


def open_subject(name: str, flags: BenchmarkArguments) -> Subject:
    """
    Raises:
        UserError: no such exit layer, or a config that describes no encoder-decoder model.
    """
    subject = open_embedded(name, flags) if name in EMBEDDED else open_random(name, flags)
    device = torch.device(flags.device)
    move_model(subject.loaded.model, device, getattr(torch, flags.dtype))
    for batch in subject.batches:
        batch.inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    layers = subject.loaded.view.num_layers
    require(
        subject.exit_layer is None or 1 <= subject.exit_layer < layers,
        f"--shallow_exit_layer must lie in 1..{layers - 1} of {name}, got {subject.exit_layer}.",
    )
    return subject


def open_embedded(name: str, flags: BenchmarkArguments) -> Subject:
    loaded = load_model(str(CHECKPOINTS / name))
    data = DataArguments(
        task="translation",
        dataset_name="debian_de_en",
        drop_long_samples=True,
        max_source_length=SOURCE_LENGTH,
        max_target_length=SOURCE_LENGTH,
    )
    rows = read_split(data, "test", loaded, flags.samples)
    sources = [loaded.tokenizer(text)["input_ids"] for text in rows["source"]]
    return Subject(
        name,
        loaded,
        list(make_batches(loaded, sources, rows["target"], flags.batch_size)),
        [method for method in flags.methods if method in EMBEDDED[name]],
        flags.shallow_exit_layer or loaded.exit_config.shallow_exit_layer,
        max_tokens=MAX_LENGTH - 1,
        trained=True,
    )


def open_random(name: str, flags: BenchmarkArguments) -> Subject:
    """A model of the shape that a config file describes; its first quarter of layers is shallow."""
    torch.manual_seed(0)
    path = BENCHMARK_SHAPES.get(name, Path(name))
    check_config(str(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
    except LOADING_ERRORS as error:
        raise UserError(f"--models {name}: {first_line(error)}") from error
    never = dict.fromkeys(("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"))
    model.generation_config.update(**never)
    loaded = LoadedModel(model, invent_tokenizer(config), ExitConfig())
    special = {config.pad_token_id, config.eos_token_id, config.decoder_start_token_id}
    words = torch.tensor([index for index in range(config.vocab_size) if index not in special])
    picks = torch.randint(len(words), (flags.samples, flags.source_length))
    return Subject(
        name,
        loaded,
        list(make_batches(loaded, words[picks].tolist(), [], flags.batch_size)),
        [method for method in flags.methods if method in RANDOM],
        flags.shallow_exit_layer or max(1, loaded.view.num_layers // 4),
        max_tokens=flags.target_length,
        trained=False,
    )


def invent_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Names for all tokens of a model that has no tokenizer."""
    special = {config.pad_token_id: "<pad>", config.eos_token_id: "</s>"}
    names = {special.get(index, f"word{index}"): index for index in range(config.vocab_size)}
    spare = next(name for name in names if name.startswith("word"))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(names, unk_token=spare)),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token=spare,
    )


def make_batches(
    loaded: LoadedModel, sources: list[list[int]], references: list[str], size: int
) -> Iterator[Batch]:
    for number, first in enumerate(range(0, len(sources), size)):
        rows = sources[first : first + size]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), loaded.model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        pieces = [loaded.tokenizer.convert_ids_to_tokens(tokens) for tokens in rows]
        inputs = {"input_ids": ids, "attention_mask": mask}
        yield Batch(number, inputs, pieces, references[first : first + size])
