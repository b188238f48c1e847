"""What `generate` keeps from a custom loop: taken over where it can be, else refused by name.

`early_exit_decode` asks at its start, so that nothing that a caller sets is ignored in silence.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
    GenerationMode,
)

from models.checks import spell
from models.decoder_view import DecoderView
from models.errors import UserError

OutputObject: TypeAlias = GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput
Output: TypeAlias = Tensor | OutputObject
GENERATE_CODE = inspect.unwrap(GenerationMixin.generate).__code__
NEUTRAL = {"use_cache", "logits_to_keep"}  # change no output of this loop
ASSISTANTS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")
UNSUPPORTED_MODES = {
    GenerationMode.CONTRASTIVE_SEARCH: "contrastive search: leave out penalty_alpha",
    GenerationMode.DOLA_GENERATION: "DoLa: leave out dola_layers",
    GenerationMode.CONSTRAINED_BEAM_SEARCH: "constrained beams: leave out constraints and force_words_ids",
}


def arguments_kept_by_generate(config: GenerationConfig) -> dict[str, Any]:
    """`streamer`, `assistant_model`, `synced_gpus` of the `generate` call that handed over this `config`, if
    one did: another may be running too, if it is in a logits processor of that that this call is made.

    `generate` hands a custom loop only arguments that its own loops do not have, so that a streamer would
    get neither tokens nor an end, and its reader wait for ever.
    """
    frame = inspect.currentframe()
    while frame is not None and not (
        frame.f_code is GENERATE_CODE and frame.f_locals.get("generation_config") is config
    ):
        frame = frame.f_back
    names = ("streamer", "assistant_model", "synced_gpus")
    return {} if frame is None else {name: frame.f_locals[name] for name in names}


def refuse_unsupported(config: GenerationConfig, kept: dict[str, Any]) -> None:
    """Raise UserError for the first setting that the loop would ignore."""
    mode = config.get_generation_mode(kept.get("assistant_model"))
    if config.num_beams is not None and config.num_beams > 1:
        raise UserError("early_exit_decode decodes one beam: set num_beams=1.")
    if mode == GenerationMode.ASSISTED_GENERATION:
        named = {name: kept.get(name, getattr(config, name, None)) for name in ASSISTANTS}
        given = [name for name, value in named.items() if value not in (None, False)]
        raise UserError(
            f"early_exit_decode does no assisted generation: leave out {', '.join(given)} (Free(..., "
            "lookup=PromptLookup(n)) looks up)."
        )
    if mode in UNSUPPORTED_MODES:
        raise UserError(f"early_exit_decode does no {UNSUPPORTED_MODES[mode]}.")
    if kept.get("synced_gpus"):
        raise UserError("early_exit_decode does not decode with sharded weights (synced_gpus): gather them.")
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(config, name) and config.return_dict_in_generate:
            raise UserError(
                f"early_exit_decode does not return {name}, as tokens skip layers: use models.trace_layers, "
                "or generate without custom_generate."
            )
    if config.cache_implementation not in (None, "dynamic"):
        raise UserError(
            f"early_exit_decode keeps its own cache: leave out cache_implementation="
            f"{config.cache_implementation!r}."
        )
    if config.prefill_chunk_size is not None:
        raise UserError("early_exit_decode prefills at once: leave out prefill_chunk_size.")
    if config.guidance_scale not in (None, 1, 1.0):
        raise UserError("early_exit_decode runs no unconditional pass: leave out guidance_scale.")


def model_arguments(view: DecoderView, given: dict[str, Any], input_ids: Tensor) -> dict[str, Any]:
    """Those of `given` that `view.begin` reads, beside a prompt (B, P).

    Raises:
        UserError: there is any other with a value, or one does not fit the prompt.
    """
    known = parameters_of(getattr(view.begin, "__func__", view.begin))
    done = {*NEUTRAL, "inputs_embeds"} if "encoder_outputs" in known else NEUTRAL  # which were made of them
    unread = [name for name, value in given.items() if value is not None and name not in {*known, *done}]
    if unread:
        raise UserError(f"early_exit_decode does not read {', '.join(sorted(unread))}: leave it out.")
    arguments = {name: value for name, value in given.items() if name in known}
    check_arguments(input_ids, arguments)
    return arguments


def check_inputs(model: PreTrainedModel, inputs: Any, mask: Any, *, embedded: bool = False) -> None:
    """Raise UserError unless `inputs` are ids (B, S) of sources or prompts, or `embedded`, (B, S, D), and the
    mask fits them."""
    fits = isinstance(inputs, Tensor) and inputs.is_floating_point() == embedded
    if not fits or inputs.dim() != 2 + embedded or not inputs.numel():
        wanted = "inputs must be token ids (B, S), or be given as inputs_embeds="
        wanted = "inputs_embeds must be embeddings (B, S, D)" if embedded else wanted
        raise UserError(f"{wanted}, of at least one token, got {spell(inputs)}.")
    check_mask("attention_mask", mask, inputs, of_all=model.config.is_encoder_decoder)


def check_arguments(input_ids: Tensor, given: dict[str, Any]) -> None:
    """Raise UserError where what a view's `begin` is given is empty, or not of the same rows as the prompt
    (B, P)."""
    rows, mask, embeds = len(input_ids), given.get("attention_mask"), given.get("inputs_embeds")
    outputs = given.get("encoder_outputs")
    if outputs is not None:
        check_mask("attention_mask", mask, outputs[0], of_all=True)
        check_mask("decoder_attention_mask", given.get("decoder_attention_mask"), input_ids)
        if len(outputs[0]) != rows:
            raise UserError(
                f"decoder_input_ids has {rows} rows and the source {len(outputs[0])}: give as many."
            )
        return
    prompt = input_ids if embeds is None else embeds
    if not prompt.numel():
        raise UserError("The prompt is empty: give at least one token, such as the one of bos_token_id.")
    if len(prompt) != rows:
        raise UserError(f"inputs_embeds has {len(prompt)} rows and input_ids {rows}: give as many.")
    positions = given.get("position_ids")
    if positions is not None and (positions.dim() != 2 or len(positions) not in (1, rows)):
        raise UserError(
            f"position_ids, or the attention_mask that they are counted from, has shape "
            f"{(*positions.shape,)}, and the prompt {rows} rows: give as many."
        )
    check_mask("attention_mask", mask, prompt)


def check_mask(name: str, mask: Any, masked: Tensor, *, of_all: bool = False) -> None:
    """Raise UserError for a mask that does not have the rows of what it masks, (B, N) or (B, N, D), or, where
    it is `of_all` tokens and not also of cached ones, the columns."""
    shape = (*masked.shape[:2],)
    if mask is not None and not (
        isinstance(mask, Tensor)
        and mask.dim() == 2
        and len(mask) == shape[0]
        and (not of_all or mask.shape[1] == shape[1])
    ):
        raise UserError(f"{name} must have the shape of what it masks, {shape}, got {spell(mask)}.")


def with_stop_strings(
    criteria: list[Any] | None,
    stop_strings: str | list[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> StoppingCriteriaList:
    """The criteria and, if there are stop strings, one of these: `generate` keeps their tokenizer from custom
    loops."""
    criteria = StoppingCriteriaList(criteria or [])
    if stop_strings is not None:
        if tokenizer is None:
            raise UserError("stop_strings need a tokenizer=.")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return criteria


def length_of_mask(prompt_mask: Tensor | None, config: GenerationConfig) -> int | None:
    """Positions of the mask that the caller gave for the prompt; `generate` hands on the length alone of one
    that masks nothing."""
    return getattr(config, "_mask_length", None) if prompt_mask is None else prompt_mask.shape[1]


def output_class(config: PreTrainedConfig) -> type[OutputObject]:
    """What `generate` returns of such a model if `return_dict_in_generate` is set."""
    return GenerateEncoderDecoderOutput if config.is_encoder_decoder else GenerateDecoderOnlyOutput


@functools.cache
def parameters_of(begin: Callable[..., Any]) -> frozenset[str]:
    """The keywords of a view's `begin` besides the cache."""
    return frozenset(inspect.signature(begin).parameters) - {"self", "cache"}
