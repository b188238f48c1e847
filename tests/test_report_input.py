"""What the report does without some of its input, and how it answers bad input."""

from __future__ import annotations

import pytest
from report_folders import ABOUT_TOKENS, SECTIONS, build, make_run, make_sweep


@pytest.mark.parametrize(
    ("missing", "sections"),
    [
        ("traces.jsonl", SECTIONS - {"oracle", "judge"}),  # calibration has the adaptive setting's own pairs
        ("sweep.json", ABOUT_TOKENS | {"sources"}),
        ("records.jsonl", {"trade-off", "table", "batches", "calibration", "oracle", "sources"}),
    ],
)
def test_missing_files_omit_their_sections(tmp_path, missing, sections):
    folder, _ = make_sweep(tmp_path / "sweep")
    (folder / missing).unlink()
    assert build(tmp_path, folder).sections == sections


def fail(tmp_path, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        build(tmp_path, folder)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "report").exists()
    return error


def test_folder_without_results(tmp_path, capsys):
    for folder in (tmp_path / "missing", tmp_path):
        error = fail(tmp_path, folder, capsys)
        assert str(folder) in error and "eval_results.json" in error and "scores.json" in error


def change_line(path, number, change):
    lines = path.read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "line", "change", "message"),
    [
        ("records.jsonl", 2, lambda text: text[:40], "not JSON"),
        ("records.jsonl", 3, lambda text: "[]", "not a JSON object"),
        ("records.jsonl", 4, lambda text: text.replace('"pieces"', '"bits"'), "lacks pieces"),
        (
            "records.jsonl",
            5,
            lambda text: text.replace('"setting": "', '"setting": "un'),
            "not in settings.json",
        ),
        ("records.jsonl", 6, lambda text: text.replace("[2, 4, 2, 2]", "[2, 9, 2, 2]"), "1..4"),
        (
            "records.jsonl",
            6,
            lambda text: text.replace('"tokens": 4', '"tokens": "4"'),
            "must be a whole number",
        ),
        ("traces.jsonl", 2, lambda text: text.replace("0.35, ", "", 1), "confidences"),
        ("traces.jsonl", 3, lambda text: text.replace("[0, 0, 0, 1]", "[0, 0, 0, 0]"), "agree with itself"),
    ],
)
def test_broken_line_is_named(tmp_path, capsys, name, line, change, message):
    folder, _ = make_sweep(tmp_path / "sweep")
    change_line(folder / name, line, change)
    error = fail(tmp_path, folder, capsys)
    assert f"{folder / name}, line {line}: " in error and message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rows":\n oops}', "line 2: not JSON"),
        ('{"rows": [{"name": "Full depth", "speedup": "fast"}]}', "speedup must be a number"),
        ('{"rows": [{"name": "Full depth", "interval": [1]}]}', "interval must be [low, high]"),
        ('{"rows": [], "pareto": ["other"]}', "'other' is not in settings.json"),
    ],
)
def test_broken_figures_are_named(tmp_path, capsys, text, message):
    folder, _ = make_sweep(tmp_path / "sweep")
    (folder / "sweep.json").write_text(text)
    error = fail(tmp_path, folder, capsys)
    assert str(folder / "sweep.json") in error and message in error


def test_figures_of_other_records_are_refused(tmp_path, capsys):
    """As a run that was killed, or is still going, may leave them."""
    folder = make_run(tmp_path / "run", 20.0, [1.0] * 4, [4] * 4)
    log = folder / "predictions.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:1]))
    error = fail(tmp_path, folder, capsys)
    assert f"{folder / 'eval_results.json'} is of 4 samples, predictions.jsonl beside it of 1" in error
