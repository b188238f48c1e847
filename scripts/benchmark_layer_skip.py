"""LayerSkip from training to speed: a Llama trained by its recipe, lossless beside assistant_early_exit.

    python scripts/benchmark_layer_skip.py

A small Llama learns the calendar with layer dropout and losses at all layers (Elhoushi et al., 2024). Then
all methods continue the calendar from days that it was not trained on, taking turns, one prompt at a time;
and lossless decodes several prompts at once, as Hugging Face's self-speculation cannot.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.generate_options import greedy_options
from util.layer_skip_arguments import HELD_OUT, LayerSkipArguments, LayerSkipBackendArguments

if __name__ == "__main__":
    answer_help((LayerSkipArguments, LayerSkipBackendArguments), __doc__)  # before torch is imported

import run
from models.confidence import SoftmaxGap
from models.exit_policy import ExitPolicy, FullDepth
from models.free import Free
from models.loading import LoadedModel, load_model
from models.prompts import SOURCE
from models.prompts import Prompt as Template
from scripts.benchmarking.calendar_rows import calendar_rows
from scripts.benchmarking.causal import (
    Prompt,
    answer_in_turn,
    make_rows,
    our_contestants,
    their_contestants,
)
from scripts.quickstart_llm import COLUMNS, EXPLANATION
from util.backend import limit_threads, run_by_backend
from util.console import command
from util.data.encoding import encoder_for
from util.evaluation.decode import generated_tokens
from util.evaluation.timing_doubts import untrusted_timing
from util.flags import as_flags, parse_groups
from util.methods import BASELINE, FREE_LOSSLESS
from util.policies import require_exits
from util.tables import comparison_table, print_report
from util.timing import Stopwatch

TOKENIZER = Path(__file__).resolve().parents[1] / "checkpoints" / "debian-llama-free"
TOKENS_A_DAY, SOURCE_TOKENS = 14, 16  # at most
RECIPE = {
    "layer_dropout": 0.1,
    "intermediate_loss_fn": "sum_l",
    "e_scale": 0.5,
    "exit_curriculum": "rotational",
    "rotation_interval": 4,
}
TRAINING = {
    "per_device_train_batch_size": 16,
    "use_muon": True,
    "learning_rate": 4e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "logging_steps": 20,
    "save_steps": 50,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def main(argv: list[str] | None = None) -> None:
    with command():
        flags, backend = parse_groups((LayerSkipArguments, LayerSkipBackendArguments), __doc__, argv)
        limit_threads(backend)
        benchmark(flags, backend)


def benchmark(flags: LayerSkipArguments, backend: LayerSkipBackendArguments) -> None:
    loaded = run_by_backend(train(flags), backend)
    require_exits("shallow_exit_layer", [flags.shallow_exit_layer], loaded.view.num_layers)
    texts = [row["source"] for row in calendar_rows(flags.days)[:HELD_OUT]][: flags.prompts]
    prompts = [Prompt(text, encoder_for(loaded, SOURCE_TOKENS).inputs([text])) for text in texts]
    rows = compare(loaded, prompts, flags)
    title = f"{len(prompts)} prompts; ours on {loaded.backend} {loaded.precision}"
    print_report(comparison_table(title, COLUMNS, rows), EXPLANATION)
    if doubts := untrusted_timing(rows):
        print(f"{doubts}\n")
    print(describe_batches(loaded, texts, flags))


def train(flags: LayerSkipArguments) -> LoadedModel:
    """The model in --output_dir, trained there unless it is finished."""
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    file = flags.output_dir / f"calendar_{flags.days}.jsonl"
    rows = calendar_rows(flags.days)[HELD_OUT:]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf8")
    settings: dict[str, Any] = {
        "config_name": flags.config_name,
        "tokenizer_name": TOKENIZER,
        "task": "translation",
        "train_file": file,
        "source_column": "source",
        "target_column": "target",
        "prompt_template": SOURCE,
        "max_source_length": SOURCE_TOKENS,
        "max_target_length": flags.days * TOKENS_A_DAY,
        "output_dir": flags.output_dir,
        "max_steps": flags.steps,
        "do_train": True,
    }
    run.main(as_flags(settings | RECIPE | TRAINING))
    loaded = load_model(str(flags.output_dir))
    loaded.prompt = Template()
    return loaded


def compare(loaded: LoadedModel, prompts: list[Prompt], flags: LayerSkipArguments) -> list[dict[str, Any]]:
    """A row of figures for each method, ours and Hugging Face's, one prompt at a time."""
    layer = flags.shallow_exit_layer
    contestants = our_contestants(loaded, layer, flags.threshold) + their_contestants(loaded, layer)
    answer_in_turn(contestants, prompts, flags.days * TOKENS_A_DAY)
    return make_rows(contestants)


def describe_batches(loaded: LoadedModel, texts: list[str], flags: LayerSkipArguments) -> str:
    """Lossless beside full depth on the same prompts, several at once."""
    lossless = Free(flags.shallow_exit_layer, SoftmaxGap(), flags.threshold, lossless=True)
    policies: dict[str, ExitPolicy] = {BASELINE: FullDepth(), FREE_LOSSLESS: lossless}
    seconds, outputs = dict.fromkeys(policies, 0.0), {name: [] for name in policies}
    batches = [texts[first : first + flags.batch_size] for first in range(0, len(texts), flags.batch_size)]
    for policy in policies.values():  # not timed
        decode(loaded, batches[0], policy, flags)
    for number, batch in enumerate(batches):
        for name, policy in sorted(policies.items(), reverse=number % 2 == 1):  # in turns
            tokens, time = decode(loaded, batch, policy, flags)
            outputs[name] += tokens
            seconds[name] += time
    speeds = {name: sum(map(len, outputs[name])) / seconds[name] for name in policies}
    equal = sum(map(list.__eq__, *outputs.values())) / len(texts)
    return (
        f"{flags.batch_size} prompts at once: {FREE_LOSSLESS} {speeds[FREE_LOSSLESS]:.0f} tokens/s, "
        f"{BASELINE} {speeds[BASELINE]:.0f}; {equal:.0%} of outputs are equal. "
        "assistant_early_exit takes one at a time."
    )


def decode(
    loaded: LoadedModel, texts: list[str], policy: ExitPolicy, flags: LayerSkipArguments
) -> tuple[list[list[int]], float]:
    """The new tokens of each prompt, up to its end token, and the seconds they took together."""
    inputs = encoder_for(loaded, SOURCE_TOKENS).inputs(texts)
    options = greedy_options({"max_new_tokens": flags.days * TOKENS_A_DAY})
    with Stopwatch(loaded.model.device) as watch:
        sequences = loaded.generate(**inputs, **options, exit_policy=policy)
    return generated_tokens(loaded, sequences, inputs["input_ids"].shape[1]), watch.seconds


if __name__ == "__main__":
    main()
