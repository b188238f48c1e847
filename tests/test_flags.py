"""Flags: what each says of itself, what follows from it, and the answers of all commands to wrong ones."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import subprocess
import sys

import pytest
from real_rows import ROOT

import run
from gpt_eval.flags import COMMANDS as JUDGE_COMMANDS
from models.backends.onnx.engine import KINDS
from models.backends.onnx.store import default_cache_dir
from models.errors import UserError
from models.exit_heads import ExitConfig
from models.loading import LoadedModel
from util import script_arguments
from util.arguments import OUR_GROUPS, parse_arguments
from util.calibration.certificate import decoding_settings
from util.data_arguments import DataArguments
from util.exit_arguments import ExitArguments
from util.exit_training.flags import ExitPromptArguments, ExitTrainingArguments
from util.flags import non_default_settings
from util.script_arguments import ChooserArguments
from util.shard_arguments import ShardArguments
from util.sweep_arguments import SweepArguments

CHECKPOINT = str(ROOT / "checkpoints/debian-t5-free")
MODEL = ["--model_name_or_path", CHECKPOINT]
DATA = ["--dataset_name", "debian_de_en"]
SCRIPT_GROUPS = [
    value
    for value in vars(script_arguments).values()
    if dataclasses.is_dataclass(value) and hasattr(value, "_argument_group_name")
]
GROUPS = [*OUR_GROUPS, *SCRIPT_GROUPS, SweepArguments, ShardArguments]
GROUPS += [ExitTrainingArguments, ExitPromptArguments, *JUDGE_COMMANDS.values()]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_flag_says_what_it_is(group):
    for spec in dataclasses.fields(group):
        if not spec.init:  # filled in by the run
            continue
        assert spec.metadata.get("help"), f"--{spec.name} has no help: is it made by flag()?"
        facts = spec.metadata
        assert isinstance(facts["methods"], tuple) and isinstance(facts["changes_outputs"], bool)
        assert facts["changes_outputs"] or not (facts["methods"] or facts["file"])


CALM, FREE, ADAPTIVE = "--use_early_exit", "--use_shallow_deep", "--use_adapt_threshold"
EITHER = f"{CALM} True or {FREE}"
NEEDS = {  # by hand, from the original's documentation of its flags: another value, and the switch they need
    "exit_conf_type": ("meta", CALM),
    "exit_conf_threshold": (0.5, CALM),
    "exit_position_temp": (4.0, CALM),
    "exit_decay_form": ("paper", CALM),
    "exit_min_layer": (2, CALM),
    "exit_layers": ([2], CALM),
    "shallow2deep_conf_type": ("meta", FREE),
    "shallow2deep_conf_threshold": (0.5, FREE),
    "parallel_gen_token": (False, FREE),
    "copy_skipped_hidden_states": (True, FREE),
    "parallel_causal_mask": (False, FREE),
    "rollback_conf_threshold": (1.0, FREE),
    "lossless": (True, FREE),
    "max_pending_tokens": (3, FREE),
    "auto_exit": (True, FREE),
    "use_adapt_threshold": (True, FREE),
    "adapt_threshold_file": (__file__, ADAPTIVE),
    "adapt_zeta": (0.5, ADAPTIVE),
    "conf_shortlist": (__file__, EITHER),
    "calibrated_threshold_file": (__file__, EITHER),
}
FREE_OF_METHOD = {
    "deploy_scenario",
    "use_synchronize",
    "static_exit_layer",
    "use_early_exit",
    "use_shallow_deep",
    "shallow_exit_layer",  # training reads it
    "lookup_tokens",  # full depth reads it, too
}


def test_all_exit_flags_are_in_these_lists():
    assert {spec.name for spec in dataclasses.fields(ExitArguments)} == {*NEEDS, *FREE_OF_METHOD}


@pytest.mark.parametrize("name", NEEDS)
def test_flags_of_a_method_are_refused_without_it(name):
    value, switch = NEEDS[name]
    unfit = [other for other in (CALM, FREE) if other not in switch and (switch, other) != (ADAPTIVE, FREE)]
    for other in ({}, {"static_exit_layer": 2}, *({method[2:]: True} for method in unfit)):
        with pytest.raises(UserError) as refusal:
            ExitArguments(**other, **{name: value})
        assert str(refusal.value) == f"--{name} has no effect here: add {switch} True."


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ({"methods": ["FREE"], "calm_thresholds": [0.5]}, "--calm_thresholds .* add CALM to --methods"),
        ({"methods": ["CALM"], "static_layers": [2]}, "--static_layers .* add Static to --methods"),
        ({"methods": ["FREE"], "adapt_zetas": [0.5]}, "--adapt_zetas .* add FREE adaptive to --methods"),
        (
            {"methods": ["FREE"], "conf_shortlist": __file__},
            "--conf_shortlist .* FREE shortlist to --methods",
        ),
        ({"free": None, "calm": "x", "free_thresholds": [0.5]}, "--free_thresholds .* add --free CHECKPOINT"),
        ({"methods": ["FREE", "FREE shortlist"]}, "FREE shortlist has no setting .* --conf_shortlist FILE"),
        ({"free": None, "calm": "x", "methods": ["FREE"]}, "--methods: FREE has no .* add --free CHECKPOINT"),
        ({"calm_methods": ["CALM"]}, "--calm_methods has no effect here: add --calm CHECKPOINT"),
        ({"calm_static_layers": [2]}, "--calm_static_layers has no effect here: add --calm CHECKPOINT"),
        (
            {"calm": "x", "calm_methods": ["CALM"], "calm_static_layers": [2]},
            "--calm_static_layers has no effect here: add Static to --calm_methods",
        ),
        ({"calm": "x", "calm_methods": ["FREE"]}, "--calm_methods: FREE: --free alone decodes so"),
        (
            {"calm": "x", "methods": ["FREE", "CALM"], "calm_methods": ["Static"]},
            "--methods: CALM has no setting here: .* add CALM to --calm_methods",
        ),
    ],
)
def test_flags_of_a_method_are_refused_in_a_sweep_without_it(flags, missing):
    with pytest.raises(UserError, match=missing):
        SweepArguments(**{"free": "x"} | flags)


def test_repeated_values_count_once():
    """Twice the same would be two settings of one name."""
    repeated = {"free_thresholds": [0.4, 0.1, 0.4], "batch_sizes": [1, 2, 1], "static_layers": [2, 2]}
    repeated |= {"methods": ["FREE", "Static", "FREE"]}
    sweep = SweepArguments(free="x", **repeated)
    assert (sweep.free_thresholds, sweep.batch_sizes, sweep.static_layers) == ([0.4, 0.1], [1, 2], [2])
    assert sweep.methods == ["FREE", "Static"]
    choice = ChooserArguments("x", shallow_layers=[3, 1, 3], thresholds=[0.4, 0.4])
    assert (choice.shallow_layers, choice.thresholds) == ([3, 1], [0.4])


def test_settings_that_a_run_depends_on():
    sweep = SweepArguments(free="x", trace_samples=3, output_dir="y", num_samples=5, static_layers=[1])
    assert non_default_settings(sweep) == {"free": "x", "num_samples": 5, "static_layers": [1]}
    data = DataArguments(dataset_name="debian_de_en", resume_eval=True, preprocessing_num_workers=2)
    # lengths are those of the data set's record
    assert non_default_settings(data).keys() == {
        "dataset_name",
        "max_source_length",
        "max_target_length",
        "val_max_target_length",
    }


COMMON = {"task": "translation", "max_source_length": 512, "max_length": 20, "conf_shortlist": None}
CERTIFIED = {
    "CALM": (
        {"use_early_exit": True, "exit_conf_threshold": 0.3, "exit_min_layer": 2},
        {
            "exit_conf_type": "softmax",
            "exit_position_temp": None,
            "exit_decay_form": "released",
            "exit_min_layer": 2,
            "exit_layers": None,
            "method": "--use_early_exit",
        },
    ),
    "FREE": (
        {"use_shallow_deep": True, "shallow_exit_layer": 3, "max_pending_tokens": 4, "lossless": True},
        {
            "shallow2deep_conf_type": "softmax",
            "parallel_gen_token": True,
            "copy_skipped_hidden_states": False,
            "parallel_causal_mask": True,
            "rollback_conf_threshold": None,
            "max_pending_tokens": 4,
            "shallow_exit_layer": 3,
            "method": "--use_shallow_deep",
            "batch_size": 8,
        },
    ),
}


@pytest.mark.parametrize("name", CERTIFIED)
def test_certificates_name_what_the_method_reads_but_for_the_threshold(name):
    flags, expected = CERTIFIED[name]
    data = DataArguments(validation_file=__file__)
    loaded = LoadedModel(None, None, ExitConfig(), "onnx", "w8")
    assert decoding_settings(ExitArguments(**flags), data, loaded, 20, 8) == COMMON | expected


def test_dataclasses_make_no_folder_and_leave_each_other_alone(tmp_path):
    folder = tmp_path / "new"
    stages = ["--do_eval", "True", "--load_best_model_at_end", "True", "--eval_strategy", "steps"]
    stages += ["--predict_with_generate", "True", "--save_strategy", "steps", "--use_cpu"]
    arguments = parse_arguments([*MODEL, *DATA, *stages, "--token", "abc", "--output_dir", str(folder)])
    data, training = arguments.data, arguments.training
    assert not folder.exists() and data.report_dir is None and data.hub == {}
    assert training.metric_for_best_model == "loss"
    arguments.connect()
    assert data.report_dir == str(folder) and data.hub == {"token": "abc", "cache_dir": None}
    assert training.metric_for_best_model == "bleu" and training.greater_is_better


# Outputs, by decoding


SHORT = [*MODEL, *DATA, "--do_eval", "True", "--max_eval_samples", "3", "--use_cpu", "True"]
SHORT += ["--use_shallow_deep", "True", "--shallow2deep_conf_threshold", "0.3", "--report_to", "none"]
SHORT += ["--val_max_target_length", "8", "--per_device_eval_batch_size", "1"]


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoded")
    run.main([*SHORT, "--output_dir", str(folder)])
    return folder


def outputs_in(folder):
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [(row["id"], row["prediction"], row["exit_layers"]) for row in rows]


@pytest.mark.slow
def test_flags_said_not_to_change_outputs_do_not(decoded, tmp_path, capsys):
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / KINDS).symlink_to(default_cache_dir() / KINDS)  # traced for `decoded`
    same = {
        "deploy_scenario": "True",
        "cache_dir": str(tmp_path / "cache"),
        "onnx_cache_dir": str(tmp_path / "graphs"),
        "token": "abc",
        "baseline_predictions": str(decoded / "predictions.jsonl"),
    }
    without = {
        spec.name
        for group in OUR_GROUPS
        for spec in dataclasses.fields(group)
        if spec.init and not spec.metadata["changes_outputs"]
    }
    assert without == {*same, "resume_eval", "preprocessing_num_workers"}  # the last is of training alone
    words = [word for name, value in same.items() for word in (f"--{name}", value)]
    run.main([*SHORT, *words, "--output_dir", str(tmp_path)])
    assert outputs_in(tmp_path) == outputs_in(decoded)
    assert len([*(tmp_path / "graphs").iterdir()]) == 2  # and the model's own folder
    run.main([*SHORT, "--resume_eval", "True", "--output_dir", str(tmp_path)])  # so the outputs serve here
    with pytest.raises(SystemExit):
        run.main([*SHORT, "--resume_eval", "True", "--lossless", "True", "--output_dir", str(tmp_path)])
    assert "lossless" in capsys.readouterr().err


# All commands


COMMANDS = {  # module: enough flags, a near miss with what is meant, what is required, a wrong type
    "run": ([*MODEL, *DATA], "use_shalow_deep", "use_shallow_deep", None, "max_eval_samples"),
    "scripts.sweep": (["--free", "x", *DATA], "num_sample", "num_samples", None, "threads"),
    "scripts.calibrate": ([*MODEL, *DATA], "detla", "delta", None, "epsilon"),
    "scripts.choose_exit": ([*MODEL, *DATA], "mesured", "measured", "--model_name_or_path", "measured"),
    "scripts.learn_shortlist": ([*MODEL, *DATA], "sise", "size", "--model_name_or_path", "size"),
    "scripts.train_tokenizer": (DATA, "vocab_siz", "vocab_size", None, "vocab_size"),
    "scripts.report": (["x"], "output_dri", "output_dir", "FOLDERS", None),
    "scripts.simulate_calibration": (
        ["--losses_file", "x", "--output_dir", "x"],
        "resample",
        "resamples",
        "--losses_file, --output_dir",
        "epsilon",
    ),
    "scripts.export_checkpoint": (
        ["--run", "x", "--output_dir", "x", "--title", "x", "--train_script", "x"],
        "orign",
        "origin",
        "--run, --output_dir, --title, --train_script",
        None,
    ),
    "scripts.export_custom_generate": (["--output_dir", "x"], "repo_ip", "repo_id", "--output_dir", None),
    "scripts.export_static": (
        [*MODEL, "--output_dir", "x"],
        "layers",
        "layer",
        "--model_name_or_path, --output_dir",
        None,
    ),
    "scripts.distill_targets": (
        [*MODEL, *DATA, "--output_file", "x.jsonl.gz"],
        "num_beam",
        "num_beams",
        "--model_name_or_path, --dataset_name, --output_file",
        "batch_size",
    ),
    "scripts.make_exit_prompts": ([], "part", "parts", None, "others"),
    "scripts.demo": ([], "prot", "port", None, "port"),
    "scripts.benchmark": ([], "sample", "samples", None, "threads"),
    "scripts.quickstart_llm": ([], "prompt", "prompts", None, "max_new_tokens"),
    "scripts.benchmark_layer_skip": ([], "prompt", "prompts", None, "steps"),
    "scripts.benchmark_prompt_length": ([], "round", "rounds", None, "long"),
    "scripts.benchmark_training": ([], "step", "steps", None, "steps"),
    "scripts.build_debian_data": ([], "miror", "mirror", None, "max_ratio"),
    "gpt_eval.__main__ make": (
        ["--predictions", "a=b", "--source_file", "x"],
        "repeat",
        "repeats",
        "--predictions",
        "temperature",
    ),
    "gpt_eval.__main__ run": (["--model", "x"], "concurency", "concurrency", "--model", "timeout"),
    "gpt_eval.__main__ score": ([], "sed", "seed", None, "seed"),
}


def complaint(name, words, capsys):
    """The only line of a command's answer; its exit code is 2."""
    module, *command = name.split()
    capsys.readouterr()
    try:
        code = importlib.import_module(module).main([*command, *words])
    except SystemExit as stopped:
        code = stopped.code
    output = capsys.readouterr()
    assert code == 2 and output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err.removeprefix("error: ").rstrip()


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_flags_of_every_command_get_one_line(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    enough, miss, meant, required, number = COMMANDS[name]
    logging.getLogger("util").setLevel(logging.NOTSET)
    line = complaint(name, [*enough, f"--{miss}", "1"], capsys)
    assert line == f"Unknown flag --{miss}: did you mean --{meant}?"
    assert logging.getLogger("util").level == logging.INFO, "what our modules log would be dropped"
    if required is not None:
        assert complaint(name, [], capsys) == f"Missing: {required}. See --help."
    if number is not None:
        line = complaint(name, [*enough, f"--{number}", "many"], capsys)
        assert line.startswith(f"Argument --{number}: invalid ") and "many" in line
    assert not list(tmp_path.iterdir())


def test_commands_of_the_judge(capsys):
    assert "The commands are make, run, score, not nothing." in complaint("gpt_eval.__main__", [], capsys)
    assert "did you mean score?" in complaint("gpt_eval.__main__", ["scores"], capsys)
    for words in (["--wrong", "--help"], ["make", "--seed", "many", "--help"]):
        with pytest.raises(SystemExit) as stop:
            importlib.import_module("gpt_eval.__main__").main(words)
        assert stop.value.code == 0 and "--predictions TEXT ..." in capsys.readouterr().out


HELP = """
import contextlib, io, json, runpy, sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "datasets", "pandas", "scipy", "matplotlib")))
texts = {}
for name in json.loads(sys.argv[1]):
    module, *command = name.split()
    sys.argv = [module, *command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            assert stop.code == 0, name
    texts[name] = output.getvalue()
print(json.dumps(texts))
"""


def test_help_of_every_command_needs_no_torch():
    """Importing it takes seconds; where it cannot be imported, help still comes."""
    names = [*COMMANDS, "gpt_eval.__main__"]
    command = [sys.executable, "-c", HELP, json.dumps(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, text in json.loads(done.stdout).items():
        headings = [line for line in text.splitlines() if line.endswith(":") and line[0].isalpha()]
        assert "\n  --" in text and headings, name
        if name in COMMANDS:
            assert f"--{COMMANDS[name][2]}" in text
        if "--dataset_name" in COMMANDS.get(name, [[]])[0] and "distill" not in name:
            data = next(place for place, line in enumerate(headings) if line.startswith("Data, lengths"))
            assert data == (2 if "calibrate" in name else 1), "after the script's flags, the model's, or both"
            assert "--train_file TEXT" in text and "MODEL_NAME" not in text
