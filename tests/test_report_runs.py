"""The HTML report of run.py's folders, which were timed apart from each other, and of several data sets."""

from __future__ import annotations

import json
import re

import pytest
from report_folders import build, make_run, make_sweep, read_csv, write_json

from util.report.folders import read_folders

TIME_RATIOS = {"speedup", "speedup_interval_low", "speedup_interval_high", "real_over_ideal"}


def test_runs_timed_apart_get_no_speedup(tmp_path):
    full = make_run(tmp_path / "full", 20.0, [1.0, 2.0, 1.0, 2.0], [4] * 4)
    free = make_run(tmp_path / "free", 19.0, [0.5, 1.0, 0.5, 1.0], [2, 4, 2, 2], use_shallow_deep=True)
    slow = make_run(tmp_path / "calm", 18.0, [2.0] * 4, [1, 3, 4, 4], use_early_exit=True)
    page = build(tmp_path, full, free, slow)
    rows = {row["name"]: row for row in read_csv(tmp_path)}
    assert {name: float(row["quality_share"]) for name, row in rows.items()} == {
        "full": 100, "free": 95, "calm": 90,
    }  # fmt: skip
    assert not TIME_RATIOS & set(rows["free"])
    assert {(row["interleaved"], row["pareto"]) for row in rows.values()} == {("False", "False")}
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "| speed-up |" not in markdown and "| % of full depth |" in markdown
    for text in (page.text, markdown):
        assert "Timed apart from each other" in " ".join(text.split())
        assert "2.00×" not in text and "[2.00, 2.00]" not in text
    assert "Quality against ideal speed-up" in page.text  # layers run, which no clock disturbs
    assert "free: 1.50× ideal speed-up, 95.00% of full depth" in page.text
    assert page.sections == {"trade-off", "table", "depth", "tokens", "sources"}


def test_cards_of_runs_show_no_speedup(tmp_path):
    full = make_run(tmp_path / "full", 20.0, [1.0] * 4, [4] * 4)
    free = make_run(tmp_path / "free", 19.0, [0.5] * 4, [2, 4, 2, 2], use_shallow_deep=True)
    page = build(tmp_path, full, free)
    (cards,) = re.findall(r'<ul class="cards".*?</ul>', page.source, re.DOTALL)
    assert "×" not in cards and "95.0% of full depth&#39;s" in cards and "<b>19.00</b>" in cards


def test_sweep_that_does_not_say_it_took_turns_gets_no_speedup(tmp_path):
    folder, _ = make_sweep(tmp_path / "sweep")
    content = json.loads((folder / "settings.json").read_text())
    del content["interleaved"]
    write_json(folder / "settings.json", content)
    page = build(tmp_path, folder)
    (row, *_) = read_csv(tmp_path)
    assert not TIME_RATIOS & set(row) and row["quality_share"] == "100.0"
    assert "× speed-up" not in page.text and "1.50×" not in page.text and "Timed apart" in page.text
    assert row["pareto"] == "False" and "Area under the curve" not in page.text


@pytest.mark.slow
def test_run_beside_a_sweep_keeps_its_speedups_apart(tmp_path):
    sweep, figures = make_sweep(tmp_path / "sweep")
    run = make_run(tmp_path / "run", 21.0, [0.5] * 4, [2, 4, 2, 2], use_shallow_deep=True)
    build(tmp_path, sweep, run)
    speedups = {row["name"]: row["speedup"] for row in read_csv(tmp_path)}
    assert speedups == {row["name"]: str(row["speedup"]) for row in figures} | {"run": ""}


def test_runs_on_other_samples_are_not_compared(tmp_path):
    full = make_run(tmp_path / "full", 20.0, [1.0] * 4, [4] * 4)
    free = make_run(tmp_path / "free", 19.0, [0.5] * 3, [2] * 4, use_shallow_deep=True)
    build(tmp_path, full, free)
    shares = {row["name"]: row["quality_share"] for row in read_csv(tmp_path)}
    assert shares == {"full": "100.0", "free": ""}


DIFFERENCES = [  # the group, what differs, whether the runs compare
    ("arguments", {"shallow2deep_conf_threshold": 0.4, "conf_shortlist": "a.json"}, True),
    ("arguments", {"exit_adapter_path": "exit", "exit_precision": "w8"}, True),
    ("arguments", {"validation_file": "copy.jsonl", "max_eval_samples": 4, "threads": 2}, True),
    ("arguments", {"backend": "onnx"}, True),
    ("arguments", {"max_length": 8}, False),
    ("arguments", {"max_source_length": 64}, False),
    ("arguments", {"prompt_template": "{source}"}, False),
    ("arguments", {"num_shots": 2}, False),
    ("arguments", {"source_prefix": "translate: "}, False),
    ("arguments", {"model_name_or_path": "other"}, False),
    ("environment", {"threads": 4, "torch": "3"}, True),
    ("environment", {"backend": "onnx"}, False),
    ("environment", {"precision": "w4"}, False),
    ("environment", {"dtype": "bfloat16"}, False),
]


@pytest.mark.parametrize(("group", "change", "compares"), DIFFERENCES)
def test_runs_compare_where_only_the_method_differs(tmp_path, group, change, compares):
    full = make_run(tmp_path / "full", 20.0, [1.0] * 4, [4] * 4)
    free = make_run(tmp_path / "free", 19.0, [0.5] * 4, [2, 4, 2, 2], use_shallow_deep=True)
    content = json.loads((free / "eval_results.json").read_text())
    content[group] |= change
    write_json(free / "eval_results.json", content)
    _, ours = read_folders([full, free]).sets
    assert ours.settings[0].figures.get("quality_share") == (95 if compares else None)


def test_runs_of_the_same_samples_share_their_cards(tmp_path):
    full = make_run(tmp_path / "full", 20.0, [1.0] * 4, [4] * 4)
    free = make_run(tmp_path / "free", 19.0, [0.5] * 4, [2, 4, 2, 2], use_shallow_deep=True)
    calm = make_run(tmp_path / "calm", 18.0, [2.0] * 4, [1, 3, 4, 4], use_early_exit=True)
    other = make_run(
        tmp_path / "other", 18.0, [2.0] * 4, [1, 3, 4, 4], dataset_name=None, validation_file="x"
    )
    page = build(tmp_path, full, free, calm, other)
    cards = re.findall(r"<article.*?</article>", page.source, re.DOTALL)
    shown = [re.findall(r"<dt>(.*?)</dt>", card)[2:] for card in cards]
    assert shown == [["full", "free", "calm"]] * 4 + [["other"]] * 4


@pytest.mark.slow
def test_data_sets_get_tables_of_their_own(tmp_path):
    sweep, _ = make_sweep(tmp_path / "sweep")
    other, _ = make_sweep(tmp_path / "other")
    content = json.loads((other / "settings.json").read_text())
    write_json(other / "settings.json", content | {"dataset": "iwslt"})
    local = make_run(tmp_path / "local", 18.0, [1.0] * 4, [4] * 4, dataset_name=None, validation_file="a.csv")
    page = build(tmp_path, sweep, other, local)
    captions = [
        "debian_de_en, 3 test samples",
        "iwslt, 3 test samples",
        "a.csv, 4 validation samples, batch size 1",
    ]
    assert re.findall(r"<caption>(.*?samples.*?)</caption>", page.source) == captions
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert re.findall(r"^\*\*(.*)\*\*$", markdown, re.MULTILINE) == captions
    for part in ("trade-off-0", "throughput"):  # a line or mark of each data set
        assert page.source.count(f'id="{part}-') > 0
    (throughput,) = [
        label for label in page.attributes("aria-label") if label.startswith("Tokens per second")
    ]
    assert throughput.count("FREE <b>0.4</b>: 200 at 1, 500 at 4") == 2
    assert "FREE (free), iwslt, 3 test samples" in page.text
    assert {row["dataset"] for row in read_csv(tmp_path)} == {"debian_de_en", "iwslt", "a.csv"}


@pytest.mark.parametrize(
    ("flags", "threshold"),
    [
        ({"use_shallow_deep": True}, 0.9),
        ({"use_early_exit": True}, 0.9),
        ({"use_shallow_deep": True, "shallow2deep_conf_threshold": 0.4}, 0.4),
        ({"use_early_exit": True, "exit_conf_threshold": 0.0}, 0.0),
        ({"use_shallow_deep": True, "auto_exit": True}, None),
        ({"static_exit_layer": 2}, None),
        ({}, None),
    ],
)
def test_thresholds_that_no_flag_changed_are_shown(tmp_path, flags, threshold):
    folder = make_run(tmp_path / "run", 20.0, [1.0] * 4, [4] * 4, **flags)
    (result,) = read_folders([folder]).sets
    assert result.settings[0].threshold == threshold


@pytest.mark.slow
def test_local_data_of_different_places_get_tables_of_their_own(tmp_path):
    places = [
        {"data_dir": "a"},
        {"data_dir": "b"},
        {"data_dir": "b", "validation_file": "c.csv"},
        {"dataset_name": "iwslt", "dataset_config_name": "2017"},
        {"dataset_name": "iwslt", "source_lang": "de", "target_lang": "en"},
    ]
    folders = [
        make_run(tmp_path / str(number), 20.0, [1.0] * 4, [2, 4, 2, 2], **{"dataset_name": None} | place)
        for number, place in enumerate(places)
    ]
    page = build(tmp_path, *folders)
    captions = re.findall(r"<caption>(.*?), 4 validation samples", page.source)
    assert captions == ["a", "b", "c.csv", "iwslt, 2017", "iwslt, de-en"]
    assert [row["dataset"] for row in read_csv(tmp_path)] == captions


def test_both_stages_of_a_run_and_equal_folder_names(tmp_path):
    for parent in ("a", "b"):
        make_run(tmp_path / parent / "run", 20.0, [1.0] * 4, [4] * 4)
        make_run(tmp_path / parent / "run", 20.0, [1.0] * 4, [4] * 4, stage="predict")
    build(tmp_path, tmp_path / "a" / "run", tmp_path / "b" / "run")
    names = [row["name"] for row in read_csv(tmp_path)]
    assert names == [
        f"{tmp_path / parent / 'run'} ({stage})" for parent in ("a", "b") for stage in ("eval", "predict")
    ]
