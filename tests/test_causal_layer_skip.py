"""A Llama trained by LayerSkip's recipe: our lossless decoding beside Hugging Face's self-speculation."""

from __future__ import annotations

import contextlib
import io
import json
from datetime import date, timedelta

import pytest
import torch
from script_tables import cells_by_row

from models import DecodeStats, Free, SoftmaxGap, load_model
from scripts import benchmark_layer_skip
from scripts.benchmarking.calendar_rows import calendar_rows
from util.layer_skip_arguments import LayerSkipArguments

LAYER, THRESHOLD, DAYS = 2, 0.1, 2
STEPS = 60
SHORT = ["--steps", str(STEPS), "--days", str(DAYS), "--prompts", "4", "--threshold", str(THRESHOLD)]
TOKENS = 28
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "head_dim": 16}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The program's folder and what it prints, of a narrow model that learns two days."""
    folder = tmp_path_factory.mktemp("layer-skip")
    with open("scripts/configs/layer_skip_llama.json") as file:
        config = json.load(file) | NARROW
    (folder / "narrow.json").write_text(json.dumps(config))
    words = ["--config_name", str(folder / "narrow.json"), "--output_dir", str(folder / "out")]
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        benchmark_layer_skip.main([*SHORT, *words])
    return folder / "out", screen.getvalue()


@pytest.fixture
def loaded(ran):
    return load_model(str(ran[0]))


def days(count):
    """Starts of rows that the program keeps out of training."""
    return [row["source"] for row in calendar_rows(DAYS)[:count]]


def decode(loaded, texts, **options):
    inputs = loaded.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    generate = loaded.generate if "exit_policy" in options else loaded.model.generate
    output = generate(**inputs, max_new_tokens=TOKENS, do_sample=False, **options)
    return output[:, inputs["input_ids"].shape[1] :]


def lossless():
    return Free(LAYER, SoftmaxGap(), THRESHOLD, lossless=True)


@pytest.mark.slow
def test_lossless_tokens_are_those_of_assistant_early_exit(loaded):
    shares, rollbacks = [], 0
    for text in days(6):
        stats = DecodeStats()
        ours = decode(loaded, [text], exit_policy=lossless(), decode_stats=stats)
        assert torch.equal(ours, decode(loaded, [text], assistant_early_exit=LAYER)), text
        assert torch.equal(ours, decode(loaded, [text])), text
        shares.append(stats.exit_share)
        rollbacks += stats.rollbacks
    assert sum(shares) / len(shares) > 0.3 and rollbacks > 0, "drafts are accepted and rejected"


@pytest.mark.slow
def test_four_rows_are_those_of_one_where_hugging_face_takes_one(loaded):
    texts = days(4)
    with pytest.raises(ValueError, match="batch_size"):
        decode(loaded, texts, assistant_early_exit=LAYER)
    stats, pad = DecodeStats(), loaded.tokenizer.pad_token_id
    rows = decode(loaded, texts, exit_policy=lossless(), decode_stats=stats)
    assert stats.exit_share > 0
    for text, row in zip(texts, rows, strict=True):
        (alone,) = decode(loaded, [text], assistant_early_exit=LAYER)
        assert torch.equal(row[: len(alone)], alone), text
        assert (row[len(alone) :] == pad).all()


@pytest.mark.slow
def test_the_program_prints_all_methods_and_batches(ran):
    _, output = ran
    rows = cells_by_row(output, "contestant")
    for name in (f"FREE lossless {THRESHOLD}", f"HF assistant_early_exit {LAYER}", "HF generate"):
        assert rows[name]["= HF"] == "1.00" and float(rows[name]["tokens/s"]) > 0
    assert "4 prompts at once: FREE lossless" in output and "100% of outputs are equal" in output


@pytest.mark.slow
def test_a_finished_model_is_not_trained_again(ran):
    folder, _ = ran
    before = (folder / "model.safetensors").stat().st_mtime_ns
    flags = {"config_name": folder.parent / "narrow.json", "steps": STEPS, "days": DAYS}
    benchmark_layer_skip.train(LayerSkipArguments(output_dir=folder, **flags))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_rows_are_the_calendars():
    rows = calendar_rows(9)
    assert len({row["source"] for row in rows}) == 7 * 365
    for row in rows[:300]:
        names = [row["source"], *row["target"].split(", ")]
        assert len(names) == 10
        weekday, text = names[0].split(" ", 1)
        first = date.fromisoformat("2023-01-01") + timedelta(POSITION[text])
        for step, name in enumerate(names):
            expected = first + timedelta(step)
            assert name.split(" ", 1)[1] == f"{expected.day} {expected:%B}".lower()
        start = WEEK.index(weekday)
        assert [name.split()[0] for name in names] == [WEEK[(start + step) % 7] for step in range(10)]


WEEK = [f"{date(2024, 1, 1) + timedelta(step):%A}".lower() for step in range(7)]
YEAR = [date(2023, 1, 1) + timedelta(step) for step in range(365)]  # no leap year
POSITION = {f"{day.day} {day:%B}".lower(): index for index, day in enumerate(YEAR)}
