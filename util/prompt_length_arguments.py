"""The flags of scripts/benchmark_prompt_length.py. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from util.flags import (
    flag,
    list_flag,
    require,
    require_known,
    require_positive,
    require_unit_interval,
)
from util.script_arguments import BENCHMARK_BACKENDS


@dataclass
class PromptLengthArguments:
    _argument_group_name = "Prompt length benchmark"

    model: str | None = flag(
        None, "Decoder-only model: hub id, folder or .gguf file (default: SmolLM2-135M-Instruct)."
    )
    backends: list[str] = list_flag(["torch", "onnx fp32", "onnx w8"], f"Of {', '.join(BENCHMARK_BACKENDS)}.")
    short: int = flag(16, "Tokens of the short prompt.")
    long: int = flag(1000, "Tokens of the long one.")
    new_tokens: int = flag(32, "Tokens decoded after each.")
    rounds: int = flag(3, "Times that all take turns.")
    shallow_exit_layer: int | None = flag(None, "Exit of FREE (default: after a third of the layers).")
    exit_share: float = flag(0.7, "Share of tokens that exit there, by a seeded coin.")
    threads: int = flag(1, "CPU threads.")

    def __post_init__(self) -> None:
        require_known("backends", self.backends, BENCHMARK_BACKENDS)
        for name in ("short", "long", "rounds", "shallow_exit_layer", "threads"):
            require_positive(name, getattr(self, name))
        require(self.short < self.long, f"--short {self.short} must be below --long {self.long}.")
        require(self.new_tokens > 1, f"--new_tokens must be at least 2, got {self.new_tokens}.")
        require_unit_interval("exit_share", self.exit_share)
