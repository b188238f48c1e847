"""The decoding loop, plugged into Hugging Face's own `generate`:

    stats = DecodeStats()
    model.generate(**inputs, custom_generate=early_exit_decode, exit_policy=Free(...), decode_stats=stats)

Generation config, logits processors, stopping criteria, streamers and encoder preparation stay those of
`generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from models.call import Call
from models.decode_stats import DecodeStats
from models.decoder_view import DecoderState, DecoderView
from models.errors import UserError
from models.exit_policy import ExitPolicy, FullDepth, StepResult, check_policy
from models.families import view_for
from models.generate_contract import (
    Output,
    arguments_kept_by_generate,
    length_of_mask,
    model_arguments,
    output_class,
    refuse_unsupported,
)
from models.greedy import greedy_decoding
from models.prompt_lookup import Proposer, check_text, proposer_of, vocabulary_of
from models.token_choice import TokenChooser, TokenStream


def early_exit_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    exit_policy: ExitPolicy | None = None,
    decode_stats: DecodeStats | None = None,
    decoder_view: DecoderView | None = None,
    lookup_ids: Tensor | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Output:
    """Decode greedily or by sampling, each token as deep as `exit_policy` decides.

    Args:
        input_ids: (B, P) prompt, P = 0 if embeddings are given, read as deep as steps may go.
        exit_policy: defaults to `FullDepth()`.
        decode_stats: filled with what happened.
        decoder_view: where one is kept; defaults to `view_for(model)`.
        lookup_ids: (1, S) further text for a policy's lookup: an encoder's source, which it needs.
        streamer: gets tokens that can no longer be taken back; a `token_choice.DraftStreamer` drafts, too.
        model_kwargs: what the view reads, and a `cache`, which is continued if it holds tokens. It comes back
            with those that every layer has keys/values for: after early exits, not all.

    Returns: (B, P + T) token ids, or the usual output object if `return_dict_in_generate` is set.

    Raises:
        UserError: whatever `generate` can do but this loop cannot, and a policy that does not fit the model.
    """
    kept, cache = arguments_kept_by_generate(generation_config), model_kwargs.pop("cache", None)
    refuse_unsupported(generation_config, kept)
    view, policy = decoder_view or view_for(model), checked(exit_policy)
    stats = begun_stats(decode_stats, view.num_layers, len(input_ids))
    chooser = TokenChooser(logits_processor, stopping_criteria, generation_config)
    stream = TokenStream(streamer or kept.get("streamer"), policy.retracts, input_ids.shape[1])
    with torch.inference_mode():  # cheaper than no_grad for the many small operations of a step
        policy.begin(view, len(input_ids))
        state = view.begin(cache, **model_arguments(view, model_kwargs, input_ids))
        prefill(view, state, input_ids, generation_config, policy, cache)
        call = Call(view, state, policy, chooser, stream, stats, input_ids, lookup_ids)
        sequences = (greedy_decoding(call) or Decoding(call)).run()
    delivered = view.deliver_cache(state, cache) if wants_cache(generation_config, cache) else None
    return chooser.output(output_class(model.config), sequences, delivered)


def checked(policy: ExitPolicy | None) -> ExitPolicy:
    """The policy of a call, full depth by default; UserError for what is none."""
    if policy is None:
        return FullDepth()
    check_policy(policy)
    return policy


def begun_stats(stats: DecodeStats | None, num_layers: int, rows: int) -> DecodeStats:
    """What a call fills, new ones by default, with nothing in it; UserError for what are none."""
    stats = DecodeStats() if stats is None else stats
    if not isinstance(stats, DecodeStats):
        raise UserError(f"decode_stats must be an object, DecodeStats(), got {stats!r}.")
    stats.reset(num_layers, rows)
    return stats


def wants_cache(config: GenerationConfig, cache: Cache | None) -> bool:
    """Whether the caller of `generate` asked for a cache or passed one: `generate` makes one, too."""
    given = getattr(cache, "_is_user_defined", False)
    return config.use_cache and (config.return_dict_in_generate or given)


def reads_deep(view: DecoderView, policy: ExitPolicy) -> bool:
    """Whether steps may read what layers behind the policy's exit make of the prompt."""
    adapter = view.exit_adapter
    lodges = adapter is not None and adapter.kv_layer is not None
    return lodges or not getattr(policy, "stays_shallow", False)


def prompt_ids(state: DecoderState, input_ids: Tensor) -> Tensor:
    """The prompt as ids (B, P): where embeddings are given, any, as these replace them."""
    embeds, given = state.prompt_embeds, input_ids.shape[1]
    if embeds is None:
        return input_ids
    if given not in (0, embeds.shape[1]):
        raise UserError(f"inputs_embeds has {embeds.shape[1]} tokens and input_ids {given}: give as many.")
    return input_ids.new_zeros(embeds.shape[:2])


def prefill(
    view: DecoderView,
    state: DecoderState,
    input_ids: Tensor,
    config: GenerationConfig,
    policy: ExitPolicy,
    cache: Cache | None,
) -> None:
    """Cache the keys/values of all prompt tokens (B, P) but the last, up to the policy's exit and behind it,
    and in every layer if a step may read it there, or the caller gets it.

    As in `generate`, ids that come with a cache follow those that it holds, unless a mask for as many
    positions as there are ids says that they include them.
    """
    ids, mask_length = prompt_ids(state, input_ids), length_of_mask(state.prompt_mask, config)
    cached, given = state.lengths[0], ids.shape[1]
    start = cached if mask_length == given else 0
    if mask_length not in (None, given, cached + given):
        name = "decoder_attention_mask" if view.model.config.is_encoder_decoder else "attention_mask"
        more = f", or {(len(ids), cached + given)} with what is cached" if cached else ""
        raise UserError(
            f"{name} must have the shape of the prompt, {(*ids.shape,)}{more}, got {(len(ids), mask_length)}."
        )
    if start >= given:
        raise UserError(f"The cache holds {cached} tokens: the prompt must go on from there, got {given}.")
    if given - start > 1:
        hidden = view.embed(state, ids[:, start:-1])
        cut = getattr(policy, "exit_layer", None) or view.num_layers
        hidden = view.run_layers(state, hidden, 0, cut)  # as the steps to come, which thus share their graphs
        view.read_exit(state, hidden, cut)
        deep = wants_cache(config, cache) or reads_deep(view, policy)
        if deep and cut < view.num_layers:
            view.run_layers(state, hidden, cut, view.num_layers)


class Decoding:
    """One `generate` call under way: (B, P + t) ids so far, and which rows are unfinished."""

    def __init__(self, call: Call) -> None:
        self.view = call.view
        self.state = state = call.state
        self.policy = call.policy
        self.chooser = call.chooser
        self.stream = call.stream
        self.stats = call.stats
        self.input_ids = input_ids = call.input_ids
        self.active = [True] * len(input_ids)
        self.prompt_length = input_ids.shape[1]
        # The newest token of the ids is not cached yet; a cache given by the caller may hold more than them.
        self.cached_before = state.lengths[0] + 1 - input_ids.shape[1]
        self.first_step_ids = prompt_ids(state, input_ids)[:, -1:]
        self.proposer = proposer_of(call.policy)
        check_text(self.proposer, call.view, call.lookup_ids)
        self.lookup_ids = None if call.lookup_ids is None else call.lookup_ids.to(input_ids.device)  # (1, S)

    def run(self) -> Tensor:
        """Append tokens until every row has stopped: (B, P + T)."""
        while any(self.active):
            rows = sum(self.active)
            self.step()
            if not any(self.active):
                self.close(rows)
        self.stream.end(self.input_ids)
        return self.input_ids

    def step(self) -> None:
        """Decode one token of each unfinished row."""
        length, rows = self.input_ids.shape[1], sum(self.active)
        position = length - self.prompt_length
        newest = self.input_ids[:, -1:] if position else self.first_step_ids
        if self.proposer is not None and (position or self.state.prompt_embeds is None):
            self.propose(self.proposer)
            newest = torch.cat([newest, self.input_ids[:, length:]], dim=1)
        result = self.policy.step(self.view, self.state, newest, position, self.active)
        self.stats.steps += 1
        self.stats.confidences.append(result.confidences)
        self.stats.record_cost(result, rows)
        for number, layer in enumerate(result.proposed_layers, start=1):
            self.stats.record_token([layer] * len(self.active), self.active, proposed=True)
            self.stream.show(self.input_ids[:, : length + number], final=False)
        self.settle(result, closing=False)
        self.stream.show(self.input_ids, final=result.deep_pass or result.stands)

    def propose(self, proposer: Proposer) -> None:
        """Append what a lookup finds, as far as it ends no row and the model has positions for it."""
        before = [] if self.lookup_ids is None else [self.lookup_ids]
        found = proposer.propose(self.state, torch.cat([*before, self.input_ids], dim=1))
        if self.view.max_positions is not None:
            found = found[:, : max(self.view.max_positions - self.state.lengths[0] - 1, 0)]
        for tokens in found.unbind(dim=1):
            extended = self.chooser.propose(self.input_ids, tokens, self.active, vocabulary_of(self.view))
            if extended is None:
                break
            self.input_ids = extended

    def close(self, rows: int) -> None:
        """Let the policy do what is left, for the rows that ended last; a rejected draft makes them go on
        from there."""
        result = self.policy.finish(self.view, self.state)
        if result is not None:
            self.stats.record_cost(result, rows)
            self.settle(result, closing=True)
            self.stream.show(self.input_ids, final=result.deep_pass)

    def settle(self, result: StepResult, *, closing: bool) -> None:
        """Take back what the step says should go, and append the token it predicts."""
        scores = None
        # Step 1. Drafts are accepted up to the first that any row rejects.
        if result.drafts is not None:
            drafts = result.drafts
            verdict = self.chooser.verify(self.input_ids, drafts, self.active)
            self.active, scores = verdict.active, verdict.scores
            result.retract = len(drafts.running) - verdict.accepted
            if result.retract:
                result.logits = drafts.logits[:, verdict.accepted]
                result.exit_layers = drafts.layers[verdict.accepted]
        # Step 2. Rejected tokens go.
        if result.retract:
            self.take_back(result.retract)
        # Step 3. The next token, unless the sequence has ended: then its last one is not cached.
        if any(self.active) and (result.retract or not closing):
            self.append(result, scores)
        elif not any(self.active):
            self.state.truncate(self.cached_before + self.input_ids.shape[1] - 1)

    def take_back(self, count: int) -> None:
        """Forget the newest tokens, with their keys/values: inputs up to the first one's predecessor stay."""
        self.input_ids = self.chooser.take_back(self.input_ids, count)
        self.stats.take_back(count)
        self.stream.take_back(count)
        self.state.truncate(self.cached_before + self.input_ids.shape[1])

    def append(self, result: StepResult, scores: Tensor | None) -> None:
        """Choose the next token from the step's logits, or from scores that were processed already."""
        self.stats.record_token(result.exit_layers, self.active)
        ids, active = self.input_ids, self.active
        if scores is not None:
            self.input_ids, self.active = self.chooser.pick(ids, result.logits, scores, active)
        else:
            provisional = self.policy.retracts and not result.deep_pass
            self.input_ids, self.active = self.chooser.choose(
                ids, result.logits, active, provisional=provisional
            )
