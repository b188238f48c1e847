"""From texts to token ids, for training and decoding, by what kind of model reads them.

`make_encoder(tokenizer, prompt, ...)` gives an `Encoder`, whose sources are an encoder's, or a
`PromptEncoder` for decoder-only models, which read prompt and answer as one sequence.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from models.decoder_view import PADDING_LABEL
from models.errors import UserError
from models.loading import LoadedModel
from models.prompts import Prompt
from util.data.windows import split_text

Columns = dict[str, list[list[int]]]


class Encoder:
    """Maps a batch of sources and targets to token ids of at most the given lengths; picklable.

    None cuts nothing. `on_cut` is called for each source that is cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        on_cut: Callable[[], None] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.on_cut = on_cut

    def __call__(self, batch: dict[str, list[str]]) -> Columns:
        """Columns input_ids, attention_mask and labels of a training batch."""
        encoded = self.tokenizer(
            batch["source"], max_length=self.max_source_length, truncation=self.max_source_length is not None
        )
        self._report_cuts(batch["source"], encoded["input_ids"])
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": self.targets(batch),
        }

    def targets(self, batch: dict[str, list[str]]) -> list[list[int]]:
        """Ids of the targets, the end token at last."""
        limit = self.max_target_length
        encoded = self.tokenizer(
            text_target=batch["target"], max_length=limit, truncation=limit is not None, verbose=False
        )
        return encoded["input_ids"]

    def whole(self) -> Encoder:
        """One that cuts nothing."""
        return Encoder(self.tokenizer)

    def whole_sources(self, sources: list[str]) -> list[list[int]]:
        """Ids of the sources, none cut."""
        return self.tokenizer(sources, verbose=False).input_ids

    def inputs(self, sources: list[str]) -> BatchEncoding:
        """What `generate` reads: padded ids and mask, (B, S)."""
        return self.tokenizer(
            sources,
            max_length=self.max_source_length,
            truncation=self.max_source_length is not None,
            padding=True,
            return_tensors="pt",
        )

    def output_limit(self, max_length: int) -> dict[str, Any]:
        """The options of `generate` that bound outputs, whose start token counts."""
        return {"max_length": max_length}

    def ended(self, token_ids: list[int]) -> list[int]:
        """What was decoded for a row, without what came while others of its batch went on."""
        return token_ids

    def output_start(self, input_ids: Tensor) -> int:
        """Where what was decoded begins in sequences that `generate` returned for (B, S) ids."""
        return 1

    def sequence(self, model: PreTrainedModel, input_ids: Tensor, token_ids: list[int]) -> Tensor:
        """(1, P + T) ids as `generate` returns them, of (1, S) ids and T that were decoded."""
        return torch.tensor([[model.generation_config.decoder_start_token_id, *token_ids]])

    def texts(self, token_ids: list[list[int]]) -> list[str]:
        """What was decoded."""
        return self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)

    def _report_cuts(self, sources: list[str], token_ids: list[list[int]]) -> None:
        limit = self.max_source_length
        full = [row for row, ids in enumerate(token_ids) if len(ids) == limit]
        if self.on_cut is None or limit is None or not full:
            return
        for ids in self.whole_sources([sources[row] for row in full]):
            if len(ids) > limit:
                self.on_cut()


class PromptEncoder(Encoder):
    """An Encoder of prompts, which are cut in their source alone, and answers that go on from them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *settings: Any) -> None:
        super().__init__(tokenizer, *settings)
        self.prompt = prompt

    def __call__(self, batch: dict[str, list[str]]) -> Columns:
        prompts = self.fit(batch["source"])
        columns: Columns = {"input_ids": [], "attention_mask": [], "labels": []}
        for (_, prompt_ids), answer in zip(prompts, self._answers(prompts, batch["target"]), strict=True):
            columns["input_ids"].append(prompt_ids + answer)
            columns["attention_mask"].append([1] * len(prompt_ids + answer))
            columns["labels"].append([PADDING_LABEL] * len(prompt_ids) + answer)
        return columns

    def targets(self, batch: dict[str, list[str]]) -> list[list[int]]:
        return self._answers(self.fit(batch["source"]), batch["target"])

    def _answers(self, prompts: list[tuple[str, list[int]]], targets: list[str]) -> list[list[int]]:
        """Ids of the targets after their prompts, cut but for the end token."""
        answers = self.prompt.encode_answers(self.tokenizer, [asked for asked, _ in prompts], targets)
        limit = self.max_target_length
        if limit is None:
            return answers
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in answers]

    def whole(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, self.prompt)

    def whole_sources(self, sources: list[str]) -> list[list[int]]:
        return [token_ids for _, token_ids in self._encode(sources)]

    def _encode(self, sources: list[str]) -> list[tuple[str, list[int]]]:
        asked = [self.prompt.ask(self.tokenizer, source) for source in sources]
        return list(zip(asked, self.prompt.encode(self.tokenizer, asked), strict=True))

    def fit(self, sources: list[str]) -> list[tuple[str, list[int]]]:
        """Prompts as text and ids, their sources cut at the end until the whole fits.

        Raises:
            UserError: what surrounds a source leaves no room for it.
        """
        limit, prompts = self.max_source_length, self._encode(sources)
        if limit is None:
            return prompts
        return [
            prompt if len(prompt[1]) <= limit else self._cut(source, prompt[1], limit)
            for source, prompt in zip(sources, prompts, strict=True)
        ]

    def _cut(self, source: str, token_ids: list[int], limit: int) -> tuple[str, list[int]]:
        if self.on_cut is not None:
            self.on_cut()
        asked = ""
        while len(token_ids) > limit:
            own = len(self.tokenizer(source, add_special_tokens=False, verbose=False).input_ids)
            room = own - (len(token_ids) - limit)
            if room < 1:
                raise UserError(
                    f"--max_source_length {limit} leaves no room for a source in its prompt, which takes "
                    f"{len(token_ids) - own} tokens: raise it, or shorten --prompt_template or --num_shots."
                )
            shorter = split_text(source, self.tokenizer, room, 0)[0]
            source = shorter if len(shorter) < len(source) else source[:-1]
            ((asked, token_ids),) = self._encode([source])
        return asked, token_ids

    def inputs(self, sources: list[str]) -> BatchEncoding:
        token_ids = [prompt_ids for _, prompt_ids in self.fit(sources)]
        return self.tokenizer.pad({"input_ids": token_ids}, padding=True, return_tensors="pt")

    def output_limit(self, max_length: int) -> dict[str, Any]:
        limit = {"max_new_tokens": max_length}
        if not self.stops():
            return limit
        return limit | {"stop_strings": self.prompt.stop, "tokenizer": self.tokenizer}

    def ended(self, token_ids: list[int]) -> list[int]:
        """Up to the token that completes the prompt's stop."""
        if not self.stops() or self._answer_length(token_ids) is None:
            return token_ids
        lengths = range(1, len(token_ids))
        shortest = bisect.bisect_left(
            lengths, True, key=lambda length: self._answer_length(token_ids[:length]) is not None
        )
        return token_ids[: shortest + 1]

    def _answer_length(self, token_ids: list[int]) -> int | None:
        return self.prompt.answer_length(super().texts([token_ids])[0])

    def stops(self) -> bool:
        """Whether the prompt has a stop that outputs can hold: some vocabularies have no line breaks."""
        stop = self.prompt.stop
        if stop is None:
            return False
        token_ids = self.tokenizer(f"a{stop}a", add_special_tokens=False).input_ids
        return stop in super().texts([token_ids])[0]

    def output_start(self, input_ids: Tensor) -> int:
        return input_ids.shape[1]

    def sequence(self, model: PreTrainedModel, input_ids: Tensor, token_ids: list[int]) -> Tensor:
        return torch.cat([input_ids, torch.tensor([token_ids], device=input_ids.device)], dim=1)

    def texts(self, token_ids: list[list[int]]) -> list[str]:
        texts = super().texts(token_ids)
        if self.stops():
            texts = [text[: self.prompt.answer_length(text)] for text in texts]
        return [text.lstrip() for text in texts]  # a blank parts them from their prompt


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | None = None,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    on_cut: Callable[[], None] | None = None,
) -> Encoder:
    """Without a prompt, sources are an encoder's."""
    settings = (max_source_length, max_target_length, on_cut)
    return Encoder(tokenizer, *settings) if prompt is None else PromptEncoder(tokenizer, prompt, *settings)


def encoder_for(
    loaded: LoadedModel, max_source_length: int | None = None, max_target_length: int | None = None
) -> Encoder:
    """That of a model prepared for a task."""
    return make_encoder(loaded.tokenizer, loaded.prompt, max_source_length, max_target_length)
