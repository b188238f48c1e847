"""The decoding loop, plugged into Hugging Face's own `generate`:

    stats = DecodeStats()
    model.generate(**inputs, custom_generate=early_exit_decode, exit_policy=Free(...), decode_stats=stats)

Generation config, logits processors, stopping criteria and encoder preparation stay those of `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateEncoderDecoderOutput

from models.decoder_view import CACHE_KEYWORD, DecoderState, DecoderView, view_for
from models.errors import UserError
from models.exit_policy import Drafts, ExitPolicy, FullDepth, StepResult


@dataclass
class DecodeStats:
    """What one `generate` call did. A step decodes one token of each unfinished row."""

    num_layers: int = 0
    batch_size: int = 0
    columns: list[list[int | None]] = field(default_factory=list)  # [token][row], None: row was finished
    confidences: list[list[list[float]]] = field(default_factory=list)  # [step][test][row]
    calibration: list[tuple[float, bool]] = field(default_factory=list)  # (shallow confidence, right)
    steps: int = 0
    deep_passes: int = 0
    rollbacks: int = 0
    retracted_tokens: int = 0
    layer_calls: int = 0  # layers executed one after the other: what latency follows
    layer_tokens: int = 0  # layers executed on each token, catch-up included: what arithmetic follows

    @property
    def exit_layers(self) -> list[list[int]]:
        """Layer after which each token stopped, counted from 1: [row][token]."""
        rows = range(self.batch_size)
        return [[column[row] for column in self.columns if column[row] is not None] for row in rows]

    @property
    def tokens(self) -> int:
        """Generated tokens of all rows, without those taken back."""
        return sum(layer is not None for column in self.columns for layer in column)

    @property
    def average_layers(self) -> float:
        """Decoder layers run per generated token, catch-up included."""
        return self.layer_tokens / max(self.tokens, 1)

    @property
    def ideal_speedup(self) -> float:
        """Speed-up over full depth if a layer call cost the same for any number of tokens, and all else
        nothing."""
        return self.num_layers * len(self.columns) / max(self.layer_calls, 1)

    @property
    def exit_share(self) -> float:
        """Share of tokens that stopped before the last layer."""
        layers = [layer for column in self.columns for layer in column if layer is not None]
        early = sum(layer < self.num_layers for layer in layers)
        return early / max(self.tokens, 1)

    def reset(self, num_layers: int, batch_size: int) -> None:
        """Forget an earlier generation."""
        self.__init__(num_layers, batch_size)

    def record(self, result: StepResult, active: list[bool]) -> None:
        """Add one step, taken for the active rows."""
        self.steps += 1
        kept = len(self.columns) - result.retract
        retracted, self.columns = self.columns[kept:], self.columns[:kept]
        layers = [self.num_layers] * len(active) if result.retract else result.exit_layers
        self.columns.append(
            [layer if running else None for layer, running in zip(layers, active, strict=True)]
        )
        self.confidences.append(result.confidences)
        self.rollbacks += result.retract > 0
        self.retracted_tokens += sum(layer is not None for column in retracted for layer in column)
        self.record_cost(result, sum(active))

    def record_cost(self, result: StepResult, rows: int) -> None:
        """Add the work of a step for some rows."""
        self.calibration += result.calibration
        self.deep_passes += result.deep_pass
        self.layer_calls += result.layer_calls
        self.layer_tokens += result.layer_tokens * rows


def early_exit_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    exit_policy: ExitPolicy | None = None,
    decode_stats: DecodeStats | None = None,
    token_streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Tensor | GenerateEncoderDecoderOutput:
    """Decode greedily or by sampling, each token as deep as `exit_policy` decides.

    Args:
        input_ids: (B, P) start tokens; all but the last run at full depth.
        exit_policy: defaults to `FullDepth()`.
        decode_stats: filled with what happened.
        token_streamer: gets each token once it can no longer be taken back. (`generate` keeps its own
            `streamer` argument from custom loops, hence the name.)

    Returns:
        (B, P + T) token ids, or the usual output object if `return_dict_in_generate` is set.

    Raises:
        UserError: beam search, or a policy whose layers the model does not have.
    """
    if generation_config.num_beams > 1:
        raise UserError("early_exit_decode decodes one beam: set num_beams=1.")
    view = view_for(model)
    policy = exit_policy or FullDepth()
    stats = decode_stats if decode_stats is not None else DecodeStats()
    stats.reset(view.num_layers, len(input_ids))
    chooser = TokenChooser(logits_processor, stopping_criteria, generation_config, policy.retracts)
    stream = TokenStream(token_streamer, policy.retracts, input_ids.shape[1])
    with torch.inference_mode():  # cheaper than no_grad for the many small operations of a step
        policy.begin(view, len(input_ids))
        state = view.begin(model_kwargs.pop(CACHE_KEYWORD, None), **model_kwargs)
        prefill(view, state, input_ids[:, :-1])
        input_ids = decode_tokens(view, state, policy, input_ids, chooser, stream, stats)
    return chooser.output(input_ids)


def decode_tokens(
    view: DecoderView,
    state: DecoderState,
    policy: ExitPolicy,
    input_ids: Tensor,
    chooser: TokenChooser,
    stream: TokenStream,
    stats: DecodeStats,
) -> Tensor:
    """Append tokens to (B, P) ids until every row has stopped: (B, P + T)."""
    prompt_length, active = input_ids.shape[1], [True] * len(input_ids)
    while any(active):
        position = input_ids.shape[1] - prompt_length
        result = policy.step(view, state, view.embed(state, input_ids[:, -1:]), position, active)
        active = verify_drafts(view, state, input_ids, chooser, result, active)
        input_ids, active = take(input_ids, result, active, chooser, stats)
        stream.show(input_ids, result.deep_pass)
        if not any(active):
            input_ids, active = finish(view, state, policy, input_ids, chooser, stats)
    stream.end(input_ids)
    return input_ids


def take(
    input_ids: Tensor, result: StepResult, active: list[bool], chooser: TokenChooser, stats: DecodeStats
) -> tuple[Tensor, list[bool]]:
    """Take back what the step retracts and append the token it predicts."""
    if result.retract:
        input_ids = chooser.retract(input_ids, result.retract)
    stats.record(result, active)
    return chooser.append(input_ids, result.logits, active)


def finish(
    view: DecoderView,
    state: DecoderState,
    policy: ExitPolicy,
    input_ids: Tensor,
    chooser: TokenChooser,
    stats: DecodeStats,
) -> tuple[Tensor, list[bool]]:
    """Let the policy do what is left; a rejected draft makes the sequence go on from there."""
    stopped = [False] * len(input_ids)
    result = policy.finish(view, state)
    if result is None:
        return input_ids, stopped
    active = verify_drafts(view, state, input_ids, chooser, result, stopped)
    if result.retract:
        return take(input_ids, result, active, chooser, stats)
    stats.record_cost(result, len(input_ids))
    return input_ids, stopped


def verify_drafts(
    view: DecoderView,
    state: DecoderState,
    input_ids: Tensor,
    chooser: TokenChooser,
    result: StepResult,
    active: list[bool],
) -> list[bool]:
    """Judge the newest tokens; retract the first that any row rejects and all after it, with their caches.

    Returns which rows choose the next token: after a retraction, those that were unfinished back then.
    """
    drafts = result.drafts
    if drafts is None:
        return active
    accepted, count = chooser.count_accepted(input_ids, drafts), len(drafts.running)
    if accepted == count:
        return active
    result.retract = count - accepted
    result.logits = drafts.logits[:, accepted]
    # Inputs up to the rejected token's predecessor stay cached: all tokens but the retracted ones.
    view.truncate(state, input_ids.shape[1] - result.retract)
    return drafts.running[accepted]


def prefill(view: DecoderView, state: DecoderState, token_ids: Tensor) -> None:
    """Cache the keys/values of prompt tokens (B, P - 1) in every layer."""
    if token_ids.shape[1] > 0:
        view.run_layers(state, view.embed(state, token_ids), 0, view.num_layers)


class TokenChooser:
    """Picks tokens from logits as `generate` would, and tells which rows go on."""

    def __init__(
        self,
        processor: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        keeps_drafts: bool = False,
    ) -> None:
        self.processor = processor
        self.criteria = criteria
        self.config = config
        self.pad_token = config._pad_token_tensor
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.keeps_drafts = keeps_drafts
        self.draft_scores: list[Tensor] = []  # (B, V) of tokens since the last verdict, when sampling
        self.residual: Tensor | None = None  # (B, V) probabilities that replace those of rejected drafts

    def append(self, input_ids: Tensor, logits: Tensor, active: list[bool]) -> tuple[Tensor, list[bool]]:
        """(B, T) ids and (B, V) logits -> (B, T + 1) ids and which rows are unfinished."""
        logits = logits.to(torch.float32, copy=True)  # processors may write into it
        scores = self.processor(input_ids, logits)
        self._keep(logits, scores)
        if self.config.do_sample:
            probabilities = scores.softmax(-1) if self.residual is None else self.residual
            tokens = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
            self.residual = None
            if self.keeps_drafts:
                self.draft_scores.append(scores)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        if not all(active):
            running = torch.tensor(active, device=tokens.device)[:, None]
            tokens = torch.where(running, tokens, self.pad_token)
        input_ids = torch.cat([input_ids, tokens], dim=1)
        stopped = self.criteria(input_ids, None).tolist()  # the step's one wait besides the exit test
        return input_ids, [row and not stop for row, stop in zip(active, stopped, strict=True)]

    def count_accepted(self, input_ids: Tensor, drafts: Drafts) -> int:
        """How many of the newest n tokens of (B, T) all rows' deep logits let stand."""
        count = len(drafts.running)
        if not self.processor and not self.config.do_sample:
            return count_agreeing(input_ids[:, input_ids.shape[1] - count :], drafts)
        proposed, self.draft_scores = self.draft_scores[len(self.draft_scores) - count :], []
        start = input_ids.shape[1] - count
        for index, running in enumerate(drafts.running):
            prefix, tokens = input_ids[:, : start + index], input_ids[:, start + index]
            scores = self.processor(prefix, drafts.logits[:, index].to(torch.float32, copy=True))
            finished = ~torch.tensor(running, device=tokens.device)
            if self.config.do_sample:
                accepted = self._accept(tokens, proposed[index].softmax(-1), scores.softmax(-1), finished)
            else:
                accepted = bool(((scores.argmax(-1) == tokens) | finished).all())
            if not accepted:
                return index
        return count

    def _accept(self, tokens: Tensor, draft: Tensor, target: Tensor, finished: Tensor) -> bool:
        """Accept each row's token with probability min(1, target / draft); if any is rejected, leave behind
        what to sample from instead: the residual, or the token where it was accepted (Leviathan et al.,
        2023, algorithm 1)."""
        chosen = tokens[:, None]  # (B, 1)
        luck = torch.rand_like(chosen, dtype=target.dtype)
        accepted = (luck * draft.gather(1, chosen) <= target.gather(1, chosen)) | finished[:, None]
        if accepted.all():
            return True
        residual = (target - draft).clamp(min=0)
        self.residual = torch.where(accepted, torch.zeros_like(target).scatter_(1, chosen, 1.0), residual)
        self.residual /= self.residual.sum(-1, keepdim=True)
        return False

    def retract(self, input_ids: Tensor, count: int) -> Tensor:
        """Forget the newest `count` tokens."""
        del self.logits[-count:], self.scores[-count:]
        return input_ids[:, :-count]

    def output(self, sequences: Tensor) -> Tensor | GenerateEncoderDecoderOutput:
        """What `generate` returns; copies, as tensors made in inference mode are of limited use outside."""
        if not self.config.return_dict_in_generate:
            return sequences.clone()
        scores, logits = (tuple(map(torch.clone, kept)) or None for kept in (self.scores, self.logits))
        return GenerateEncoderDecoderOutput(sequences=sequences.clone(), scores=scores, logits=logits)

    def _keep(self, logits: Tensor, scores: Tensor) -> None:
        if self.config.return_dict_in_generate and self.config.output_logits:
            self.logits.append(logits)
        if self.config.return_dict_in_generate and self.config.output_scores:
            self.scores.append(scores)


def count_agreeing(tokens: Tensor, drafts: Drafts) -> int:
    """How many leading columns of (B, n) drafts are the deep logits' greedy choice, finished rows aside."""
    differs = (drafts.logits.argmax(-1) != tokens).tolist()
    for index, running in enumerate(drafts.running):
        if any(row[index] and active for row, active in zip(differs, running, strict=True)):
            return index
    return len(drafts.running)


class TokenStream:
    """Feeds a streamer; a policy that retracts is shown only up to its newest deep pass."""

    def __init__(self, streamer: BaseStreamer | None, retracts: bool, shown: int) -> None:
        self.streamer = streamer
        self.retracts = retracts
        self.shown = shown

    def show(self, input_ids: Tensor, deep_pass: bool) -> None:
        if self.streamer is not None and (deep_pass or not self.retracts):
            self._flush(input_ids)

    def end(self, input_ids: Tensor) -> None:
        if self.streamer is not None:
            self._flush(input_ids)
            self.streamer.end()

    def _flush(self, input_ids: Tensor) -> None:
        for position in range(self.shown, input_ids.shape[1]):
            self.streamer.put(input_ids[:, position].cpu())
        self.shown = input_ids.shape[1]
