"""What a long prompt costs each token after it: milliseconds a token after a short and after a long one.

    python scripts/benchmark_prompt_length.py --long 1000

The prompt's own pass is not counted. Prompts are random tokens, and a seeded coin decides which tokens FREE
lets exit, so that both lengths run the same layers.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.generate_options import greedy_options
from util.prompt_length_arguments import PromptLengthArguments

if __name__ == "__main__":
    answer_help((PromptLengthArguments,), __doc__)  # before torch is imported

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from models.backends import prepare
from models.errors import UserError
from models.exit_policy import ExitPolicy, FullDepth
from models.free import Free
from models.loading import LoadedModel, load_model
from scripts.benchmarking.contestants import Coin
from util.backend import limit_threads
from util.console import command
from util.flags import parse_groups
from util.methods import BASELINE, FREE
from util.policies import require_exits
from util.progress import track
from util.script_arguments import split_label
from util.tables import comparison_table, print_report
from util.wheels import SMOLLM2, fetch

COLUMNS = {"name": "contestant", "short": "ms/token, short", "long": "ms/token, long", "ratio": "long/short"}


class Clock(BaseStreamer):
    """When each token came, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def milliseconds(self) -> float:
        """A token, from the first new one to the last."""
        first, *_, last = self.times[1:]
        return (last - first) / (len(self.times) - 2) * 1000


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((PromptLengthArguments,), __doc__, argv)
        limit_threads(flags)
        rows = measure(open_model(flags), flags)
        title = f"Prompts of {flags.short} and {flags.long} tokens"
        print_report(comparison_table(title, COLUMNS, rows))


def open_model(flags: PromptLengthArguments) -> LoadedModel:
    """
    Raises:
        UserError: a model with an encoder, or without the layer or the positions that are asked for.
    """
    name = flags.model or str(fetch(SMOLLM2))
    loaded = load_model(name)
    if loaded.model.config.is_encoder_decoder:
        raise UserError(f"--model {name} has an encoder, which reads the prompt: name a decoder-only model.")
    require_exits("shallow_exit_layer", [flags.shallow_exit_layer], loaded.view.num_layers)
    most = loaded.model.config.max_position_embeddings - flags.new_tokens
    if flags.long > most:
        raise UserError(f"--long {flags.long}: {name} has positions for {most} before --new_tokens.")
    loaded.model.generation_config.update(eos_token_id=None)  # lest outputs end early
    return loaded


def measure(loaded: LoadedModel, flags: PromptLengthArguments) -> list[dict[str, Any]]:
    """A row for each backend and method: medians over the rounds, in each of which all take turns."""
    contestants = [
        (f"{label}, {method}", fast, method)
        for label in flags.backends
        for fast in [prepare(loaded, *split_label(label))]
        for method in (BASELINE, FREE)
    ]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in contestants}
    for number in track(range(flags.rounds + 1), "Decoding", "round"):
        for name, fast, method in contestants:
            pair = [time_tokens(fast, method, length, flags) for length in (flags.short, flags.long)]
            if number > 0:  # the first one warms up
                found[name].append((pair[0], pair[1]))
    return [describe(name, pairs) for name, pairs in found.items()]


def time_tokens(loaded: LoadedModel, method: str, length: int, flags: PromptLengthArguments) -> float:
    """Milliseconds of a token after a prompt of `length` tokens."""
    coin = Coin(flags.exit_share)
    coin.restart(0)
    layer = flags.shallow_exit_layer or max(1, loaded.view.num_layers // 3)
    policy: ExitPolicy = Free(layer, coin, 0.5) if method == FREE else FullDepth()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(loaded.model.config.vocab_size, (1, length), generator=generator)
    options = greedy_options({"max_new_tokens": flags.new_tokens}) | {"exit_policy": policy}
    clock = Clock()
    loaded.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **options)
    return clock.milliseconds


def describe(name: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    short, long = map(statistics.median, zip(*pairs, strict=True))
    ratio = statistics.median(after_long / after_short for after_short, after_long in pairs)
    return {"name": name, "short": short, "long": long, "ratio": ratio}


if __name__ == "__main__":
    main()
