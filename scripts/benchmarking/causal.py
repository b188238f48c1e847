"""What competes on a decoder-only model, prompt by prompt: our methods, and Hugging Face's own ways to be
faster at the same output."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding

from models.choices import EXACT_PRECISIONS
from models.confidence import SoftmaxGap
from models.decode_stats import DecodeStats
from models.errors import UserError
from models.exit_policy import Calm, ExitPolicy, FullDepth, StaticExit
from models.free import Free
from models.json_files import read_mapping
from models.loading import LoadedModel
from models.prompt_lookup import PromptLookup
from scripts.benchmarking import llamacpp
from util.evaluation.timing_doubts import doubt_speedup
from util.generate_options import greedy_options
from util.methods import BASELINE, CALM, FREE, FREE_LOSSLESS, HF_GENERATE, STATIC, with_lookup
from util.progress import track
from util.timing import Stopwatch

WARM_UP_TOKENS = 4
PROMPT_LOOKUP_TOKENS = 10  # that Hugging Face's lookup proposes
LOOKUP_TOKENS = 6  # that ours do


@dataclass(frozen=True)
class Prompt:
    text: str  # as the user wrote it
    inputs: BatchEncoding  # of the text in the tokenizer's chat template: (1, P) ids and mask


@dataclass
class Answer:
    sequences: Tensor  # (1, P + T)
    tokens: list[int]  # (T)
    seconds: float
    stats: DecodeStats | None = None  # of our loop


@dataclass
class Contestant:
    name: str
    full: str  # the contestant that runs all layers with the same weights
    decode: Callable[[Prompt, int], Answer]  # an answer of at most so many tokens
    answers: list[Answer] = field(default_factory=list)


def our_contestants(loaded: LoadedModel, layer: int, threshold: float) -> list[Contestant]:
    """Full depth, and each method with its exit after `layer`; CALM also tests all deeper ones. Lossless
    only where the precision allows it."""
    gap = SoftmaxGap()
    policies: dict[str, ExitPolicy] = {
        BASELINE: FullDepth(),
        f"{STATIC} {layer}": StaticExit(layer),
        f"{CALM} {threshold}": Calm(gap, threshold, min_layer=layer),
        f"{FREE} {threshold}": Free(layer, gap, threshold),
    }
    if loaded.precision in EXACT_PRECISIONS:
        policies[with_lookup(BASELINE, LOOKUP_TOKENS)] = FullDepth(PromptLookup(LOOKUP_TOKENS))
        policies[f"{FREE_LOSSLESS} {threshold}"] = Free(layer, gap, threshold, lossless=True)
    return [Contestant(name, BASELINE, ours(loaded, policy)) for name, policy in policies.items()]


@dataclass
class TaughtExit:
    """A model with an exit adapter, and what it decodes with, by method."""

    fast: LoadedModel
    policies: dict[str, Free]

    @property
    def shown(self) -> Free:
        """FREE; lossless where no setting of FREE changed few enough tokens."""
        return self.policies.get(FREE) or self.policies[FREE_LOSSLESS]


def read_settings(path: Path) -> dict[str, Free]:
    """FREE and lossless as scripts/train_exit.py recommends them in a file, each also with lookups.

    Raises:
        UserError: the file is another.
    """
    rows = read_mapping(path, "--exit_adapter_path").get("recommended")
    needed = {"layer", "threshold", "lossless", "max_pending"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= {*row} for row in rows):
        raise UserError(f"--exit_adapter_path: {path} is not what scripts/train_exit.py writes.")
    policies = {}
    for row in rows:
        options = {"lossless": row["lossless"], "max_pending": row["max_pending"]}
        free = functools.partial(Free, row["layer"], SoftmaxGap(), row["threshold"], **options)
        method = FREE_LOSSLESS if row["lossless"] else FREE
        policies[method] = free()
        cap = LOOKUP_TOKENS if row["lossless"] else row["max_pending"]
        looking_up = free(lookup=PromptLookup(LOOKUP_TOKENS), max_pending=cap)
        policies[with_lookup(method, LOOKUP_TOKENS)] = looking_up
    return policies


def taught_contestants(taught: TaughtExit) -> list[Contestant]:
    """Its methods, lossless only where the precision allows it."""
    exact = taught.fast.precision in EXACT_PRECISIONS
    return [
        Contestant(f"{method}, taught exit {policy.shallow_layer}", BASELINE, ours(taught.fast, policy))
        for method, policy in taught.policies.items()
        if exact or not policy.lossless
    ]


def their_contestants(loaded: LoadedModel, layer: int) -> list[Contestant]:
    """Hugging Face's, all with the modules as they are, whatever runs our methods."""
    options: dict[str, dict[str, int]] = {
        HF_GENERATE: {},
        f"HF assistant_early_exit {layer}": {"assistant_early_exit": layer},
        "HF prompt lookup": {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS},
    }
    return [Contestant(name, HF_GENERATE, theirs(loaded, **more)) for name, more in options.items()]


def llama_cpp_contestants(
    name: str, loaded: LoadedModel, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[Contestant]:
    """llama.cpp with as many threads as torch, where it is installed and `name` is a file that it reads."""
    path = Path(name)
    if not (path.is_file() and path.suffix == ".gguf" and llamacpp.is_installed()):
        return []
    context = max(prompt.inputs["input_ids"].shape[1] for prompt in prompts) + max_new_tokens
    ends = loaded.model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else {*(ends or ())}
    generate = llamacpp.open_generator(path, ends, context, torch.get_num_threads())

    def decode(prompt: Prompt, longest: int) -> Answer:
        ids = prompt.inputs["input_ids"]  # (1, P)
        with Stopwatch(ids.device) as watch:
            tokens = generate(ids[0].tolist(), longest)
        return Answer(torch.cat([ids, ids.new_tensor([tokens])], dim=1), tokens, watch.seconds)

    return [Contestant(llamacpp.LLAMA_CPP, llamacpp.LLAMA_CPP, decode)]


def ours(loaded: LoadedModel, policy: ExitPolicy) -> Callable[[Prompt, int], Answer]:
    def decode(prompt: Prompt, max_new_tokens: int) -> Answer:
        stats = DecodeStats()
        options = greedy_options({"max_new_tokens": max_new_tokens}) | {"decode_stats": stats}
        with Stopwatch(loaded.model.device) as watch:
            sequences = loaded.generate(**prompt.inputs, **options, exit_policy=policy)
        return Answer(sequences, new_tokens(prompt, sequences), watch.seconds, stats)

    return decode


def theirs(loaded: LoadedModel, **options: int) -> Callable[[Prompt, int], Answer]:
    def decode(prompt: Prompt, max_new_tokens: int) -> Answer:
        given = greedy_options({"max_new_tokens": max_new_tokens, **options})
        with Stopwatch(loaded.model.device) as watch:
            sequences = loaded.model.generate(**prompt.inputs, **given)
        return Answer(sequences, new_tokens(prompt, sequences), watch.seconds)

    return decode


def new_tokens(prompt: Prompt, sequences: Tensor) -> list[int]:
    return sequences[0, prompt.inputs["input_ids"].shape[1] :].tolist()


def answer_in_turn(contestants: list[Contestant], prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """All contestants on one prompt before the next, each prompt starting with another one; before all, a few
    tokens of each that do not count."""
    for contestant in track(contestants, "Warming up", "contestant"):
        contestant.decode(prompts[0], WARM_UP_TOKENS)
    for number, prompt in enumerate(track(prompts, "Decoding", "prompt")):
        first = number % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            contestant.answers.append(contestant.decode(prompt, max_new_tokens))


def make_rows(contestants: list[Contestant]) -> list[dict[str, Any]]:
    """A row of figures for each: speeds are medians over prompts, all else is over all tokens."""
    by_name = {contestant.name: contestant for contestant in contestants}
    return [describe(one, by_name[one.full], by_name[HF_GENERATE]) for one in contestants]


def describe(contestant: Contestant, full: Contestant, plain: Contestant) -> dict[str, Any]:
    answers = contestant.answers
    row: dict[str, Any] = {
        "name": contestant.name,
        "tokens_per_second": statistics.median(map(speed, answers)),
        "over_full_depth": median_ratio(answers, full.answers),
        "over_hf_generate": median_ratio(answers, plain.answers),
        "equal_to_full_depth": share_of_equal(answers, full.answers),
        "equal_to_hf_generate": share_of_equal(answers, plain.answers),
    }
    stats = [answer.stats for answer in answers if answer.stats is not None]
    if stats:
        tokens = sum(one.tokens for one in stats)
        ideal = stats[0].num_layers * tokens / sum(one.layer_calls for one in stats)
        measured = row["over_full_depth"]
        row["ideal_speedup"] = ideal
        row["timing_doubt"] = doubt_speedup(measured, [measured], max(ideal, 1.0))
        row["looked_up_share"] = sum(one.accepted_proposals for one in stats) / tokens
        row["average_layers"] = sum(one.layer_tokens for one in stats) / tokens
        row["exit_share"] = sum(one.exit_share * one.tokens for one in stats) / tokens
    return row


def speed(answer: Answer) -> float:
    """Tokens a second."""
    return len(answer.tokens) / answer.seconds


def median_ratio(answers: list[Answer], others: list[Answer]) -> float:
    """Of speeds, prompt by prompt: a slow moment of the machine hits both."""
    return statistics.median(speed(one) / speed(other) for one, other in zip(answers, others, strict=True))


def share_of_equal(answers: list[Answer], others: list[Answer]) -> float:
    """Tokens that are the same at their place, as a share of the longer answers' tokens."""
    pairs = [(one.tokens, other.tokens) for one, other in zip(answers, others, strict=True)]
    equal = sum(mine == theirs for pair in pairs for mine, theirs in zip(*pair, strict=False))
    return equal / sum(max(map(len, pair)) for pair in pairs)
