"""What decoding did: how deep each token went, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.exit_policy import StepResult


@dataclass
class DecodeStats:
    """What one `generate` call did. A step decodes one token of each unfinished row, and what a lookup
    proposed before it."""

    num_layers: int = 0
    batch_size: int = 0
    columns: list[list[int | None]] = field(default_factory=list)  # [token][row], None: row was finished
    looked_up: list[bool] = field(default_factory=list)  # [token] whether a lookup proposed it
    confidences: list[list[list[float]]] = field(default_factory=list)  # [step][test: layer or token][row]
    calibration: list[tuple[float, bool]] = field(default_factory=list)  # (shallow confidence, right)
    steps: int = 0
    deep_passes: int = 0
    rollbacks: int = 0
    retracted_tokens: int = 0
    proposed_tokens: int = 0  # by a lookup, those included that were taken back
    layer_calls: int = 0  # layers executed one after the other: what latency follows
    layer_tokens: int = 0  # layers executed on each token, catch-up included: what arithmetic follows

    @property
    def exit_layers(self) -> list[list[int]]:
        """Layer after which each token stopped, counted from 1: [row][token]."""
        rows = range(self.batch_size)
        return [[layer for column in self.columns if (layer := column[row]) is not None] for row in rows]

    @property
    def tokens(self) -> int:
        """Generated tokens of all rows, without those taken back."""
        return sum(layer is not None for column in self.columns for layer in column)

    @property
    def accepted_proposals(self) -> int:
        """Tokens of the output that a lookup proposed."""
        return sum(self.looked_up)

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
        """Share of tokens that stopped before the last layer; of proposals those that it was sure of."""
        layers = [layer for column in self.columns for layer in column if layer is not None]
        early = sum(layer < self.num_layers for layer in layers)
        return early / max(self.tokens, 1)

    def reset(self, num_layers: int, batch_size: int) -> None:
        """Forget an earlier generation."""
        vars(self).update(vars(DecodeStats(num_layers, batch_size)))

    def take_back(self, count: int) -> None:
        """Forget the newest `count` tokens, but not the work they cost."""
        retracted, self.columns = self.columns[-count:], self.columns[:-count]
        del self.looked_up[-count:]
        self.rollbacks += 1
        self.retracted_tokens += sum(layer is not None for column in retracted for layer in column)

    def record_token(self, exit_layers: list[int], active: list[bool], proposed: bool = False) -> None:
        """Add a token that was chosen for the active rows, or that a lookup proposed."""
        self.looked_up.append(proposed)
        self.proposed_tokens += proposed
        self.columns.append(
            [layer if running else None for layer, running in zip(exit_layers, active, strict=True)]
        )

    def record_cost(self, result: StepResult, rows: int) -> None:
        """Add the work of a step for so many rows."""
        self.calibration += result.calibration
        self.deep_passes += result.deep_pass
        self.layer_calls += result.layer_calls
        of_rows = result.layer_tokens_of_rows
        self.layer_tokens += result.layer_tokens * rows if of_rows is None else of_rows
