"""Load or create a model with its tokenizer, exit heads and exit configuration.

`load_model(name_or_path)` reads hub ids, saves of ours, plain Hugging Face saves, original FREE checkpoints
and `.gguf` files, of encoder-decoder and decoder-only models; `create_model(config, tokenizer)` starts from
random weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.checkpoint_files import (
    LOADING_ERRORS,
    find_damage,
    find_file,
    first_line,
    read_weights,
    split_gguf,
)
from models.decoder_view import DecoderView
from models.errors import UserError
from models.exit_adapter import exit_adapter_of
from models.exit_adapter_files import is_exit_adapter, load_exit_adapter, read_exit_config
from models.exit_heads import (
    HEAD_NAMES,
    ExitConfig,
    exit_head_weights,
    head_misfits,
    load_exit_heads,
)
from models.families import check_family, view_for
from models.generate_contract import Output
from models.generation import Generation
from models.gguf import load_gguf, parsed_once
from models.json_files import LARGEST, read_mapping
from models.lora import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    EXIT_HEADS_NAME,
    adapted_vocabulary,
    is_adapted,
    load_lora,
    read_base_model,
)
from models.prompts import Prompt
from models.stored_heads import (
    DECODER_LM_HEAD,
    attach_stored_heads,
    load_exit_config,
    read_extra_weights,
)
from models.tokenizer import load_tokenizer

OLD_BUFFERS = (".attn.masked_bias",)  # GPT-2's, of early transformers: no weights


@dataclass
class LoadedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    exit_config: ExitConfig
    backend: str = "torch"  # what runs it: see models.backends.prepare
    precision: str = "fp32"  # of its weights, where that is not the model's dtype
    exit_precision: str | None = None  # of its exit adapter's, where it is another
    _view: DecoderView | None = field(default=None, repr=False)
    prompt: Prompt | None = None  # around sources, of a model without an encoder that tasks are prepared for
    _generation: Generation | None = field(default=None, init=False, repr=False)

    @property
    def view(self) -> DecoderView:
        """The model's view: one for all calls, until `model` is another."""
        base = self.model.get_base_model() if is_adapted(self.model) else self.model
        view = self._view
        if view is None or view.model is not base or view.exit_adapter is not exit_adapter_of(base):
            if self.backend != "torch":
                raise UserError(
                    f"The model or its exit adapter was replaced after the model was prepared for "
                    f"{self.backend}: prepare it again."
                )
            view = self._view = view_for(base)
        return view

    @property
    def precisions(self) -> dict[str, str]:
        """That of the weights, and that of the exit adapter's where it is another, as records name them."""
        own = {} if self.exit_precision is None else {"exit_precision": self.exit_precision}
        return {"precision": self.precision, **own}

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Output:
        """`model.generate(inputs, custom_generate=early_exit_decode, **options)`, which prepares a call only
        once for the same options: (B, S) ids of sources or prompts -> (B, P + T) ids, or the usual output
        object."""
        if self._generation is None or self._generation.view is not self.view:
            self._generation = Generation(self.view)
        return self._generation(inputs, **options)


def load_model(
    name_or_path: str,
    tokenizer_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    merge_adapter: bool = True,
    exit_adapter: str | None = None,
    **hub: Any,
) -> LoadedModel:
    """Load a checkpoint with everything it knows about exiting, as `dtype` however it is stored.

    A folder with an adapter (LoRA, or another that merges into weights) loads the base model that it names;
    the adapter is merged into it, or kept apart and trainable with `merge_adapter=False`. A `.gguf` file,
    local or `user/repository/file.gguf`, comes dequantized. `exit_adapter` names the folder or repository of
    one that was taught for this model; alone, such a folder loads the model that it names. `hub` takes
    cache_dir, revision and token.

    Raises:
        UserError: nothing loadable at `name_or_path`, or weights that do not fit the architecture.
    """
    refuse_misspelt_folder(name_or_path)
    if exit_adapter is None and is_exit_adapter(name_or_path, **hub):
        named, exit_adapter = name_or_path, name_or_path
        name_or_path = read_exit_config(named, **hub).base_model
    else:
        named = name_or_path
    with parsed_once(name_or_path):
        revision = of_named(name_or_path, named, hub)
        wide = exit_adapter is not None and dtype == torch.float16  # in which models cannot be told apart
        weights_dtype = torch.float32 if wide else dtype
        model, exit_config = load_weights(name_or_path, weights_dtype, merge_adapter, **revision)
        home = tokenizer_name or find_tokenizer_home(name_or_path, **revision)
        tokenizer = load_fitting_tokenizer(home, model.config, **of_named(home, named, hub))
    if exit_adapter is not None:
        refuse_lora(model)
        layer = load_exit_adapter(model, exit_adapter, **of_named(exit_adapter, named, hub)).layer
        exit_config = replace(exit_config, shallow_exit_layer=layer)
    return LoadedModel((cast_model(model, dtype) if wide else model).eval(), tokenizer, exit_config)


def of_named(name_or_path: str, named: str, hub: dict[str, Any]) -> dict[str, Any]:
    """How the hub is asked for one of several repositories: a revision is of the one that was named first."""
    return hub if name_or_path == named else {**hub, "revision": "main"}


def load_fitting_tokenizer(name: str, config: PreTrainedConfig, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer `name`, for models of this configuration."""
    target_size = getattr(
        config, "decoder_vocab_size", None
    )  # Marian's targets have a vocabulary of their own
    prompts = not config.is_encoder_decoder
    return load_tokenizer(name, config.vocab_size, target_size, prompts=prompts, **hub)


def load_weights(
    name_or_path: str, dtype: torch.dtype, merge_adapter: bool, **hub: Any
) -> tuple[PreTrainedModel, ExitConfig]:
    """The model, exit heads included, and its exit configuration."""
    if split_gguf(name_or_path)[1] is not None:
        return load_gguf(name_or_path, dtype, **hub), ExitConfig()
    adapter = find_file(name_or_path, ADAPTER_CONFIG_NAME, **hub)
    if adapter is not None:
        return load_adapted_weights(name_or_path, adapter.parent, dtype, merge_adapter, **hub)
    check_config(name_or_path)
    exit_config = load_exit_config(name_or_path, **hub)
    with damage_named(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub)
    check_family(config.model_type)
    with damage_named(name_or_path), without_load_report():  # judged below, where exit heads are known
        model, report = auto_class(config).from_pretrained(
            name_or_path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            trust_remote_code=False,
            **hub,
        )
    freeze_unsaved_weights(model)
    unexpected = set(report["unexpected_keys"])
    exit_config = attach_stored_heads(model, exit_config, unexpected)
    has_heads = any(hasattr(model, name) for name in HEAD_NAMES)
    extra = read_extra_weights(name_or_path, **hub) if has_heads or unexpected else {}
    heads = exit_head_weights(extra)
    if is_same(extra.get(DECODER_LM_HEAD), model.get_output_embeddings().weight):
        unexpected.discard(DECODER_LM_HEAD)  # the original saves the LM head a second time
    refuse_misfits(name_or_path, model, report | {"unexpected_keys": unexpected}, heads)
    load_exit_heads(model, heads)
    return model, exit_config


@contextmanager
def damage_named(name_or_path: str) -> Iterator[None]:
    """Raise UserError where transformers cannot load from there, with what is wrong with the files."""
    try:
        yield
    except LOADING_ERRORS as error:
        reason = find_damage(Path(name_or_path)) or first_line(error)
        raise UserError(f"Cannot load a model from {name_or_path}: {reason}") from error


def is_same(stored: Tensor | None, loaded: Tensor) -> bool:
    """Whether a weight is what was loaded, in whichever dtype."""
    return stored is not None and torch.equal(stored.to(loaded.dtype), loaded)


def auto_class(config: PreTrainedConfig) -> Any:
    """Transformers' class that makes models of a configuration, by whether there is an encoder."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


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


def refuse_lora(model: PreTrainedModel) -> None:
    if is_adapted(model):
        raise UserError("exit_adapter: merge the LoRA adapter (merge_adapter=True) that the exit reads from.")


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
    heads_file = find_file(name_or_path, EXIT_HEADS_NAME, **hub)
    heads = read_weights(heads_file) if heads_file is not None else {}
    exit_config = attach_stored_heads(model, load_exit_config(name_or_path, **hub), heads)
    refuse_misfits(name_or_path, model, {"unexpected_keys": heads}, heads)
    load_exit_heads(model, heads)
    return load_lora(model, folder, merge), exit_config


def find_tokenizer_home(name_or_path: str, **hub: Any) -> str:
    """Where a checkpoint's tokenizer lies: with it, or with the base model of an adapter that has none."""
    if split_gguf(name_or_path)[1] is not None:
        return name_or_path
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


def cast_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change the precision in place, to what `from_pretrained(dtype=dtype)` loads: in float16 the projections
    that overflow in T5 stay in float32, and buffers that no file holds, such as the frequencies of rotary
    positions, are never rounded."""
    kept = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for name, module in model.named_modules():
        cast_own(module, torch.float32 if kept & set(name.split(".")) else dtype)
    return model


def cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the precision of what a module itself has of a checkpoint, its parts aside."""
    for weight in module.parameters(recurse=False):
        weight.data = weight.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
            setattr(module, name, buffer.to(dtype))


def create_model(config_name: str, tokenizer_name: str, **hub: Any) -> LoadedModel:
    """A model with random weights from a config (hub id, folder or .json file).

    Raises:
        UserError: there is no such config or tokenizer, or it describes no model that can be created.
    """
    check_config(config_name)
    try:
        config = AutoConfig.from_pretrained(config_name, trust_remote_code=False, **hub)
    except LOADING_ERRORS as error:
        raise UserError(f"Cannot load a config from {config_name}: {first_line(error)}") from error
    check_family(config.model_type)
    tokenizer = load_fitting_tokenizer(tokenizer_name, config, **hub)
    try:
        model = auto_class(config).from_config(config)
    except LOADING_ERRORS as error:
        raise UserError(f"{config_name}: {first_line(error)}") from error
    return LoadedModel(model, tokenizer, ExitConfig())


def refuse_misfits(
    name_or_path: str, model: PreTrainedModel, report: dict[str, Any], heads: dict[str, Tensor]
) -> None:
    """Raise UserError, naming all of them, if weights are missing, mis-shaped or unknown: those that
    transformers reports, or those of exit heads."""
    misfits, known = head_misfits(model, heads), exit_head_weights(model.state_dict())
    unexpected = [
        key
        for key in report.get("unexpected_keys", ())
        if not (key.removeprefix("decoder.") in known or key.endswith(OLD_BUFFERS))
    ]
    problems = {
        "missing": sorted(report.get("missing_keys", ())) + misfits["missing"],
        "unexpected": sorted(unexpected),
        "wrong shape": sorted(map(str, report.get("mismatched_keys", ()))) + misfits["wrong shape"],
    }
    found = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise UserError(f"{name_or_path} does not fit its architecture; {'; '.join(found)}.")
