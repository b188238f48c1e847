"""The flags of scripts/demo.py. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from util.flags import flag, list_flag, require, require_positive

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HIGHEST_PORT = 65535


@dataclass
class DemoArguments:
    _argument_group_name = "Demo"

    checkpoints: list[str] = list_flag(
        [], "Folders, hub ids or .gguf files to choose from, besides those in checkpoints/."
    )
    any_checkpoint: bool = flag(
        False, "Let visitors name any folder or hub id, as they may where --host is this machine alone."
    )
    host: str = flag(LOOPBACK[0], "Address to listen on; 0.0.0.0 lets the whole network in.")
    port: int = flag(7860, "Port to listen on.")
    threads: int | None = flag(None, "CPU threads of a request (default: PyTorch's choice).")
    requests_at_once: int = flag(
        1, "Requests decoded at the same time; others wait. Speeds shown mean little with more than one."
    )
    max_characters: int = flag(2000, "Longest text that is decoded.")
    max_new_tokens: int = flag(256, "Most tokens that a visitor may ask for.")
    models_kept: int = flag(3, "Models kept in memory; the one unused for longest goes first.")

    def __post_init__(self) -> None:
        for name in ("threads", "requests_at_once", "max_characters", "models_kept"):
            require_positive(name, getattr(self, name))
        require(self.max_new_tokens > 1, f"--max_new_tokens must be at least 2, got {self.max_new_tokens}.")
        require(1 <= self.port <= HIGHEST_PORT, f"--port must lie in 1..{HIGHEST_PORT}, got {self.port}.")

    @property
    def takes_any_checkpoint(self) -> bool:
        return self.any_checkpoint or self.host in LOOPBACK
