"""Train and evaluate early-exiting language models: `python run.py --help`, or `python run.py args.yaml`.

Methods are switched on by flags: --static_exit_layer (Static-Exiting), --use_early_exit (CALM),
--use_shallow_deep (FREE); none of them decodes at full depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from util.arguments import OUR_GROUPS
from util.flag_help import answer_help

if __name__ == "__main__":
    answer_help(OUR_GROUPS, __doc__, training=True)  # before torch is imported

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments, set_seed

from models.loading import LoadedModel, create_model, load_model
from models.threshold import AdaptiveThreshold
from util.arguments import Arguments, parse_arguments
from util.backend import limit_threads, run_by_backend
from util.console import command
from util.data.examples import target_language
from util.data.preparation import prepare
from util.device import move_model
from util.evaluation.decode import evaluate
from util.evaluation.records import EvaluationSettings
from util.exit_arguments import ExitArguments
from util.files import locked_output_dir, write_json
from util.flags import non_default_settings
from util.model_card import STAMP, hash_weights
from util.policies import build_policy, resolve_exit_arguments, with_calibrated_threshold
from util.setup import read_split
from util.stages import STAGES
from util.tables import comparison_table, print_report
from util.training.deepspeed import loading_whole_weights, refuse_under_deepspeed
from util.training.sharing import holds_the_model, settle_push, share
from util.training.train import train

TO_CONTINUE = (
    "Run the same command: training goes on from its last checkpoint, evaluation by --resume_eval True."
)


def main(argv: list[str] | None = None) -> None:
    with command(TO_CONTINUE):
        arguments = parse_arguments(argv, __doc__)
        with locked_output_dir(Path(arguments.training.output_dir)):
            run(arguments)


def run(arguments: Arguments) -> None:
    settle_push(arguments)
    loaded, exit_flags = open_model(arguments)
    examples = load_stages(arguments, loaded)  # before training, lest a missing file be found hours later
    if arguments.training.do_train:
        train(arguments, exit_flags, loaded)
        say_next(arguments)
    if examples:
        move_model(loaded.model, arguments.training.device, evaluation_dtype(arguments.training))
        loaded = run_by_backend(loaded, arguments.evaluation_backend)
    for name, rows in examples.items():
        evaluate_stage(name, rows, arguments, exit_flags, loaded)
    share(arguments, loaded)


def open_model(arguments: Arguments) -> tuple[LoadedModel, ExitArguments]:
    """The model, ready for the data, and the exit flags with what it knows of them."""
    set_seed(arguments.training.seed)
    limit_threads(arguments.backend)
    arguments.connect()
    refuse_under_deepspeed(arguments)
    with loading_whole_weights(arguments.training):
        loaded = build_model(arguments)
    exit_flags = resolve_exit_arguments(arguments.exit, loaded.exit_config, loaded.view.num_layers)
    prepare(loaded, arguments.data, lengths_by_flag(arguments), arguments.training.do_train)
    return loaded, exit_flags


def say_next(arguments: Arguments) -> None:
    """Where the trained model is, and what it is for."""
    folder = arguments.training.output_dir
    after = f"run.py --model_name_or_path {folder} --do_eval, or --do_predict"
    if arguments.exit.shallow_exit_layer is not None:
        after += f"; scripts/sweep.py --free {folder} compares all methods"
    if PartialState().is_main_process:
        print(f"Saved the model to {folder}. Next: {after}")


def load_stages(arguments: Arguments, loaded: LoadedModel) -> dict[str, Dataset]:
    """The samples of each evaluation that the flags ask for."""
    data, training = arguments.data, arguments.training
    limits = {"eval": data.max_eval_samples, "predict": data.max_predict_samples}
    wanted = {"eval": training.do_eval, "predict": training.do_predict}
    return {
        name: read_split(data, stage.split, loaded, limits[name])
        for name, stage in STAGES.items()
        if wanted[name]
    }


def evaluate_stage(
    name: str, examples: Dataset, arguments: Arguments, exit_flags: ExitArguments, loaded: LoadedModel
) -> None:
    """Decode the split of a stage of STAGES and write its results and predictions."""
    data, training = arguments.data, arguments.training
    stage, folder = STAGES[name], Path(training.output_dir)
    sizes = (arguments.max_length, training.per_device_eval_batch_size)
    exit_flags = with_calibrated_threshold(exit_flags, data, loaded, examples, *sizes)
    evaluation = evaluation_settings(arguments, exit_flags, stage.predictions, stage.outcomes)
    policy = build_policy(exit_flags, loaded, arguments.max_length) if data.num_beams == 1 else None
    results = evaluate(loaded, policy, examples, evaluation)
    if results is None:  # another process gathers and reports
        return
    if holds_the_model(arguments):
        results[STAMP] = hash_weights(folder)  # by which its card knows what was measured
    write_json(folder / stage.results, results)
    if isinstance(getattr(policy, "threshold", None), AdaptiveThreshold):
        policy.threshold.save(folder / stage.threshold)
    shown = [
        {"figure": figure, "value": value}
        for figure, value in results.items()
        if isinstance(value, (int, float))
    ]
    columns = {"figure": "figure", "value": "value"}
    print_report(comparison_table(f"{name}: {stage.split}", columns, shown))
    print(
        f"Wrote {stage.results} and {stage.predictions} to {folder}. Next: scripts/report.py {folder}, "
        "beside the folder of another run to compare"
    )


def evaluation_settings(
    arguments: Arguments, exit_flags: ExitArguments, predictions: str, outcomes: Sequence[str]
) -> EvaluationSettings:
    """How the flags want a split decoded, into the file `predictions` of --output_dir; `outcomes` are what is
    made of it there."""
    data, training = arguments.data, arguments.training
    folder, learnt = Path(training.output_dir), exit_flags.adapt_threshold_file
    read = None if learnt is None else Path(learnt).resolve()  # what it goes on from stays until replaced
    sizes = {"batch_size": training.per_device_eval_batch_size, "max_length": arguments.max_length}
    return EvaluationSettings(
        task=data.task,
        max_source_length=data.max_source_length,
        num_beams=data.num_beams,
        synchronize=exit_flags.use_synchronize,
        predictions_file=folder / predictions,
        outcomes=tuple(path for name in outcomes if (path := folder / name).resolve() != read),
        arguments=non_default_settings(arguments.model, data, exit_flags, arguments.backend) | sizes,
        resume=data.resume_eval,
        baseline_predictions=Path(data.baseline_predictions) if data.baseline_predictions else None,
        language=target_language(data),
        **sizes,
    )


def lengths_by_flag(arguments: Arguments) -> dict[str, int]:
    """Tokens of the longest sources, training targets and outputs."""
    data, training = arguments.data, arguments.training
    output = "generation_max_length" if training.generation_max_length else "val_max_target_length"
    lengths = {"--max_source_length": data.max_source_length}
    if training.do_train:
        lengths["--max_target_length"] = data.max_target_length
    return lengths | {f"--{output}": arguments.max_length}


def evaluation_dtype(training: Seq2SeqTrainingArguments) -> torch.dtype:
    """The precision asked for."""
    halves = {torch.bfloat16: training.bf16_full_eval, torch.float16: training.fp16_full_eval}
    return next((dtype for dtype, wanted in halves.items() if wanted), torch.float32)


def build_model(arguments: Arguments) -> LoadedModel:
    """Load the checkpoint, or create a model from a config, as the flags say."""
    flags = arguments.model
    hub = {"cache_dir": flags.cache_dir, "revision": flags.model_revision, "token": flags.token}
    if flags.model_name_or_path:
        return load_model(
            flags.model_name_or_path,
            flags.tokenizer_name,
            merge_adapter=not arguments.lora.use_lora,
            exit_adapter=flags.exit_adapter_path,
            **hub,
        )
    return create_model(flags.config_name, flags.tokenizer_name, **hub)


if __name__ == "__main__":
    main()
