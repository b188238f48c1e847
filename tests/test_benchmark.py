"""The benchmark: every contestant in table and JSON, equal outputs where they must be, what floors count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import BART_SETTINGS, T5_SETTINGS, VOCABULARY

from models.errors import UserError
from scripts import benchmark
from scripts.benchmarking import ctranslate, figures
from scripts.benchmarking.contestants import Coin, Contestant, Output, build_policy, enter_contestants
from scripts.benchmarking.speed_figure import speed_figure
from scripts.benchmarking.subjects import open_subject
from util.methods import CALM
from util.script_arguments import BenchmarkArguments

SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
FOUR = {"encoder_layers": 4, "decoder_layers": 4}
LAST = {"pad_token_id": VOCABULARY - 1, "decoder_start_token_id": VOCABULARY - 1}
CONFIGS = {
    "t5": T5_SETTINGS | {"num_layers": 4, "num_decoder_layers": 4, "initializer_factor": 3.0},
    "bart": BART_SETTINGS | FOUR | {"init_std": 0.1},
    "marian": BART_SETTINGS | FOUR | LAST | {"init_std": 0.02},
}
QUICK = {"source_length": 7, "target_length": 6, "samples": 3, "batch_size": 2}


@pytest.fixture
def config(tmp_path):
    """Writes the config of a tiny model of a family: its path."""

    def write(family):
        path = tmp_path / f"{family}.json"
        path.write_text(json.dumps({"model_type": family} | SMALL | CONFIGS[family]))
        return str(path)

    return write


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch):
    monkeypatch.setitem(figures.READ_BYTES, "cpu", 2**20)


def run(capsys, *words):
    """Table, records and what was said on the way."""
    capsys.readouterr()
    benchmark.main([*words, "--rivals", "HF generate"])
    output = capsys.readouterr()
    *table, line = output.out.splitlines()
    return "\n".join(table), json.loads(line), output.err


def open_varied(flags):
    """A subject whose outputs are not one token again and again, as random weights' are."""
    subject = open_subject(flags.models[0], flags)
    decoder = subject.loaded.model.get_decoder()
    with torch.no_grad():
        if hasattr(decoder, "embed_positions"):
            decoder.embed_positions.weight *= 10
        else:
            decoder.embed_tokens.weight *= 0.02
    return subject


def outputs_of(subject, flags, folder):
    """Every contestant's outputs, one after the other."""
    contestants = list(enter_contestants(subject, flags, folder))
    return {one.name: [one.decode(batch) for batch in subject.batches] for one in contestants}


def tokens_of(outputs):
    return [row for output in outputs for row in output.tokens]


def test_table_and_json_have_every_method(config, capsys):
    words = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]
    table, (record,), said = run(capsys, "--models", config("t5"), "--backends", "torch", *words)
    rows = {row["name"]: row for row in record["rows"]}
    methods = ("Full depth", "FREE", "CALM", "Static")  # random weights have no use for lossless
    assert list(rows) == ["HF generate", *(f"torch {method}" for method in methods)]
    assert all(name in table for name in rows) and "warming up" not in table
    assert f"{config('t5')}: preparing" in said
    assert record["samples"] == 3 and record["arguments"]["target_length"] == 6
    assert {"git", "torch", "transformers", "threads", "onnxruntime"} <= set(record["environment"])
    for row in rows.values():
        assert row["tokens"] == 3 * 6 and row["tokens_per_second"] > 0 and row["over_floor"] > 0
        assert "agreement" not in row  # of random weights it says nothing
    static, full = rows["torch Static"], rows["torch Full depth"]
    assert static["average_layers"] == 1 and static["ideal_speedup"] == 4 and static["exit_share"] == 1
    assert full["average_layers"] == 4 and "speedup" not in full
    assert static["speedup"] == pytest.approx(full["ms_per_token"] / static["ms_per_token"])
    assert static["real_over_ideal"] == pytest.approx(static["speedup"] / 4)
    panel = speed_figure([record]).axes[0]
    names = [label.get_text() for label in panel.get_yticklabels()]
    shown = dict(zip(names, [bar.get_width() for bar in panel.patches], strict=True))
    assert shown == {name: row["ms_per_token"] for name, row in rows.items()}
    assert list(shown.values()) == sorted(shown.values())


@pytest.mark.slow
def test_trained_weights_agree_where_they_must(capsys):
    words = [
        "--models",
        "embedded",
        "--samples",
        "2",
        "--backends",
        "torch",
        "--methods",
        "FREE lossless",
        "CALM",
    ]
    _, records, _ = run(capsys, *words)
    assert [record["model"] for record in records] == ["debian-t5-free", "debian-t5-calm", "debian-bart-free"]
    for record in records:
        rows = {row["name"]: row for row in record["rows"]}
        must_agree = [row for name, row in rows.items() if name != "torch CALM"]
        assert ("torch CALM" in rows) == (record["model"] == "debian-t5-calm") == (len(must_agree) == 2)
        assert {row["agreement"] for row in must_agree} == {1.0}
        assert len({row["bleu"] for row in must_agree}) == 1 and must_agree[0]["bleu"] > 0


@pytest.mark.slow  # exports
def test_backends_agree(config, tmp_path):
    """Full depth's tokens with Hugging Face's; FREE's among backends, as their coins are equal."""
    chosen = {"backends": ["torch", "onnx fp32"], "rivals": ["HF generate"], "methods": ["FREE"]}
    subject = open_varied(flags := BenchmarkArguments(models=[config("t5")], **chosen, **QUICK))
    outputs = outputs_of(subject, flags, tmp_path)
    expected = tokens_of(outputs["HF generate"])
    assert len({token for row in expected for token in row}) > 5
    for method in ("Full depth", "FREE"):
        ours, fast = outputs[f"torch {method}"], outputs[f"onnx fp32 {method}"]
        assert tokens_of(ours) == tokens_of(fast)
        assert [one.stats.exit_layers for one in ours] == [one.stats.exit_layers for one in fast]
        assert (tokens_of(ours) == expected) == (method == "Full depth")


@pytest.mark.parametrize("family", CONFIGS)
def test_ctranslate2_agrees(family, config, tmp_path):
    pytest.importorskip("ctranslate2")
    flags = BenchmarkArguments(models=[config(family)], backends=["torch"], methods=["Static"], **QUICK)
    outputs = outputs_of(open_varied(flags), flags, tmp_path)
    assert {len(row) for rows in outputs.values() for row in tokens_of(rows)} == {6}
    expected = tokens_of(outputs["HF generate"])
    assert len({token for row in expected for token in row}) > 2
    assert tokens_of(outputs["CTranslate2 float32"]) == expected


def test_missing_ctranslate2_is_left_out_with_one_line(config, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(ctranslate, "is_installed", lambda: False)
    flags = BenchmarkArguments(models=[config("t5")], backends=["torch"], **QUICK)
    benchmark.announce_missing(flags)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "CTranslate2 float32, CTranslate2 int8" in said
    (command,) = [word for word in said.split("pip install -r ")[1].split() if "requirements" in word]
    assert (Path(benchmark.__file__).parents[1] / command).is_file()
    subject = open_subject(flags.models[0], flags)
    assert not [one for one in enter_contestants(subject, flags, tmp_path) if "CTranslate2" in one.name]


def test_coins_are_repeated_and_follow_their_share(config):
    subject = open_subject(path := config("t5"), BenchmarkArguments(models=[path], **QUICK))
    view, coin = subject.loaded.view, Coin(0.7)
    states = view.embed(None, subject.batches[0].inputs["input_ids"])[0]  # (S, D)

    def toss():
        coin.restart(3)
        return [value for _ in range(300) for value in coin(view, states, 1).confidence.tolist()]

    first = toss()
    assert first == toss() and set(first) == {0, 1}
    assert sum(first) / len(first) == pytest.approx(0.7, abs=0.05)
    # CALM tests three of four layers: with probability 1/2 each, 7 of 8 tokens exit.
    flags = BenchmarkArguments(models=[path], exit_share=0.875, **QUICK)
    assert build_policy(CALM, subject, flags)[1].share == pytest.approx(0.5)


def test_floor_counts_what_every_token_reads(config):
    subject = open_subject(path := config("t5"), BenchmarkArguments(models=[path], **QUICK))
    floor = figures.Floor.of(subject, bandwidth=1e6)
    attentions, feed_forward, norms = (4 + 2) * 32 * 32, 2 * 32 * 48, 3 * 32  # cross: queries and output
    layers = 4 * (attentions + feed_forward + norms) + 32 * 4  # and one table of position biases
    weights = layers + 32 * VOCABULARY
    output = Output([[5, 6, 7], [5]], seconds=1.0)  # three steps
    assert floor.seconds(output, "fp32") == pytest.approx(3 * 4 * weights / 1e6)
    assert floor.seconds(output, "w8") == pytest.approx(3 * (1 + 4 / 64) * weights / 1e6)


def test_contestants_take_turns(config):
    subject = open_subject(
        path := config("t5"), BenchmarkArguments(models=[path], **QUICK | {"batch_size": 1})
    )
    log = []

    def contestant(name):
        def decode(batch):
            log.append(f"{name}{batch.number}")
            return Output([[1]], 1.0)

        return Contestant(name, name, name, "fp32", decode)

    benchmark.decode_in_turn(subject, [contestant(name) for name in "abc"])
    warm_up, timed = log[:6], log[6:]
    assert warm_up == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert timed == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--models", "t6-base"], "--models: there is no t6-base; choose of embedded, bart-large, t5-base,"),
        (["--backends", "onnx"], "--backends: there is no onnx; choose of torch, compile,"),
        (["--methods", "Free"], "--methods: there is no Free; choose of FREE,"),
        (["--rivals", "llama.cpp"], "--rivals: there is no llama.cpp; choose of HF generate,"),
        (["--figure_file", "speed.gif"], "--figure_file speed.gif: name an .svg or a .png."),
        (["--samples", "0"], "--samples must be positive, got 0."),
        (["--models", "t5-base", "--exit_share", "1.5"], "--exit_share must lie in [0, 1], got 1.5."),
        (
            ["--exit_share", "0.5"],
            "--exit_share has no effect here: add a model with random weights to --models.",
        ),
        (
            ["--models", "t5-base", "--free_threshold", "0.5"],
            "--free_threshold has no effect here: add embedded",
        ),
        (
            ["--methods", "Static", "--calm_threshold", "0.5"],
            "--calm_threshold has no effect here: add CALM to",
        ),
        (
            ["--models", "t5-base", "--methods", "FREE lossless"],
            "--methods: random weights are not decoded by",
        ),
        (
            ["--shallow_exit_layer", "8", "--samples", "1"],
            "--shallow_exit_layer must lie in 1..7 of debian-t5",
        ),
    ],
)
def test_bad_flags_get_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*words, "--rivals", "HF generate"] if "--rivals" not in words else words)
    errors = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {line}")


def test_configs_that_are_none_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "bert"}')
    flags = BenchmarkArguments(models=[str(path)])
    with pytest.raises(UserError, match=f"--models {path}: "):
        open_subject(str(path), flags)
