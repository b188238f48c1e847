"""What competes on a subject: Hugging Face, our backends with each method, CTranslate2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.backends import prepare
from models.choices import EXACT_PRECISIONS
from models.confidence import Measured, SoftmaxGap
from models.decode_stats import DecodeStats
from models.decoder_view import DecoderView
from models.exit_policy import Calm, ExitPolicy, FullDepth, StaticExit
from models.free import Free
from models.loading import LoadedModel
from scripts.benchmarking import ctranslate
from scripts.benchmarking.subjects import Batch, Subject
from util.evaluation.decode import generated_tokens
from util.generate_options import greedy_options
from util.methods import BASELINE, CALM, FREE, FREE_LOSSLESS, HF_GENERATE, STATIC
from util.script_arguments import CTRANSLATE2, BenchmarkArguments, split_label
from util.timing import Stopwatch


@dataclass
class Output:
    """What one contestant made of one batch."""

    tokens: list[list[int]]  # without the start token and padding
    seconds: float
    stats: DecodeStats | None = None  # of our loop


@dataclass
class Contestant:
    name: str
    backend: str
    method: str
    precision: str  # of the weights
    decode: Callable[[Batch], Output]


class Coin:
    """A confidence measure of random weights: 1 with probability `share`, else 0, at the cost of the softmax
    gap, so that exits depend on a seed alone."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.gap = SoftmaxGap()
        self.generator = torch.Generator()

    def restart(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def __call__(self, view: DecoderView, hidden: Tensor, layer: int) -> Measured:
        heads = torch.rand(len(hidden), generator=self.generator) < self.share
        return Measured(heads.float().to(hidden.device), self.gap(view, hidden, layer).logits)


def enter_contestants(subject: Subject, flags: BenchmarkArguments, folder: Path) -> Iterator[Contestant]:
    """All rivals and methods, ready to decode; `folder` takes what they export."""
    if HF_GENERATE in flags.rivals:
        yield Contestant(HF_GENERATE, HF_GENERATE, BASELINE, flags.dtype, hugging_face(subject))
    for label in flags.backends:
        backend, precision = split_label(label)
        options = {"threads": flags.threads, "cache_dir": folder / "onnx"} if backend == "onnx" else {}
        fast = prepare(subject.loaded, backend, precision, **options)
        precision = precision if backend == "onnx" else flags.dtype
        for method in (BASELINE, *subject.methods):
            if method == FREE_LOSSLESS and fast.precision not in EXACT_PRECISIONS:
                continue
            policy, coin = build_policy(method, subject, flags)
            decode = ours(fast, policy, coin, subject.max_tokens)
            yield Contestant(f"{label} {method}", label, method, precision, decode)
    for rival, compute_type in CTRANSLATE2.items():
        if rival in flags.rivals and ctranslate.is_installed():
            translator = ctranslate.open_translator(subject.loaded, folder, compute_type, flags.threads)
            decode = foreign(translator, subject)
            yield Contestant(rival, rival, BASELINE, compute_type, decode)


def announce_missing(flags: BenchmarkArguments) -> None:
    """Say which rivals are left out because they are not installed."""
    wanted = [rival for rival in CTRANSLATE2 if rival in flags.rivals]
    if wanted and not ctranslate.is_installed():
        hint = "pip install -r scripts/benchmarking/requirements.txt -c constraints.txt"
        print(f"Left out, as it is not installed: {', '.join(wanted)} ({hint})", file=sys.stderr)


def build_policy(method: str, subject: Subject, flags: BenchmarkArguments) -> tuple[ExitPolicy, Coin | None]:
    """A method's policy, with the coin that decides in place of random weights."""
    if method == BASELINE:
        return FullDepth(), None
    if method == STATIC:
        return StaticExit(subject.exit_layer), None
    if not subject.trained:
        # A token that CALM tests after each of L - 1 layers exits somewhere with probability exit_share.
        tests = subject.loaded.view.num_layers - 1 if method == CALM else 1
        coin = Coin(1 - (1 - flags.exit_share) ** (1 / tests))
        return (Calm(coin, 0.5) if method == CALM else Free(subject.exit_layer, coin, 0.5)), coin
    if method == CALM:
        return Calm(SoftmaxGap(), flags.calm_threshold), None
    threshold = flags.free_threshold if method == FREE else flags.lossless_threshold
    return Free(subject.exit_layer, SoftmaxGap(), threshold, lossless=method == FREE_LOSSLESS), None


def hugging_face(subject: Subject) -> Callable[[Batch], Output]:
    loaded, options = subject.loaded, greedy_options({"max_length": subject.max_tokens + 1})

    def decode(batch: Batch) -> Output:
        with Stopwatch(loaded.model.device) as watch:
            sequences = loaded.model.generate(**batch.inputs, **options)
        return Output(generated_tokens(loaded, sequences), watch.seconds)

    return decode


def ours(
    loaded: LoadedModel, policy: ExitPolicy, coin: Coin | None, max_tokens: int
) -> Callable[[Batch], Output]:
    options = greedy_options({"max_length": max_tokens + 1}) | {"exit_policy": policy}

    def decode(batch: Batch) -> Output:
        stats = DecodeStats()
        if coin is not None:
            coin.restart(batch.number)
        with Stopwatch(loaded.model.device) as watch:
            sequences = loaded.generate(**batch.inputs, **options, decode_stats=stats)
        return Output(generated_tokens(loaded, sequences), watch.seconds, stats)

    return decode


def foreign(translator: ctranslate.Translator, subject: Subject) -> Callable[[Batch], Output]:
    shortest = 1 if subject.trained else subject.max_tokens
    loaded = subject.loaded

    def decode(batch: Batch) -> Output:
        with Stopwatch(loaded.model.device) as watch:
            pieces = translator(batch.pieces, shortest, subject.max_tokens)
        return Output([loaded.tokenizer.convert_tokens_to_ids(row) for row in pieces], watch.seconds)

    return decode
