"""A streamer that prints each token as it comes, in the colour of the depth that it took."""

from __future__ import annotations

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from models.decode_stats import DecodeStats
from util.tables import depth_style

UNFINISHED = "\ufffd"  # what a part of a character decodes to


class DepthStreamer(BaseStreamer):
    """Hand it to `generate` of one row as `streamer`, and `stats` as `decode_stats`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stats: DecodeStats, console: Console) -> None:
        self.tokenizer = tokenizer
        self.stats = stats
        self.console = console
        self.tokens: list[int] | None = None  # None: the prompt has not come yet
        self.printed = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, P), then tokens (1,), of which the statistics know the layers already."""
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith(UNFINISHED):
            self.show(text)

    def end(self) -> None:
        if self.tokens:
            self.show(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        self.console.print()

    def show(self, text: str) -> None:
        """Print what is new in all the text so far, in the colour of the newest token."""
        assert self.tokens is not None
        layer = self.stats.columns[len(self.tokens) - 1][0]
        assert layer is not None  # the only row has not finished before its last token
        new, self.printed = text[len(self.printed) :], text
        style = depth_style(layer, self.stats.num_layers)
        self.console.print(new, style=style, end="", markup=False, highlight=False, soft_wrap=True)
