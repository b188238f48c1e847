"""An output as it grows: tokens with their depths, drafts and those taken back, and figures so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from os.path import commonprefix

from nltk.metrics.distance import edit_distance
from transformers import PreTrainedTokenizerBase

from util.demo.events import Chosen, Confirmed, Ended, Event, TakenBack

UNFINISHED = "\ufffd"  # what a part of a character decodes to


class State(Enum):
    STANDS = "stands"
    DRAFT = "draft"
    TAKEN_BACK = "taken back"


@dataclass
class ShownToken:
    token: int
    layer: int
    confidence: float | None
    state: State
    text: str = ""  # what it adds to the text; none, if it only begins a character or is a special token
    special: bool = False
    full_depth: str | None = None  # what the last layer says at its place, once that is known
    agrees: bool | None = None  # whether that is the token itself


@dataclass
class Transcript:
    """Of one output of a model with `num_layers` layers."""

    tokenizer: PreTrainedTokenizerBase
    num_layers: int
    tokens: list[ShownToken] = field(default_factory=list)  # those taken back among them, where they stood
    seconds: float = 0.0
    layer_tokens: int = 0
    ended: bool = False

    @property
    def kept(self) -> list[ShownToken]:
        """Tokens that have not been taken back, drafts included."""
        return [token for token in self.tokens if token.state is not State.TAKEN_BACK]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.kept)

    @property
    def taken_back(self) -> int:
        return len(self.tokens) - len(self.kept)

    @property
    def tokens_per_second(self) -> float | None:
        """None before any time has passed."""
        return len(self.kept) / self.seconds if self.seconds else None

    @property
    def average_layers(self) -> float | None:
        """Layers run per token, those on tokens taken back included."""
        return self.layer_tokens / len(self.kept) if self.kept else None

    @property
    def exit_share(self) -> float | None:
        """Share of tokens that stopped before the last layer."""
        early = sum(token.layer < self.num_layers for token in self.kept)
        return early / len(self.kept) if self.kept else None

    def apply(self, event: Event) -> None:
        if isinstance(event, TakenBack):
            for token in self.kept[-event.count :]:
                token.state = State.TAKEN_BACK
            return
        self.seconds, self.layer_tokens = event.seconds, event.layer_tokens
        if isinstance(event, Chosen):
            self._add(event)
        elif isinstance(event, Confirmed):
            next(token for token in self.kept if token.state is State.DRAFT).state = State.STANDS
        elif isinstance(event, Ended):
            self.ended = True
            if self.kept:
                self._spell(self.kept[-1], final=True)

    def _add(self, event: Chosen) -> None:
        state = State.DRAFT if event.draft else State.STANDS
        added = ShownToken(event.token, event.layer, event.confidence, state)
        added.special = event.token in self.tokenizer.all_special_ids
        self.tokens.append(added)
        self._spell(added)

    def _spell(self, added: ShownToken, *, final: bool = False) -> None:
        """Give the newest token what it adds to the text before it, part of a character only at the end."""
        before = self.text
        ids = [token.token for token in self.kept]
        whole = self.tokenizer.decode(ids, skip_special_tokens=True)
        if whole.endswith(UNFINISHED) and not final:
            return
        common = commonprefix([before, whole])  # noqa: RUF071  # characters are what is meant
        surplus = len(before) - len(common)  # some tokenizers drop a blank before a full stop
        for token in reversed(self.kept[:-1]):
            cut = min(surplus, len(token.text))
            token.text, surplus = token.text[: len(token.text) - cut], surplus - cut
        added.text += whole[len(common) :]


def differing_words(one: str, other: str) -> int:
    """Least number of words to replace, insert or delete that makes one text the other."""
    return edit_distance(one.split(), other.split())
