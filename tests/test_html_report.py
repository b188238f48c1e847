"""The HTML report: what it computes, what it shows of each kind of folder, and how it answers bad input."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from scripts.report import main
from util.analysis import (
    exit_shares,
    first_agreeing_layers,
    oracle,
    pareto_front,
    reliability,
    settled_layers,
)
from util.report.heat_map import depth_shades, relative_luminance

EVIL = "<script>alert('x')</script>"
LAYERS = 4
ABOUT_TOKENS = {"depth", "calibration", "thresholds", "tokens", "oracle"}
SECTIONS = ABOUT_TOKENS | {"trade-off", "table", "batches", "judge", "sources"}


# Computations


def test_reliability_by_hand():
    # Bins of a half: [0, 0.5) holds 0.1 and 0.3, [0.5, 1] holds 0.5, 0.7 and 1.0.
    found = reliability([0.1, 0.3, 0.5, 0.7, 1.0], [0, 1, 1, 0, 1], num_bins=2)
    assert [entry.count for entry in found.bins] == [2, 3]
    assert [entry.agreement for entry in found.bins] == pytest.approx([1 / 2, 2 / 3])
    assert [entry.confidence for entry in found.bins] == pytest.approx([0.2, 2.2 / 3])
    assert found.ece == pytest.approx((2 * abs(0.2 - 0.5) + 3 * abs(2.2 / 3 - 2 / 3)) / 5)
    assert found.agreement == pytest.approx(0.6) and found.confidence == pytest.approx(0.52)


def test_reliability_leaves_empty_bins_out():
    assert [entry.low for entry in reliability([0.95, 0.05], [1, 0]).bins] == [0.0, 0.9]
    assert reliability([], []) is None


def test_oracle_layers_by_hand():
    agrees = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 1]])
    assert first_agreeing_layers(agrees).tolist() == [1, 1, 4, 2]
    assert settled_layers(agrees).tolist() == [1, 3, 4, 4]
    found = oracle(settled_layers(agrees), 4)
    assert found.counts == [1, 0, 1, 2] and found.mean == 3 and found.ideal_speedup == pytest.approx(4 / 3)


def test_exit_shares_and_pareto_front():
    assert exit_shares([4, 2, 2, 4, 4, 1, 4, 4]) == {1: 0.125, 2: 0.25, 4: 0.625}
    assert pareto_front([(1, 100), (2, 99), (1.5, 98), (2, 99), (0.9, 100)]) == [0, 1, 3]


def test_every_shade_is_legible():
    for shade in depth_shades():
        first, second = (
            relative_luminance(*(int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)))
            for color in shade.values()
        )
        assert (max(first, second) + 0.05) / (min(first, second) + 0.05) >= 4.5  # WCAG AA


# Folders as the programs write them


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf8")


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


def make_record(number, exit_layers, seconds=0.5, **more):
    pieces = ["▁Text", EVIL, "▁", "</s>"]
    return {
        "id": f"s{number}",
        "prediction": f"Text{EVIL}",
        "reference": f"reference {EVIL}",
        "tokens": 4,
        "pieces": pieces,
        "exit_layers": exit_layers,
        "seconds": seconds,
        "layer_calls": 10,
        "layer_tokens": 16,
        "full_layer_calls": 4 * LAYERS,
        **more,
    }


SETTINGS = [
    {
        "name": name,
        "method": method,
        "checkpoint": "free",
        "threshold": None if method == "Full depth" else 0.4,
        "shallow_layer": None if method == "Full depth" else 2,
        "batch_size": size,
        "num_layers": LAYERS,
    }
    for name, method, size in [
        ("Full depth", "Full depth", 1),
        ("FREE <b>0.4</b>", "FREE", 1),
        ("adaptive | x", "FREE adaptive", 1),
        ("Full depth, batch 4", "Full depth", 4),
        ("FREE 0.4, batch 4", "FREE", 4),
    ]
]
EXITS = {"Full depth": [4, 4, 4, 4], "FREE": [2, 4, 2, 2], "FREE adaptive": [2, 2, 4, 4]}


def make_sweep_records():
    """Three samples of each setting."""
    records = []
    for setting in SETTINGS:
        for row in range(3):
            record = make_record(row, EXITS[setting["method"]], setting=setting["name"], row=row)
            if setting["method"] == "FREE adaptive":
                record |= {"threshold": 0.4 + row / 10, "calibration": [[0.9, 1], [0.2, 0]]}
            records.append(record)
    return records


def make_trace(record):
    return {key: record[key] for key in ("setting", "row", "id", "pieces", "exit_layers")} | {
        "confidences": [[0.1, 0.35, 0.6, 0.9]] * 4,
        "agrees": [[0, 1, 1, 1], [1, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]],
        "deep": ["▁Text", "▁other", "▁", "</s>"],
    }


def make_figures(index, setting):
    """A setting's row of sweep.json."""
    return setting | {
        "bleu": 20 + index,
        "chrf": 40.5,
        "interval": [18.0, 23.5],
        "quality_share": 100.0 - index,
        "quality_share_interval": [95.0, 104.0],
        "speedup": 1 + index / 2,
        "speedup_interval": [0.9, 3.0],
        "tokens_per_second": 100.0 * (index + 1),
        "ms_per_token": 4.0,
        "average_layers": 3.25 if index else None,
    }


def make_sweep(folder):
    """Two methods and an adaptive threshold on one checkpoint, at two batch sizes."""
    records = make_sweep_records()
    rows = [make_figures(index, setting) for index, setting in enumerate(SETTINGS)]
    context = {
        "arguments": {"free": "checkpoints/free", "note": EVIL},
        "environment": {"torch": "2"},
        "dataset": "debian_de_en",
        "split": "test",
        "task": "translation",
        "main_score": "bleu",
        "samples": 3,
        "settings": SETTINGS,
    }
    write_json(folder / "settings.json", context)
    write_lines(folder / "records.jsonl", records)
    write_lines(folder / "traces.jsonl", map(make_trace, records))
    summary = {
        "auc": {"FREE (free)": 0.87654},
        "fastest_99": {"Full depth": "Full depth", "FREE": "FREE <b>0.4</b>", "FREE adaptive": None},
        "pareto": ["FREE <b>0.4</b>"],
    }
    write_json(folder / "sweep.json", {"rows": rows, **summary})
    return folder, rows


def make_run(folder, bleu, seconds, exits, stage="eval", **flags):
    names = {"eval": "predictions.jsonl", "predict": "predictions_test.jsonl"}
    figures = {
        "bleu": bleu,
        "samples": 4,
        "batch_size": 1,
        "tokens_per_second": 16 / sum(seconds),
        "average_layers": 3.0,
        "ideal_speedup": 1.5,
        "arguments": {"model_name_or_path": "checkpoints/free", "dataset_name": "debian_de_en", **flags},
        "confidence_intervals": {"bleu": [bleu - 2, bleu + 2]},
        "environment": {"device": "cpu", "threads": 1},
    }
    write_json(folder / f"{stage}_results.json", figures)
    write_lines(folder / names[stage], [make_record(row, exits, time) for row, time in enumerate(seconds)])
    return folder


def make_judge(folder, systems=("free", "full")):
    def means(value):
        return {
            name: {"mean": value, "interval": [value - 0.5, value + 0.5]} for name in ("fluency", "average")
        }

    position = {
        "first_share": 0.75,
        "consistency": 0.5,
        "always_first": 2,
        "always_second": 0,
        "p_value": 0.5,
    }
    pairwise = {
        "systems": list(systems), "samples": 4, "incomplete_pairs": 1, "wins": 1, "losses": 2, "ties": 1,
        "win_rate": 1 / 3, "interval": [0.01, 0.9], "p_value": 0.0001, "position": position,
    }  # fmt: skip
    likert = {"systems": {system: {"samples": 4, **means(3.25)} for system in systems}}
    write_json(folder / "scores.json", {"judges": {"judge": {"likert": likert, "pairwise": pairwise}}})
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf8")
        self.tags, self.text, self.hidden = [], "", None
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.hidden = None

    def handle_data(self, data):
        self.text += "" if self.hidden else data

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    @property
    def sections(self):
        return {attrs["aria-labelledby"] for tag, attrs in self.tags if tag == "section"}


def build(tmp_path, *folders):
    main([*map(str, folders), "--output_dir", str(tmp_path / "report")])
    return Page(tmp_path / "report" / "report.html")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A page of all three kinds of folders."""
    folder = tmp_path_factory.mktemp("all")
    sweep, _ = make_sweep(folder / "sweep")
    run = make_run(folder / "run", 21.0, [0.5] * 4, [2, 4, 2, 2], use_shallow_deep=True)
    return build(folder, sweep, run, make_judge(folder / "judge")), folder / "report"


# The page


def test_all_sections(everything):
    page, folder = everything
    assert page.sections == SECTIONS
    assert set(page.attributes("href")) - {"data:,"} >= {f"#{section}" for section in SECTIONS}
    names = {"report.html", "report.csv", "report.md", "trade_off.png", "trade_off.svg"}
    assert {path.name for path in folder.iterdir()} == names
    assert len(page.source) < 3_000_000


def test_nothing_is_fetched(everything):
    page, _ = everything
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http-equiv', "", page.source)
    assert all(
        target.startswith(("#", "data:")) for target in page.attributes("href") + page.attributes("src")
    )
    assert not {"link", "img", "iframe", "object"} & {
        tag for tag, attrs in page.tags if attrs.get("href") != "data:,"
    }
    assert "@import" not in page.source and not re.search(r"url\((?!#)", page.source)


def test_text_is_escaped(everything):
    page, _ = everything
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert EVIL in page.text and EVIL not in page.source
    assert "FREE <b>0.4</b>" in page.text and "FREE <b>" not in page.source


def test_page_is_accessible(everything):
    page, _ = everything
    ids = Counter(page.attributes("id"))
    assert max(ids.values()) == 1
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg")
    assert {attrs.get("scope") for tag, attrs in page.tags if tag == "th"} == {"col", "row"}
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["h1"] == tags["main"] == 1 and tags["table"] == tags["caption"]
    assert "prefers-color-scheme: dark" in page.source and ("html", {"lang": "en"}) in page.tags
    references = re.findall(r'(?:url\(#|href="#)([^")]+)', page.source)
    assert set(references) <= set(ids)


def test_tokens_tell_their_exit(everything):
    page, _ = everything
    details = [attrs["title"] for _, attrs in page.tags if attrs.get("class", "").startswith("token ")]
    assert (
        f"“{EVIL}” left after layer 4 of 4; confidence 0.35 at layer 2, 0.90 at layer 4; deep model: “other”"
        in (details)
    )
    assert "“␣” left after layer 2 of 4; confidence 0.35 at layer 2; deep model: “␣”" in details
    assert "“Text” left after layer 2 of 4" in details  # the run has no trace
    shades = {attrs["class"] for _, attrs in page.tags if attrs.get("class", "").startswith("token ")}
    assert shades == {"token d7", "token d20", "token d7 differs", "token d20 differs"}


def test_figures_of_exits(everything):
    text = " ".join(everything[0].text.split())
    assert "layer 2 (free) 12 0.350 0.500 0.150" in text  # 12 tokens, half of which agree after layer 2
    assert "free, from there on 12 3.000 1.333 0.500" in text
    assert "free, at all 12 2.250 1.778 0.250" in text
    labels = everything[0].attributes("aria-label")
    assert "layer 2: 75.0% of 12 tokens; layer 4: 25.0% of 12 tokens" in labels
    assert any("adaptive | x: from 0.40 to 0.60" in label for label in labels)
    assert any("FREE <b>0.4</b>: 200 at 1, 500 at 4" in label for label in labels)


def test_points_tell_their_figures(everything):
    page, _ = everything
    figures = "2.00× speed-up [0.90, 3.00], 98.00% of full depth [95.00, 104.00]"
    assert page.text.count(f"adaptive | x: {figures}") == 1
    assert "the same near" not in page.text


def test_bad_settings_do_not_hide_the_others(tmp_path):
    folder, _ = make_sweep(tmp_path / "sweep")
    figures = json.loads((folder / "sweep.json").read_text())
    figures["rows"][2]["quality_share"] = 40.0
    write_json(folder / "sweep.json", figures)
    text = build(tmp_path, folder).text
    assert "the same near 99%" in text and text.count("FREE <b>0.4</b>: 1.50× speed-up") == 2


def test_judge(everything):
    page, _ = everything
    labels = page.attributes("aria-label")
    assert "free better: 1 samples; tie: 1 samples; full better: 2 samples" in labels
    assert "75% of answers chose the text shown first" in labels
    assert "0.33 [0.01, 0.90], p < 0.001" in page.text


def test_judge_without_pairs_or_answers(tmp_path):
    scores = {"judges": {"m": {"likert": {"systems": {"free": {"samples": 0}}}, "pairwise": {"samples": 0}}}}
    write_json(tmp_path / "judge" / "scores.json", scores)
    build(tmp_path, make_sweep(tmp_path / "sweep")[0])
    page = build(tmp_path, tmp_path / "judge")  # the sweep's table must not stay behind
    assert page.sections == {"judge"} and not (tmp_path / "report" / "report.csv").exists()


# CSV and Markdown


def test_csv_and_markdown_hold_the_figures(tmp_path):
    folder, rows = make_sweep(tmp_path / "sweep")
    build(tmp_path, folder)
    with (tmp_path / "report" / "report.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["name"] for row in found] == [row["name"] for row in rows]
    for ours, given in zip(found, rows, strict=True):
        for key in ("bleu", "chrf", "quality_share", "speedup", "tokens_per_second"):
            assert float(ours[key]) == given[key]
        assert [float(ours[f"bleu_interval_{end}"]) for end in ("low", "high")] == given["interval"]
        assert [float(ours[f"speedup_interval_{end}"]) for end in ("low", "high")] == given[
            "speedup_interval"
        ]
    assert [row["pareto"] for row in found] == ["False", "True", "False", "False", "False"]
    heading, rule, *lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert heading.startswith("| setting | checkpoint | BLEU | % of full depth | speed-up |")
    assert len(lines) == 5 and rule.count("|") == heading.count("|")
    assert lines[2].startswith("| adaptive \\| x | free | 22 [18.00, 23.50] | 98.00 [95.00, 104.00] | 2.00 [")


# Runs


def test_runs_are_compared_with_full_depth(tmp_path):
    full = make_run(tmp_path / "full", 20.0, [1.0, 2.0, 1.0, 2.0], [4] * 4)
    free = make_run(tmp_path / "free", 19.0, [0.5, 1.0, 0.5, 1.0], [2, 4, 2, 2], use_shallow_deep=True)
    slow = make_run(tmp_path / "calm", 18.0, [2.0] * 4, [1, 3, 4, 4], use_early_exit=True)
    page = build(tmp_path, full, free, slow)
    with (tmp_path / "report" / "report.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["free"]["speedup"]) == 2 and float(rows["free"]["quality_share"]) == 95
    assert float(rows["free"]["speedup_interval_low"]) == pytest.approx(2)
    assert float(rows["free"]["real_over_ideal"]) == pytest.approx(2 / 1.5)
    assert {name: row["pareto"] for name, row in rows.items()} == {
        "full": "True", "free": "True", "calm": "False",
    }  # fmt: skip
    assert page.sections == {"trade-off", "table", "depth", "tokens", "sources"}


def test_runs_on_other_samples_are_not_compared(tmp_path):
    full = make_run(tmp_path / "full", 20.0, [1.0] * 4, [4] * 4)
    free = make_run(tmp_path / "free", 19.0, [0.5] * 3, [2] * 4, use_shallow_deep=True)
    build(tmp_path, full, free)
    with (tmp_path / "report" / "report.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert not rows["free"].get("speedup") and rows["full"]["speedup"] == "1.0"


def test_both_stages_of_a_run_and_equal_folder_names(tmp_path):
    for parent in ("a", "b"):
        make_run(tmp_path / parent / "run", 20.0, [1.0] * 4, [4] * 4)
        make_run(tmp_path / parent / "run", 20.0, [1.0] * 4, [4] * 4, stage="predict")
    build(tmp_path, tmp_path / "a" / "run", tmp_path / "b" / "run")
    with (tmp_path / "report" / "report.csv").open(newline="") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert names == [
        f"{tmp_path / parent / 'run'} ({stage})" for parent in ("a", "b") for stage in ("eval", "predict")
    ]


# Missing and broken input


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
        ("records.jsonl", 3, lambda text: "[]", "expected a JSON object"),
        ("records.jsonl", 4, lambda text: text.replace('"pieces"', '"bits"'), "lacks pieces"),
        (
            "records.jsonl",
            5,
            lambda text: text.replace('"setting": "', '"setting": "un'),
            "not in settings.json",
        ),
        ("records.jsonl", 6, lambda text: text.replace("[2, 4, 2, 2]", "[2, 9, 2, 2]"), "1..4"),
        ("records.jsonl", 6, lambda text: text.replace('"tokens": 4', '"tokens": "4"'), "must be numbers"),
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
