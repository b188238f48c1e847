"""The tools around run.py with decoder-only models: sweep, report, chooser, calibration, shortlist."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_causal import tiny_causal
from transformers import AutoTokenizer, GenerationConfig

from models.errors import UserError
from models.exit_heads import ExitConfig
from models.loading import load_model
from scripts import calibrate, choose_exit, distill_targets, learn_shortlist, report, sweep
from util.backend_arguments import BackendArguments
from util.data.encoding import encoder_for
from util.data.preparation import prepare
from util.data_arguments import DataArguments
from util.script_arguments import DistillationArguments
from util.sweep_arguments import SweepArguments

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    "task": "translation", "dataset_name": "debian_de_en", "max_source_length": 60,
    "val_max_target_length": 8,
}  # fmt: skip
TORCH = {"backend": "torch"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama that was (so it says) trained to exit after layer 2."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    tiny_causal("llama-tied", num_layers=4, **settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    ExitConfig("shallowdeep_ce", 2).save(path)
    return str(path)


def as_argv(**flags):
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.mark.slow
def test_a_sweep_and_its_report(folder, tmp_path):
    sweep.main(
        as_argv(
            free=folder, methods=["Static", "CALM", "FREE", "FREE lossless"], static_layers=[2],
            free_thresholds=[0.02], lossless_thresholds=[0.02], calm_thresholds=[0.02], num_samples=4,
            output_dir=tmp_path / "sweep", **DATA, **TORCH,
        )
    )  # fmt: skip
    rows = {row["name"]: row for row in json.loads((tmp_path / "sweep/sweep.json").read_text())["rows"]}
    (lossless,) = [row for name, row in rows.items() if "lossless" in name]
    assert lossless["unchanged"] == 1.0
    traces = [json.loads(line) for line in (tmp_path / "sweep/traces.jsonl").read_text().splitlines()]
    for trace in traces:
        if trace["setting"].startswith("Full depth"):
            assert trace["deep"] == trace["pieces"]
    report.main([str(tmp_path / "sweep"), "--output_dir", str(tmp_path / "page")])
    assert "Static" in (tmp_path / "page/report.html").read_text()


@pytest.mark.slow
def test_an_exit_is_chosen(folder, tmp_path):
    ending = shutil.copytree(folder, tmp_path / "ending")  # outputs of different lengths
    GenerationConfig(eos_token_id=list(range(1, 4096, 7)), pad_token_id=0).save_pretrained(ending)
    choose_exit.main(
        as_argv(
            model_name_or_path=ending, num_samples=6, thresholds=[0.02, 0.1], measured=1, min_agreement=0.0,
            output_dir=tmp_path, **DATA, **TORCH,
        )
    )  # fmt: skip
    assert len(json.loads((tmp_path / "choice.json").read_text())["predictions"]) == 6


@pytest.mark.slow
def test_a_threshold_is_calibrated_for_its_prompt(folder, tmp_path):
    flags = {
        "model_name_or_path": folder, "use_shallow_deep": True, "max_eval_samples": 8, "report_to": "none",
        "use_cpu": True, "per_device_eval_batch_size": 1, **DATA, **TORCH,
    }  # fmt: skip
    calibrate.main(
        as_argv(
            **flags, output_dir=tmp_path, split="validation", thresholds=[0.5, 0.9], delta=0.9, epsilon=0.5
        )
    )
    content = json.loads((tmp_path / "calibrated_threshold.json").read_text())
    assert content["settings"]["prompt"]


@pytest.mark.slow
def test_a_shortlist_holds_tokens_of_answers(folder, tmp_path):
    argv = as_argv(
        model_name_or_path=folder, size=50, num_samples=3, output_file=tmp_path / "list.json", **DATA
    )
    learn_shortlist.main([*argv, "--split", "test", "--backend", "onnx"])
    learnt = json.loads((tmp_path / "list.json").read_text())
    learn_shortlist.main([*argv, "--split", "test", "--backend", "torch"])
    assert learnt == json.loads((tmp_path / "list.json").read_text())
    tokens = learnt["token_ids"]
    words = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(tokens)
    assert "</s>" in words and "▁package" in words and "▁Translation" not in words


@pytest.mark.slow
def test_a_shortlist_is_learnt_along_one_beam_whatever_the_checkpoints_beams(folder, tmp_path):
    beams = shutil.copytree(folder, tmp_path / "beams")
    settings = GenerationConfig.from_pretrained(beams)
    settings.update(num_beams=4)
    settings.save_pretrained(beams)
    learnt = []
    for model in (folder, beams):
        flags = {"model_name_or_path": model, "size": 50, "num_samples": 2, "split": "test"}
        learn_shortlist.main(as_argv(**flags, output_file=tmp_path / "list.json", **DATA, **TORCH))
        learnt.append(json.loads((tmp_path / "list.json").read_text()))
    assert learnt[0] == learnt[1]


def test_distilled_hypotheses_hold_no_prompt(folder):
    loaded = load_model(folder)
    prepare(loaded, DataArguments(**DATA))
    flags = DistillationArguments(folder, "debian_de_en", Path("unused.jsonl.gz"), max_length=8, num_beams=2)
    (hypotheses,) = distill_targets.decode_beams(loaded, ["Eine Bibliothek"], flags)
    assert len(hypotheses) == 2 and not any("Translation" in text for text in hypotheses)


def test_distilled_on_exported_graphs_a_teacher_says_the_same(folder, tmp_path, monkeypatch, capsys):
    rows = {"id": ["0", "1"], "source": ["Eine Bibliothek", "Dateien"], "target": ["A library", "files"]}
    rows = Dataset.from_dict(rows)
    monkeypatch.setattr(distill_targets, "read_split", lambda *_: rows)
    path = tmp_path / "rows.jsonl.gz"
    argv = as_argv(model_name_or_path=folder, dataset_name="debian_de_en", output_file=path, max_length=40)
    for asked in ("--backend onnx", "--precision w8", "--exit_precision w8"):
        with pytest.raises(SystemExit):
            distill_targets.main([*argv, *asked.split()])
        assert f"error: {asked} decodes one beam: add --num_beams 1.\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        distill_targets.main([*argv, "--output_file", "plain.jsonl"])
    assert "error: --output_file plain.jsonl: what is written is gzipped" in capsys.readouterr().err
    distill_targets.main([*argv, *as_argv(num_beams=1, backend="onnx")])
    with gzip.open(path, "rt", encoding="utf8") as lines:
        written = {row["source"]: row["target"] for row in map(json.loads, lines)}
    loaded = load_model(folder)
    prepare(loaded, DataArguments(**DATA))
    encoder = encoder_for(loaded)
    assert len(written) == 2
    for source, target in written.items():
        inputs = encoder.inputs([source])
        expected = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=44)
        assert encoder.texts(expected[:, inputs["input_ids"].shape[1] :].tolist()) == [target]


def test_models_of_two_kinds_are_not_swept_together(folder, tmp_path):
    flags = SweepArguments(
        free=folder, calm=str(ROOT / "checkpoints/debian-t5-calm"), output_dir=str(tmp_path)
    )
    with pytest.raises(UserError, match=r"^--free and --calm: one has an encoder, the other has none"):
        sweep.sweep(flags, DataArguments(**DATA), BackendArguments(backend="torch"))
