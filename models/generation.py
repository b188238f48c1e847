"""`generate` for early exits: `generate(model, ...)` once, or `Generation(view)(...)` again and again.

Hugging Face's `generate` takes milliseconds to prepare a call, as long as a small model takes for several
tokens. `Generation` keeps what depends on the options alone.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from models.decode_stats import DecodeStats
from models.decoder_view import DecoderView, ModelInputs
from models.decoding import early_exit_decode
from models.errors import UserError
from models.exit_policy import ExitPolicy
from models.generate_contract import NEUTRAL, Output, check_inputs, with_stop_strings
from models.prompt_lookup import proposer_of
from models.token_choice import is_stateless

PLAIN = (bool, int, float, str, type(None))
GIVEN_INSTEAD = {"encoder_outputs", "inputs_embeds", "position_ids"}  # of what ids say
OF_ONE_CALL = (  # though stateless: they know the source, or when the call began
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "MaxTimeCriteria",
    "StopStringCriteria",
    "WatermarkLogitsProcessor",
)
OF_ANY_LENGTH = (  # processors that count nothing from where the prompt ends
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "NoRepeatNGramLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    stop_strings: str | list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stopping_criteria: list[Any] | None = None,
    custom_generate: Any = early_exit_decode,
    **options: Any,
) -> Output:
    """`model.generate(inputs, custom_generate=early_exit_decode, **options)` with stop strings too, whose
    tokenizer `generate` keeps from custom loops."""
    embeds, mask = options.get("inputs_embeds"), options.get("attention_mask")
    ids = options.get("input_ids") if inputs is None else inputs
    if options.get("encoder_outputs") is None and not (embeds is None and ids is None):
        check_inputs(model, ids if embeds is None else embeds, mask, embedded=embeds is not None)
    criteria = with_stop_strings(stopping_criteria, stop_strings, tokenizer)
    return model.generate(inputs, custom_generate=custom_generate, stopping_criteria=criteria, **options)


class Prepared(NamedTuple):
    """What `generate` makes of options, whatever the source or prompt."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    prompt: Tensor  # (1, P) ids that every output starts with, where prompts are of options

    @property
    def fits_any_length(self) -> bool:
        """Whether prompts of other lengths need no more than another `max_length`."""
        counted = self.config.max_new_tokens is not None
        return counted and all(type(item).__name__ in OF_ANY_LENGTH for item in self.processors)

    def criteria_for(self, length: int) -> StoppingCriteriaList:
        """The criteria after a prompt of `length` tokens."""
        more = length - self.prompt.shape[1]
        if more == 0:
            return self.criteria
        return StoppingCriteriaList(
            MaxLengthCriteria(item.max_length + more) if type(item) is MaxLengthCriteria else item
            for item in self.criteria
        )


class Generation:
    """`generate` of one view's model, whose encoder, if it has one, the view runs too."""

    def __init__(self, view: DecoderView) -> None:
        self.view = view
        self.model = view.model
        self.prepared: dict[Any, Prepared] = {}  # by options
        self.defaults: dict[str, Any] = {}  # the model's generation config that those were prepared with

    def __call__(
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        exit_policy: ExitPolicy | None = None,
        decode_stats: DecodeStats | None = None,
        lookup_ids: Tensor | None = None,
        **options: Any,
    ) -> Output:
        """As `generate`: (B, S) ids of sources or prompts -> (B, P + T) ids, or the usual output object."""
        self._refuse_others(options)
        if inputs is not None and input_ids is not None:
            raise UserError("Give inputs or input_ids, not both.")
        source = input_ids if inputs is None else inputs
        if lookup_ids is None and self.model.config.is_encoder_decoder and proposer_of(exit_policy):
            lookup_ids = source
        own: dict[str, Any] = {"exit_policy": exit_policy, "decode_stats": decode_stats}
        own |= {"decoder_view": self.view, "lookup_ids": lookup_ids}
        if source is None or not GIVEN_INSTEAD.isdisjoint(options):
            return generate(self.model, source, attention_mask=attention_mask, **own, **options)
        check_inputs(self.model, source, attention_mask)
        mask = self._mask(source, options) if attention_mask is None else attention_mask
        with torch.no_grad():
            read = self.view.read(source, mask)
            key = self._key(options)
            prepared = self.prepared.get(key) or self.prepared.get((key, prompt_length(read)))
            if prepared is None:
                loop = functools.partial(self._keep, key, read)
                functools.update_wrapper(loop, early_exit_decode)  # whose parameters `generate` asks for
                return generate(self.model, source, custom_generate=loop, **read.arguments, **own, **options)
            prompt = prepared.prompt.repeat(len(source), 1) if read.prompt is None else read.prompt
            return early_exit_decode(
                self.model,
                prompt,
                prepared.processors,
                prepared.criteria_for(prompt.shape[1]),
                prepared.config,
                **read.arguments,
                **own,
            )

    def _refuse_others(self, options: dict[str, Any]) -> None:
        """Take the loop and the view out of the options; UserError where they are not its own."""
        for name, own in (("custom_generate", early_exit_decode), ("decoder_view", self.view)):
            given = options.pop(name, None)
            if given is not None and given is not own:
                raise UserError(f"{name}: loaded.generate has its own: leave it out.")

    def _key(self, options: dict[str, Any]) -> Any:
        """What tells options apart; None if they say more than plain settings."""
        if not all(isinstance(value, PLAIN) for value in options.values()):
            return None
        if vars(self.model.generation_config) != self.defaults:
            self.defaults = copy.deepcopy(vars(self.model.generation_config))
            self.prepared.clear()
        settings = ((name, type(value), value) for name, value in options.items())
        return (self.model.device, *sorted(settings, key=lambda setting: setting[0]))

    def _keep(
        self,
        key: Any,
        read: ModelInputs,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **others: Any,
    ) -> Output:
        """`early_exit_decode`, keeping what it is called with if that suits other sources too."""
        items = [*logits_processor, *stopping_criteria]
        settings = (logits_processor, stopping_criteria, generation_config)
        known = {*NEUTRAL, *read.arguments, "cache", "position_ids"}  # which follow from ids and mask
        known |= {"exit_policy", "decode_stats", "decoder_view", "lookup_ids"}
        expected = input_ids[:1].expand_as(input_ids) if read.prompt is None else read.prompt
        reusable = (
            key is not None
            and is_stateless(items)
            and not any(type(item).__name__ in OF_ONE_CALL for item in items)
            and generation_config.num_return_sequences in (None, 1)
            and all(value is None or name in known for name, value in others.items())
            and torch.equal(input_ids, expected)
        )
        if reusable:
            prepared, length = Prepared(*settings, input_ids[:1].clone()), prompt_length(read)
            # Where processors count from the end of the prompt, another length is prepared anew.
            self.prepared[key if length is None or prepared.fits_any_length else (key, length)] = prepared
        return early_exit_decode(model, input_ids, *settings, **others)

    def _mask(self, source: Tensor, options: dict[str, Any]) -> Tensor:
        """0 at padding, as `generate` infers it: of decoder-only models, unless padding may be an end."""
        pad, ends = self._setting("pad_token_id", options), self._setting("eos_token_id", options)
        ends = ends if isinstance(ends, list) else [ends]
        if self.model.config.is_encoder_decoder or pad is None or pad in ends:
            return torch.ones_like(source)
        return (source != pad).long()

    def _setting(self, name: str, options: dict[str, Any]) -> Any:
        """Of the call, else of a config given with it, else of the model's: the first that says something."""
        configs = (options.get("generation_config"), self.model.generation_config)
        said = (options.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in said if value is not None), None)


def prompt_length(read: ModelInputs) -> int | None:
    """Tokens of the prompt; None where it is of the options."""
    return None if read.prompt is None else read.prompt.shape[1]
