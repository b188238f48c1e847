"""What scripts share: presets, files of flags, the device, lengths, layers; and what a quickstart leaves."""

from __future__ import annotations

import contextlib
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from real_rows import ROOT

from models.errors import UserError
from scripts import export_checkpoint, learn_shortlist, sweep
from util import device
from util.backend_arguments import BackendArguments
from util.data_arguments import DataArguments
from util.evaluation.records import Record
from util.flags import expand_argument_file, parse_groups
from util.report.folders import read_folders
from util.setup import open_checkpoint
from util.sweep_arguments import PRESETS, SweepArguments, expand_preset

GROUPS = (SweepArguments, DataArguments, BackendArguments)
NINE = [  # quickstart's table, from full depth to the boldest of each checkpoint
    "Full depth (free)",
    "HF generate (free)",
    "Static 2 (free)",
    "FREE 0.4 (free)",
    "FREE adaptive 0.8 (free)",
    "FREE lossless 0.3 (free)",
    "Full depth (calm)",
    "Static 4 (calm)",
    "CALM 0.9 (calm)",
]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder and the printed text of a short quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(ROOT)
        sweep.main(["--preset", "quickstart", "--num_samples", "4", "--output_dir", str(folder)])
    return folder, output.getvalue()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_quickstart_compares_nine_settings_on_its_samples(quickstart):
    folder, output = quickstart
    rows = json.loads((folder / "sweep.json").read_text())["rows"]
    assert [row["name"] for row in rows] == NINE
    shown = [re.findall(r"[^│]+", line) for line in output.splitlines() if line.startswith("│")][:9]
    assert [cells[0].strip() for cells in shown] == NINE
    for cells, row in zip(shown, rows, strict=True):
        figures = [cell.split()[0] for cell in cells[1:]]
        speed = [f"{row[key]:.2f}" for key in ("tokens_per_second", "ms_per_token", "speedup")]
        assert figures[0] == f"{row['bleu']:.2f}" and figures[3:6] == speed
    assert shown[0][6].split() == ["1.00"] and len(shown[3][6].split()) == 3  # with its interval
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["samples"] == 4 and settings["split"] == "test"
    lengths = {key: settings["arguments"][key] for key in ("max_source_length", "val_max_target_length")}
    assert lengths == {"max_source_length": 28, "val_max_target_length": 56}


def test_quickstart_colours_outputs_of_free_and_calm(quickstart):
    folder, output = quickstart
    records = {(record["setting"], record["row"]): record for record in read_lines(folder / "records.jsonl")}
    lines = output.splitlines()
    found = [index for index, line in enumerate(lines) if line.startswith("reference  ")]
    assert 1 <= len(found) <= 3
    for index in found:
        reference = lines[index].removeprefix("reference  ").strip()
        row = next(key[1] for key, record in records.items() if record["reference"] == reference)
        for line, setting in zip(lines[index + 1 :], ("FREE 0.4 (free)", "CALM 0.9 (calm)"), strict=False):
            text = line[11:].replace("</s>", "").strip()
            assert line.startswith(setting[:4]) and text == records[setting, row]["prediction"].strip()


def test_quickstart_leaves_a_page_that_the_last_line_names(quickstart):
    folder, output = quickstart
    last = output.splitlines()[-1]
    assert f"Next: open {folder / 'report.html'}" in last
    assert (folder / "report.html").is_file() and (folder / "trade_off.svg").is_file()
    (result,) = read_folders([folder]).sets
    assert [setting.name for setting in result.settings] == NINE and result.interleaved


@pytest.mark.parametrize(
    "words",
    [
        ["--preset", "quickstart", "--free_thresholds", "0.2", "0.3", "--calm", ""],
        ["--free_thresholds", "0.2", "0.3", "--calm", "", "--preset=quickstart"],
    ],
)
def test_flags_override_a_preset_wherever_they_stand(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags, data, backend = parse_groups(GROUPS, "", expand_preset(words))
    assert flags.free_thresholds == [0.2, 0.3] and flags.calm == "" and flags.preset is None
    assert (flags.num_samples, flags.lossless_thresholds, backend.threads) == (300, [0.3], 1)
    assert (data.dataset_name, data.drop_long_samples, data.max_target_length) == ("debian_de_en", True, 28)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_command_line(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse_groups(GROUPS, "", expand_preset(["--preset", name]))


def test_a_preset_leaves_out_what_other_methods_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--preset", "quickstart", "--calm_methods", "CALM"]
    flags, *_ = parse_groups(GROUPS, "", expand_preset(words))
    assert flags.calm_methods == ["CALM"] and flags.calm_static_layers == []


def test_unknown_presets_are_refused():
    with pytest.raises(UserError, match=r"--preset.*quickstar.*quickstart"):
        expand_preset(["--preset", "quickstar"])


def test_a_sweep_takes_a_file_of_flags(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("preset: quickstart\nnum_samples: 7\n")
    flags, _, backend = parse_groups(
        GROUPS, "", expand_preset(expand_argument_file([str(path), "--threads", "2"]))
    )
    assert (flags.num_samples, backend.threads, flags.free_thresholds) == (7, 2, [0.4])


def data_arguments(**flags):
    return DataArguments(dataset_name="debian_de_en", max_source_length=28, max_target_length=28, **flags)


def test_checkpoints_open_on_the_accelerator_that_works(monkeypatch):
    there = torch.device("meta")  # stands for one; weights can be moved to it anywhere
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: there)
    loaded = open_checkpoint(str(ROOT / "checkpoints/debian-t5-free"), data_arguments())
    assert loaded.model.device == there and not loaded.model.training
    # compiled for one that this machine lacks
    monkeypatch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available=False: None if check_available else there,
    )
    assert device.best_device() == torch.device("cpu")


@pytest.mark.slow
def test_a_shortlist_is_judged_on_outputs_of_the_length_asked_for(tmp_path, monkeypatch):
    lengths = []

    def spy(model, *, sequences, **inputs):
        lengths.append(sequences.shape[1])
        return trace(model, sequences=sequences, **inputs)

    trace = learn_shortlist.trace_layers
    monkeypatch.setattr(learn_shortlist, "trace_layers", spy)
    flags = [
        "--model_name_or_path",
        str(ROOT / "checkpoints/debian-t5-free"),
        "--dataset_name",
        "debian_de_en",
    ]
    flags += ["--split", "validation", "--num_samples", "3", "--val_max_target_length", "6"]
    learn_shortlist.main([*flags, "--output_file", str(tmp_path / "shortlist.json")])
    assert max(lengths) == 6 and len(lengths) == 6  # start token included; two measures a sample


def test_a_card_quotes_the_settings_of_its_checkpoint(tmp_path):
    def row(name, checkpoint, **more):
        return {"name": name, "checkpoint": checkpoint, "samples": 300, "bleu": 25.04, "chrf": 50.0, **more}

    rows = [
        row("Full depth (free)", "free", bleu_unseen=24.0, average_layers=8.0),
        row("HF generate (free)", "free", bleu_unseen=24.0),
        row("FREE 0.4 (free)", "free", average_layers=6.25),
        row("CALM 0.9 (calm)", "calm", bleu_unseen=1.0, average_layers=4.0),
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"rows": rows}))
    assert export_checkpoint.score_table(tmp_path, "free").splitlines()[-5:] == [
        "| setting | BLEU | chrF | BLEU unseen | layers per token |",
        "|---|---|---|---|---|",
        "| Full depth | 25.0 | 50.0 | 24.0 | 8.00 |",
        "| HF generate | 25.0 | 50.0 | 24.0 | 8.00 |",
        "| FREE 0.4 | 25.0 | 50.0 | - | 6.25 |",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rows": [{"name": "Full', "sweep.json: not JSON"),
        ('{"rows": {}}', "sweep.json: rows must be a list of objects"),
        (
            '{"rows": [{"name": "a", "checkpoint": "free", "samples": 3, "rougeL": 9.5}]}',
            "lacks bleu, chrf: ",
        ),
        (
            '{"rows": [{"name": "a", "checkpoint": "free", "samples": 3, "bleu": "9", "chrf": 1}]}',
            'bleu must be a number, not "9"',
        ),
    ],
)
def test_a_card_refuses_what_is_no_sweep_of_translations(tmp_path, text, message):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError) as error:
        export_checkpoint.score_table(tmp_path, "free")
    assert str(error.value).startswith(f"--sweep {tmp_path / 'sweep.json'}") and message in str(error.value)


LAYERS_OF_TWO = {  # by flags: the refusal, of --free with twelve layers and --calm with six
    ("static_layers", 8, "calm_static_layers", 3): None,
    ("static_layers", 8, "calm_methods", "CALM"): None,
    ("shallow_layers", 11): None,
    ("exit_layers", 5, "static_layers", 2): None,
    ("static_layers", 8): "--static_layers must lie in 1..5 for this 6-layer decoder, got 8",
    ("static_layers", 12, "calm_static_layers", 3): "--static_layers must lie in 1..11",
    ("calm_static_layers", 8): "--calm_static_layers must lie in 1..5",
    ("shallow_layers", 12): "--shallow_layers must lie in 1..11",
    ("exit_layers", 8): "--exit_layers must lie in 1..5",
}


@pytest.mark.parametrize("given", LAYERS_OF_TWO)
def test_layers_are_those_of_the_checkpoint_that_decodes(given):
    checkpoints = {
        name: SimpleNamespace(prompt=None, view=SimpleNamespace(num_layers=depth, exit_adapter=None))
        for name, depth in (("free", 12), ("calm", 6))
    }
    values = {name: [value] for name, value in zip(given[::2], given[1::2], strict=True)}
    flags = SweepArguments(free="x", calm="y", **values)
    refusal = LAYERS_OF_TWO[given]
    with contextlib.nullcontext() if refusal is None else pytest.raises(UserError, match=refusal):
        sweep.check_checkpoints(flags, checkpoints)


def test_static_layers_of_calm_alone_may_lie_as_deep_as_it():
    checkpoints = {
        name: SimpleNamespace(prompt=None, view=SimpleNamespace(num_layers=depth, exit_adapter=None))
        for name, depth in (("free", 4), ("calm", 6))
    }
    flags = SweepArguments(free="x", calm="y", methods=["FREE"], calm_methods=["Static"], static_layers=[5])
    sweep.check_checkpoints(flags, checkpoints)


def test_a_card_refuses_a_damaged_account_of_a_training(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"epoch": 1')
    with pytest.raises(UserError, match=r"^--run .*trainer_state\.json: not JSON"):
        export_checkpoint.read_state(tmp_path)


@pytest.mark.parametrize(("layers", "lines"), [([2, 4, 6, 6, 2], 3), ([2, 6, 6, 6, 6], 3), ([6] * 5, 1)])
def test_outputs_of_several_depths_are_coloured(layers, lines):
    record = Record("1", "a b c d", "x", 5, ["▁a", "▁b", "▁c", "▁d", "</s>"], layers, 1.0)
    setting = SimpleNamespace(method="CALM", num_layers=6, records=[record])
    assert len(sweep.color_samples([setting])) == lines
