"""Decode a text with a method and at full depth, and show both as they grow.

for shown in compare(session.open(choice), request, Limits()):
    print(shown.method.text, shown.full.text)
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from transformers import BatchEncoding

from models.decode_stats import DecodeStats
from models.exit_policy import ExitPolicy, FullDepth
from models.trace import LayerTrace, trace_layers
from util.demo.events import Event, EventStreamer, Stopped
from util.demo.request import Limits, Request, encode
from util.demo.session import OpenModel
from util.demo.transcript import Transcript, differing_words
from util.generate_options import greedy_options
from util.methods import BASELINE

WARM_UP_TOKENS = 4
SECONDS_BETWEEN_PICTURES = 0.08


@dataclass
class Comparison:
    """The outputs of a request so far."""

    request: Request
    method: Transcript
    full: Transcript
    traced: bool = False  # whether it is known what the last layer says to the method's tokens

    @property
    def different_words(self) -> int | None:
        """None until both outputs have ended."""
        ended = self.method.ended and self.full.ended
        return differing_words(self.method.text, self.full.text) if ended else None

    @property
    def speedup(self) -> float | None:
        """Of the whole generation, of as many tokens; None until both have ended."""
        mine, theirs = self.method.tokens_per_second, self.full.tokens_per_second
        return mine / theirs if self.full.ended and mine and theirs else None


Told: TypeAlias = tuple[str, Event] | LayerTrace | Exception | None  # what a decoding thread says
METHOD, FULL = "method", "full"


def compare(opened: OpenModel, request: Request, limits: Limits) -> Generator[Comparison, None, None]:
    """The same object again after each event of either output, the method's first.

    Both are decoded by a thread of their own, one after the other, however slowly what is yielded is taken;
    it stops with the iterator.

    Raises:
        UserError: the request is out of bounds, or the model cannot decode so.
    """
    request.check(limits, opened.num_layers)
    inputs = encode(opened, request)
    method, full = (Transcript(opened.plain.tokenizer, opened.num_layers) for _ in range(2))
    shown = Comparison(request, method, full)
    told: queue.SimpleQueue[Told] = queue.SimpleQueue()
    left = threading.Event()
    thread = threading.Thread(target=work, args=(opened, request, inputs, told.put, left), daemon=True)
    thread.start()
    try:
        while (news := told.get()) is not None:
            if isinstance(news, Exception):
                raise news
            apply(shown, news)
            yield shown
    finally:
        left.set()
        thread.join()


def paced(steps: Iterator[Comparison], seconds_per_event: float) -> Iterator[Comparison]:
    """As many of the steps as a browser can show, the last one among them; each, and so slowly, if a time is
    given. Decoding does not wait."""
    shown, newest = -math.inf, None
    for newest in steps:
        if seconds_per_event > 0:
            yield newest
            time.sleep(seconds_per_event)
        elif time.monotonic() - shown > SECONDS_BETWEEN_PICTURES:
            yield newest
            shown = time.monotonic()
    if newest is not None:
        yield newest


def apply(shown: Comparison, news: Told) -> None:
    if isinstance(news, tuple):
        place, event = news
        (shown.method if place == METHOD else shown.full).apply(event)
    elif isinstance(news, LayerTrace):
        add_full_depth(shown.method, news)
        shown.traced = True


def add_full_depth(transcript: Transcript, trace: LayerTrace) -> None:
    """Note at each token that stands what the last layer says after those before it."""
    said = trace.tokens[0, :, -1].tolist()
    for token, last in zip(transcript.kept, said, strict=True):
        token.agrees = last == token.token
        token.full_depth = transcript.tokenizer.decode([last])


def work(
    opened: OpenModel,
    request: Request,
    inputs: BatchEncoding,
    tell: Callable[[Told], None],
    left: threading.Event,
) -> None:
    """Decode both outputs and trace the method's; at last, None or what went wrong."""
    try:
        warm_up(opened, request, inputs)
        policies: dict[str, ExitPolicy] = {METHOD: request.policy(), FULL: FullDepth()}
        outputs = {}
        for place, policy in policies.items():

            def hear(event: Event, place: str = place) -> None:
                if left.is_set():
                    raise Stopped
                tell((place, event))

            outputs[place] = decode(opened, inputs, policy, request.max_new_tokens, hear)
        tell(trace_layers(opened.plain.model, **inputs, sequences=outputs[METHOD]))
        tell(None)
    except Exception as error:  # raised again by whoever waits; after `Stopped`, nobody does
        tell(error)


def warm_up(opened: OpenModel, request: Request, inputs: BatchEncoding) -> None:
    """Decode a few tokens that do not count, so that what is made at first use slows down no output."""
    policies = {(request.method, request.shallow_layer): request.policy(), (BASELINE, 0): FullDepth()}
    for name, policy in policies.items():
        if name not in opened.warm:
            decode(opened, inputs, policy, min(WARM_UP_TOKENS, request.max_new_tokens), lambda event: None)
            opened.warm.add(name)


def decode(
    opened: OpenModel,
    inputs: BatchEncoding,
    policy: ExitPolicy,
    max_new_tokens: int,
    tell: Callable[[Event], None],
) -> Tensor:
    """(1, S) ids -> (1, P + T) ids, greedily."""
    stats = DecodeStats()
    options = greedy_options({"max_new_tokens": max_new_tokens})
    streamer = EventStreamer(stats, tell)
    output = opened.fast.generate(
        **inputs, **options, exit_policy=policy, decode_stats=stats, streamer=streamer
    )
    assert isinstance(output, Tensor)
    return output
