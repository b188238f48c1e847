"""Load or create a model with its tokenizer, exit heads and exit configuration.

`load_model(name_or_path)` reads hub ids, saves of ours, plain Hugging Face saves and original FREE
checkpoints; `create_model(config, tokenizer)` starts from random weights.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from models.decoder_view import DecoderView
from models.errors import UserError
from models.exit_heads import (
    EXIT_CONFIG_NAME,
    HEAD_NAMES,
    ExitConfig,
    attach_exit_heads,
    exit_head_weights,
    head_misfits,
    is_head_weight,
    load_exit_heads,
)
from models.families import view_for
from models.generation import Generation, Output
from models.json_files import LARGEST, fits, read_mapping
from models.lora import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    EXIT_HEADS_NAME,
    adapted_vocabulary,
    is_adapted,
    load_lora,
    read_base_model,
)

LOADING_ERRORS = (  # what torch and transformers raise for files that are damaged or say impossible things
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)
LFS_POINTER = b"version https://git-lfs"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
DECODER_LM_HEAD = "decoder.lm_head.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # beside those that a tokenizer's class names


@dataclass
class LoadedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    exit_config: ExitConfig
    backend: str = "torch"  # what runs it: see models.backends.prepare
    precision: str = "fp32"  # of its weights, where that is not the model's dtype
    _view: DecoderView | None = field(default=None, repr=False)
    _generation: Generation | None = field(default=None, init=False, repr=False)

    @property
    def view(self) -> DecoderView:
        """The model's view: one for all calls, until `model` is another."""
        base = self.model.get_base_model() if is_adapted(self.model) else self.model
        if self._view is None or self._view.model is not base:
            if self.backend != "torch":
                raise UserError(
                    f"The model was replaced after it was prepared for {self.backend}: prepare it again."
                )
            self._view = view_for(base)
        return self._view

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Output:
        """`model.generate(inputs, custom_generate=early_exit_decode, **options)`, which prepares a call only
        once for the same options: (B, S) source ids -> (B, P + T) ids, or the usual output object."""
        if self._generation is None or self._generation.view is not self.view:
            self._generation = Generation(self.view)
        return self._generation(inputs, **options)


def load_model(
    name_or_path: str,
    tokenizer_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    merge_adapter: bool = True,
    **hub: Any,
) -> LoadedModel:
    """Load a checkpoint with everything it knows about exiting, as `dtype` however it is stored.

    A folder with an adapter (LoRA, or another that merges into weights) loads the base model that it names;
    the adapter is merged into it, or kept apart and trainable with `merge_adapter=False`. `hub` takes
    cache_dir, revision and token.

    Raises:
        UserError: nothing loadable at `name_or_path`, or weights that do not fit the architecture.
    """
    refuse_misspelt_folder(name_or_path)
    model, exit_config = load_weights(name_or_path, dtype, merge_adapter, **hub)
    home = tokenizer_name or find_tokenizer_home(name_or_path, **hub)
    if home != name_or_path:
        hub = {**hub, "revision": "main"}  # the revision is the model's
    tokenizer = load_tokenizer(home, *vocabulary_sizes(model.config), **hub)
    return LoadedModel(model.eval(), tokenizer, exit_config)


def load_weights(
    name_or_path: str, dtype: torch.dtype, merge_adapter: bool, **hub: Any
) -> tuple[PreTrainedModel, ExitConfig]:
    """The model, exit heads included, and its exit configuration."""
    adapter = find_file(name_or_path, ADAPTER_CONFIG_NAME, **hub)
    if adapter is not None:
        return load_adapted_weights(name_or_path, adapter.parent, dtype, merge_adapter, **hub)
    check_config(name_or_path)
    exit_config = load_exit_config(name_or_path, **hub)
    try:
        with without_load_report():  # it is judged below, where exit heads are known
            model, report = AutoModelForSeq2SeqLM.from_pretrained(
                name_or_path,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                trust_remote_code=False,
                **hub,
            )
    except LOADING_ERRORS as error:
        reason = find_damage(Path(name_or_path)) or first_line(error)
        raise UserError(f"Cannot load a model from {name_or_path}: {reason}") from error
    freeze_unsaved_weights(model)
    unexpected = set(report["unexpected_keys"])
    exit_config = with_stored_heads(exit_config, unexpected)
    attach_exit_heads(model, exit_config)
    has_heads = any(hasattr(model, name) for name in HEAD_NAMES)
    extra = read_extra_weights(name_or_path, **hub) if has_heads or unexpected else {}
    heads = exit_head_weights(extra)
    if torch.equal(extra.get(DECODER_LM_HEAD, torch.empty(0)), model.get_output_embeddings().weight):
        unexpected.discard(DECODER_LM_HEAD)  # the original saves the LM head a second time
    refuse_misfits(name_or_path, report | {"unexpected_keys": unexpected}, head_misfits(model, heads))
    load_exit_heads(model, heads)
    return model, exit_config


@contextmanager
def without_load_report() -> Iterator[None]:
    """Keep transformers from printing its table of missing and unexpected weights; other warnings pass."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_load_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_load_report)


def is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def refuse_misspelt_folder(name_or_path: str) -> None:
    """Raise UserError if the name is no folder, but the one it would lie in holds checkpoints: it is not
    meant for the hub, which would be asked for a long time where it cannot be reached."""
    parent = Path(name_or_path).parent
    if Path(name_or_path).exists() or parent == Path("."):
        return
    siblings = sorted(path.parent.name for path in parent.glob("*/config.json"))
    if siblings:
        raise UserError(f"There is no checkpoint {name_or_path}; {parent} has {', '.join(siblings)}.")


def load_adapted_weights(
    name_or_path: str, folder: Path, dtype: torch.dtype, merge: bool, **hub: Any
) -> tuple[PreTrainedModel, ExitConfig]:
    """The base model that the adapter in `folder` names, with the adapter and the exit heads beside it."""
    find_file(name_or_path, ADAPTER_WEIGHTS_NAME, **hub)  # downloads them
    base = read_base_model(name_or_path, folder)
    model, _ = load_weights(base, dtype, True, **{**hub, "revision": "main"})
    vocabulary = adapted_vocabulary(folder)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    exit_config = load_exit_config(name_or_path, **hub)
    attach_exit_heads(model, exit_config)
    heads_file = find_file(name_or_path, EXIT_HEADS_NAME, **hub)
    heads = read_weights(heads_file) if heads_file is not None else {}
    refuse_misfits(name_or_path, {}, head_misfits(model, heads))
    load_exit_heads(model, heads)
    return load_lora(model, folder, merge), exit_config


def find_tokenizer_home(name_or_path: str, **hub: Any) -> str:
    """Where a checkpoint's tokenizer lies: with it, or with the base model of an adapter that has none."""
    config = find_file(name_or_path, ADAPTER_CONFIG_NAME, **hub)
    if config is None or find_file(name_or_path, "tokenizer_config.json", **hub) is not None:
        return name_or_path
    return find_tokenizer_home(read_base_model(name_or_path, config.parent), **{**hub, "revision": "main"})


def check_config(name_or_path: str) -> None:
    """Raise UserError if a local config is no mapping, or names a size that no tensor has."""
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    for name, value in read_mapping(path).items() if path.is_file() else ():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{path}: {name} {value} is too large: whole numbers have 64 bits.")


def freeze_unsaved_weights(model: PreTrainedModel) -> None:
    """Keep out of training what `save_pretrained` leaves out: Marian's sinusoidal positions, which
    transformers loads as trainable."""
    for name in model._keys_to_ignore_on_save or ():
        model.get_parameter(name).requires_grad_(False)


def with_stored_heads(exit_config: ExitConfig, unexpected_keys: Iterable[str]) -> ExitConfig:
    """The configuration, extended by heads that a checkpoint holds but does not announce."""
    stored = {key.removeprefix("decoder.").split(".")[0] for key in unexpected_keys}
    return replace(
        exit_config,
        train_meta_cm_head=exit_config.train_meta_cm_head or "cm_head" in stored,
        do_layer_transformation=exit_config.do_layer_transformation or "layer_transformation" in stored,
    )


def cast_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change the precision in place. In float16 the projections that overflow in T5 stay in float32, as
    `from_pretrained` keeps them."""
    model.to(dtype)
    if dtype == torch.float16:
        kept = set(model._keep_in_fp32_modules or ())
        for name, module in model.named_modules():
            if kept & set(name.split(".")):
                module.float()
    return model


def create_model(config_name: str, tokenizer_name: str, **hub: Any) -> LoadedModel:
    """A model with random weights from a config (hub id, folder or .json file).

    Raises:
        UserError: there is no such config or tokenizer, or it describes no encoder-decoder model.
    """
    check_config(config_name)
    try:
        config = AutoConfig.from_pretrained(config_name, trust_remote_code=False, **hub)
    except LOADING_ERRORS as error:
        raise UserError(f"Cannot load a config from {config_name}: {first_line(error)}") from error
    tokenizer = load_tokenizer(tokenizer_name, *vocabulary_sizes(config), **hub)
    try:
        model = AutoModelForSeq2SeqLM.from_config(config)
    except LOADING_ERRORS as error:
        raise UserError(f"{config_name}: {first_line(error)}") from error
    return LoadedModel(model, tokenizer, ExitConfig())


def vocabulary_sizes(config: PreTrainedConfig) -> tuple[int, int | None]:
    """Tokens of sources and, where it is another vocabulary (Marian), of targets."""
    return config.vocab_size, getattr(config, "decoder_vocab_size", None)


def load_tokenizer(
    name: str, vocab_size: int, target_vocab_size: int | None = None, **hub: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, also from the lone `spiece.model` of original FREE checkpoints.

    It returns what encoder-decoder models take, whatever else its class would add (BERT's token_type_ids).

    Raises:
        UserError: there is none, or it has more tokens than the model's vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
    except LOADING_ERRORS as error:
        raise UserError(f"Cannot load a tokenizer from {name}: {first_line(error)}") from error
    if not has_vocabulary(tokenizer, name, **hub):
        raise UserError(f"{name} has no tokenizer. Name its base model's with --tokenizer_name.")
    target_tokens = getattr(tokenizer, "target_encoder", ())  # where source and target have their own
    sizes = (len(tokenizer), vocab_size), (len(target_tokens), target_vocab_size or vocab_size)
    for tokens, size in sizes:
        if tokens > size:
            raise UserError(f"{name} has {tokens} tokens, but the model a vocab_size of {size}.")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def has_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, **hub: Any) -> bool:
    """Whether there is a file that the tokenizer's class reads; without one, transformers makes an empty
    tokenizer of the model's usual class. Classes of byte-level tokenizers need no file, but to be named."""
    files = tokenizer.vocab_files_names.values() or ("tokenizer_config.json",)
    return any(find_file(name, file, **hub) is not None for file in {*files, *TOKENIZER_FILES})


def load_exit_config(name_or_path: str, **hub: Any) -> ExitConfig:
    """The checkpoint's exit configuration; all defaults where it has none."""
    files = (EXIT_CONFIG_NAME, "config.json")
    paths = [find_file(name_or_path, file, **hub) for file in files]
    return next((ExitConfig.load(path.parent) for path in paths if path is not None), ExitConfig())


def read_extra_weights(name_or_path: str, **hub: Any) -> dict[str, Tensor]:
    """The weights of a checkpoint that belong to exit heads or to a second LM head, from one file or from
    shards, on the CPU."""
    for file in WEIGHT_FILES:
        index = find_file(name_or_path, f"{file}.index.json", **hub)
        if index is not None:
            places = read_mapping(index)["weight_map"]  # whole, as the model came from it
            shards = {shard for name, shard in places.items() if is_extra_weight(name)}
            paths = [find_file(name_or_path, shard, **hub) for shard in sorted(shards)]
        else:
            paths = [find_file(name_or_path, file, **hub)]
        weights = {name: tensor for path in paths if path for name, tensor in read_weights(path).items()}
        if weights:
            return {name: tensor for name, tensor in weights.items() if is_extra_weight(name)}
    return {}


def is_extra_weight(name: str) -> bool:
    return is_head_weight(name) or name == DECODER_LM_HEAD


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        raise UserError(f"{path} cannot be read: {find_damage(path.parent) or first_line(error)}") from error


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder's weight files, if they never arrived or their index is none."""
    for path in folder.glob("*.index.json"):
        if not fits(read_mapping(path).get("weight_map"), dict[str, str]):
            return f"{path.name} lacks a weight_map from names to files."
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(len(LFS_POINTER))
            if not start:
                return f"{path.name} is empty; copy or download it again."
            if start == LFS_POINTER:
                return f"{path.name} is only a pointer; run `git lfs pull` where it was cloned."
    return None


def find_file(name_or_path: str, file: str, **hub: Any) -> Path | None:
    """Local path of a checkpoint's file, downloaded if need be; None where it has no such file."""
    try:
        path = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError as error:  # neither a folder nor a repository
        raise UserError(f"Cannot find {name_or_path}: {first_line(error)}") from error
    return None if path is None else Path(path)


def refuse_misfits(name_or_path: str, report: dict[str, Any], heads: dict[str, list[str]]) -> None:
    """Raise UserError, naming all of them, if weights are missing, mis-shaped or unknown."""
    unexpected = [key for key in report.get("unexpected_keys", ()) if not is_head_weight(key)]
    problems = {
        "missing": sorted(report.get("missing_keys", ())) + heads["missing"],
        "unexpected": sorted(unexpected),
        "wrong shape": sorted(map(str, report.get("mismatched_keys", ()))) + heads["wrong shape"],
    }
    found = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise UserError(f"{name_or_path} does not fit its architecture; {'; '.join(found)}.")


def first_line(error: Exception) -> str:
    """The start of an error's text, with the kind where that says nothing; two lines after a colon."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
