"""Which token a row of logits becomes, as `generate` would choose it, and who is shown it when.

Policies may take tokens back. Processors and criteria may keep state (a watermark's context, a count of
calls); they are then copied before each token that may be taken back, so that they go on as if it had never
been. State outside of their objects (globals, closures) cannot be seen and is not taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from models.errors import UserError
from models.exit_policy import Drafts
from models.generate_contract import Output, OutputObject
from models.host import argmax

STATELESS = (  # of transformers: nothing that these keep changes what they say
    "MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor TemperatureLogitsWarper "
    "RepetitionPenaltyLogitsProcessor EncoderRepetitionPenaltyLogitsProcessor TopPLogitsWarper "
    "TopKLogitsWarper TopHLogitsWarper MinPLogitsWarper TypicalLogitsWarper EpsilonLogitsWarper "
    "EtaLogitsWarper NoRepeatNGramLogitsProcessor EncoderNoRepeatNGramLogitsProcessor "
    "SequenceBiasLogitsProcessor NoBadWordsLogitsProcessor ForcedBOSTokenLogitsProcessor "
    "ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor ExponentialDecayLengthPenalty "
    "LogitNormalization SuppressTokensAtBeginLogitsProcessor SuppressTokensLogitsProcessor "
    "WatermarkLogitsProcessor MaxLengthCriteria MaxTimeCriteria StopStringCriteria EosTokenCriteria"
)


@dataclass
class BeforeToken:
    """What is restored when a token is taken back."""

    processor: LogitsProcessorList
    criteria: StoppingCriteriaList
    scores: Tensor | None = None  # (B, V) that the token was sampled from


@dataclass
class Verdict:
    """On n drafts: how many all rows accept, and which rows go on after those."""

    accepted: int
    active: list[bool]
    scores: Tensor | None = None  # (B, V) processed, of the token instead of the first rejected


class TokenChooser:
    """Picks tokens from logits as `generate` would, and tells which rows go on."""

    def __init__(
        self, processor: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        self.processor = processor
        self.criteria = criteria
        self.config = config
        self.pad_token = config._pad_token_tensor
        returns = config.return_dict_in_generate
        self.logits: list[Tensor] | None = [] if returns and config.output_logits else None
        self.scores: list[Tensor] | None = [] if returns and config.output_scores else None
        self.provisional: list[BeforeToken] = []  # one for each newest token that may be taken back
        self.ends = host_criteria(criteria)
        self.residual: Tensor | None = None  # (B, V) probabilities that replace those of rejected drafts

    @property
    def takes_the_most_probable(self) -> bool:
        """Whether nobody but the model has a say in a token, nor wants its scores."""
        keeps = self.logits is not None or self.scores is not None
        return not (self.processor or self.config.do_sample or keeps)

    def choose(
        self, input_ids: Tensor, logits: Tensor, active: list[bool], *, provisional: bool = False
    ) -> tuple[Tensor, list[bool]]:
        """(B, T) ids and (B, V) logits -> (B, T + 1) ids and which rows are unfinished."""
        if provisional:
            self._begin_provisional()
        else:
            self.provisional = []
        return self.pick(input_ids, logits, self._process(input_ids, logits), active)

    def pick(
        self, input_ids: Tensor, logits: Tensor, scores: Tensor, active: list[bool]
    ) -> tuple[Tensor, list[bool]]:
        """`choose` from scores that processors have seen already."""
        self._keep(logits, scores)
        if self.config.do_sample:
            probabilities = scores.softmax(-1) if self.residual is None else self.residual
            tokens = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
            self.residual = None
            if self.provisional:
                self.provisional[-1].scores = scores
        else:
            tokens = argmax(scores).unsqueeze(-1)
        if not all(active):
            running = torch.tensor(active, device=tokens.device)[:, None]
            tokens = torch.where(running, tokens, self.pad_token)
        input_ids = torch.cat([input_ids, tokens], dim=1)
        return input_ids, self._unfinished(input_ids, active)

    def propose(
        self, input_ids: Tensor, tokens: Tensor, active: list[bool], vocabulary: int
    ) -> Tensor | None:
        """Append (B,) tokens that no logits chose, provisionally: (B, T + 1) ids. None where they would end a
        row: only a model says so."""
        self._begin_provisional()
        if self.config.do_sample or self.scores is not None or self.logits is not None:
            certain = torch.full((len(tokens), vocabulary), -torch.inf, device=tokens.device)
            certain.scatter_(1, tokens[:, None], 0.0)
            self.provisional[-1].scores = certain if self.config.do_sample else None
            self._keep(certain, certain)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if self._unfinished(input_ids, active) == active:
            return input_ids
        self.take_back(input_ids, 1)
        return None

    def take_back(self, input_ids: Tensor, count: int) -> Tensor:
        """Forget the newest `count` tokens, and that processors and criteria saw them."""
        if self.provisional:  # none are left after a verdict, which has restored them itself
            before = self.provisional[-count]
            self.processor, self.criteria = before.processor, before.criteria
            del self.provisional[-count:]
        for kept in (self.logits, self.scores):
            if kept is not None:
                del kept[-count:]
        return input_ids[:, :-count]

    def verify(self, input_ids: Tensor, drafts: Drafts, active: list[bool]) -> Verdict:
        """Judge the newest n tokens of (B, T) ids, all of them provisional, by the deep model's logits.

        Accepted are the leading drafts that every unfinished row accepts: those that full depth would have
        chosen, or, when sampling, those that speculative sampling lets pass.
        """
        count = len(drafts.running)
        start = input_ids.shape[1] - count
        proposed, self.provisional = self.provisional[-count:], []
        # Step 1. Go back to where the first draft was chosen: processors and criteria have seen none of them.
        self.processor, self.criteria = proposed[0].processor, proposed[0].criteria
        # Step 2. Where nothing but the deep model has a say, accept all drafts up to its first other choice.
        if self._judges_by_argmax():
            accepted = count_agreeing(input_ids[:, start:], drafts)
            return Verdict(accepted, [*drafts.running, active][accepted])
        recheck = not is_stateless(self.criteria)
        for index, running in enumerate(drafts.running):
            # Step 3. Else, draft by draft, score as full depth would have; the first that is rejected is
            # replaced by a token from these scores.
            prefix, tokens = input_ids[:, : start + index], input_ids[:, start + index]
            logits = drafts.logits[:, index]
            scores = self._process(prefix, logits)
            if not self._accepts(tokens, proposed[index].scores, scores, running):
                return Verdict(index, running, scores)
            self._keep(logits, scores, at=index - count)
            # Step 4. Criteria that keep state or read scores may see another end than the drafts did.
            after = [*drafts.running, active][index + 1]
            if recheck:
                rows = self._unfinished(input_ids[:, : start + index + 1], running, later=count - index - 1)
                if rows != after:
                    return Verdict(index + 1, rows)
        return Verdict(count, active)

    def output(self, kind: type[OutputObject], sequences: Tensor, cache: Cache | None) -> Output:
        """What `generate` returns, where wanted an object of a `kind`; copies, as tensors made in inference
        mode are of limited use outside."""
        if not self.config.return_dict_in_generate:
            return sequences.clone()
        scores, logits = (tuple(map(torch.clone, kept or ())) or None for kept in (self.scores, self.logits))
        return kind(sequences=sequences.clone(), scores=scores, logits=logits, cache=cache)

    def _begin_provisional(self) -> None:
        """Note where the next token can be taken back to; copies go on, so that the caller's own objects are
        what is restored."""
        self.provisional.append(BeforeToken(self.processor, self.criteria))
        self.processor, self.criteria = snapshot(self.processor), snapshot(self.criteria)

    def _judges_by_argmax(self) -> bool:
        """Whether drafts can be judged all at once, by the deep model's most probable tokens."""
        return self.takes_the_most_probable and is_stateless(self.criteria)

    def _process(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        if not self.processor and self.logits is None:
            return logits.float()
        return self.processor(input_ids, logits.to(torch.float32, copy=True))  # they may write into it

    def _unfinished(self, input_ids: Tensor, active: list[bool], later: int = 0) -> list[bool]:
        """Which of the active rows no criterion stops; the step's one wait besides the exit test. The newest
        `later` scores are of tokens that are not among (B, T) ids."""
        if self.ends is not None:
            return self.ends.unfinished(input_ids, active)
        scores = None if self.scores is None else tuple(self.scores[: len(self.scores) - later])
        stopped = self.criteria(input_ids, scores).tolist()
        return [row and not stop for row, stop in zip(active, stopped, strict=True)]

    def _accepts(self, tokens: Tensor, proposed: Tensor | None, scores: Tensor, running: list[bool]) -> bool:
        finished = ~torch.tensor(running, device=tokens.device)
        if proposed is not None:  # sampled from
            return self._accepts_sampled(tokens, proposed.softmax(-1), scores.softmax(-1), finished)
        return bool(((argmax(scores) == tokens) | finished).all())

    def _accepts_sampled(self, tokens: Tensor, draft: Tensor, target: Tensor, finished: Tensor) -> bool:
        """Speculative sampling (Leviathan et al., 2023, algorithm 1): whether all rows accept their tokens
        (B,) of `draft` (B, V) under `target` (B, V); if not, `residual` holds what to sample from instead."""
        # Step 1. Accept each row's token with probability min(1, target / draft).
        chosen = tokens[:, None]  # (B, 1)
        luck = torch.rand_like(chosen, dtype=target.dtype)
        accepted = (luck * draft.gather(1, chosen) <= target.gather(1, chosen)) | finished[:, None]
        if accepted.all():
            return True
        # Step 2. A rejected one is replaced by a sample from max(0, target - draft), normalized; an accepted
        # one by itself, as rows go on together.
        residual = (target - draft).clamp(min=0)
        self.residual = torch.where(accepted, torch.zeros_like(target).scatter_(1, chosen, 1.0), residual)
        self.residual /= self.residual.sum(-1, keepdim=True)
        return False

    def _keep(self, logits: Tensor, scores: Tensor, at: int | None = None) -> None:
        """Add what the output returns of a token, or replace what it has of the one `at` a place."""
        for kept, new in ((self.logits, logits.to(torch.float32)), (self.scores, scores)):
            if kept is None:
                continue
            if at is None:
                kept.append(new)
            else:
                kept[at] = new


@dataclass
class HostCriteria:
    """The two criteria of nearly every call, with one wait for the device instead of a kernel for each."""

    max_length: int | None
    end_tokens: frozenset[int]

    def unfinished(self, input_ids: Tensor, active: list[bool]) -> list[bool]:
        tokens, length = input_ids[:, -1].tolist(), input_ids.shape[1]
        return [row and self.go_on(token, length) for row, token in zip(active, tokens, strict=True)]

    def go_on(self, token: int, length: int) -> bool:
        """Whether a sequence of that `length` is unfinished whose newest token this is."""
        return token not in self.end_tokens and (self.max_length is None or length < self.max_length)


def host_criteria(criteria: StoppingCriteriaList) -> HostCriteria | None:
    """Those of the list, if it has no others."""
    max_length, end_tokens = None, frozenset[int]()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria and max_length is None:
            max_length = criterion.max_length
        elif type(criterion) is EosTokenCriteria:
            end_tokens |= set(criterion.eos_token_id.tolist())
        else:
            return None
    return HostCriteria(max_length, end_tokens)


def count_agreeing(tokens: Tensor, drafts: Drafts) -> int:
    """How many leading columns of (B, n) drafts are the deep logits' greedy choice, finished rows aside."""
    differs = (argmax(drafts.logits.float()) != tokens).tolist()
    for index, running in enumerate(drafts.running):
        if any(row[index] and active for row, active in zip(differs, running, strict=True)):
            return index
    return len(drafts.running)


def is_stateless(items: Iterable[object]) -> bool:
    return not any(may_keep_state(type(item).__module__, type(item).__name__) for item in items)


@cache
def may_keep_state(module: str, name: str) -> bool:
    return not module.startswith("transformers.") or name not in STATELESS.split()


def snapshot(items: LogitsProcessorList | StoppingCriteriaList) -> LogitsProcessorList | StoppingCriteriaList:
    """A copy of the list in which whatever may keep state is copied; models and tokenizers are shared."""
    if is_stateless(items):
        return items
    return type(items)(item if is_stateless([item]) else copy_item(item) for item in items)


def copy_item(item: Any) -> Any:
    shared = (nn.Module, PreTrainedTokenizerBase)
    own = getattr(item, "__dict__", {})  # which a class with __slots__ lacks
    memo = {id(value): value for value in own.values() if isinstance(value, shared)}
    try:
        return copy.deepcopy(item, memo)
    except (TypeError, NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{type(item).__name__} cannot be copied ({error}): lossless decoding, lookups and rollback take "
            "tokens back and need to restore its state. Decode without them, or give it a __deepcopy__."
        ) from error


class DraftStreamer(Protocol):
    """A streamer that is also shown tokens which may still be taken back. `put` confirms them, oldest first,
    or brings a token that never was a draft."""

    def put_draft(self, value: Tensor) -> None:
        """Take the newest token of each row, (B,)."""

    def take_back(self, count: int) -> None:
        """Forget the newest `count` drafts."""


class TokenStream:
    """Feeds a streamer; a policy that retracts is shown only up to its newest deep pass, unless the streamer
    is a `DraftStreamer`."""

    def __init__(self, streamer: BaseStreamer | None, retracts: bool, shown: int) -> None:
        self.streamer = streamer
        self.drafting: DraftStreamer | None = streamer if hasattr(streamer, "put_draft") else None
        self.retracts = retracts
        self.shown = shown  # tokens of a row that the streamer has, without drafts

    def show(self, input_ids: Tensor, *, final: bool) -> None:
        """Take (B, T) ids: `final` ones, or one draft more than the last time."""
        if final or not self.retracts:
            self._flush(input_ids)
        elif self.drafting is not None:
            self.drafting.put_draft(input_ids[:, -1].cpu())

    def take_back(self, count: int) -> None:
        if self.drafting is not None:
            self.drafting.take_back(count)

    def end(self, input_ids: Tensor) -> None:
        self._flush(input_ids)
        if self.streamer is not None:
            self.streamer.end()

    def _flush(self, input_ids: Tensor) -> None:
        if self.streamer is None:
            return
        for position in range(self.shown, input_ids.shape[1]):
            self.streamer.put(input_ids[:, position].cpu())
        self.shown = input_ids.shape[1]
