"""The HTML report: what it shows of sweeps and of judges."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from report_folders import (
    EVIL,
    SECTIONS,
    build,
    make_judge,
    make_run,
    make_sweep,
    read_csv,
    write_json,
    write_lines,
)

from util.report.results import ResultSet, SettingResults
from util.report.sections import Measure, as_point, throughput_lines


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
    assert "The same near" not in page.text


@pytest.mark.slow
def test_bad_settings_do_not_hide_the_others(tmp_path):
    folder, _ = make_sweep(tmp_path / "sweep")
    figures = json.loads((folder / "sweep.json").read_text())
    figures["rows"][2]["quality_share"] = 40.0
    write_json(folder / "sweep.json", figures)
    text = build(tmp_path, folder).text
    assert "The same near 99%" in text and text.count("FREE <b>0.4</b>: 1.50× speed-up") == 2


def test_judge(everything):
    page, _ = everything
    labels = page.attributes("aria-label")
    assert "free better: 1 samples; tie: 1 samples; full better: 2 samples" in labels
    assert "75% of answers chose the text shown first" in labels
    assert "0.33 [0.01, 0.90], p < 0.001" in page.text


@pytest.mark.slow
def test_judge_without_pairs_or_answers(tmp_path):
    scores = {"judges": {"m": {"likert": {"systems": {"free": {"samples": 0}}}, "pairwise": {"samples": 0}}}}
    write_json(tmp_path / "judge" / "scores.json", scores)
    build(tmp_path, make_sweep(tmp_path / "sweep")[0])
    page = build(tmp_path, tmp_path / "judge")  # the sweep's table must not stay behind
    assert page.sections == {"judge"} and not (tmp_path / "report" / "report.csv").exists()


# CSV and Markdown


@pytest.mark.slow
def test_csv_and_markdown_hold_the_figures(tmp_path):
    folder, rows = make_sweep(tmp_path / "sweep")
    build(tmp_path, folder)
    found = read_csv(tmp_path)
    assert [row["name"] for row in found] == [row["name"] for row in rows]
    for ours, given in zip(found, rows, strict=True):
        for key in ("bleu", "chrf", "quality_share", "speedup", "tokens_per_second"):
            assert float(ours[key]) == given[key]
        assert [float(ours[f"bleu_interval_{end}"]) for end in ("low", "high")] == given["interval"]
        assert [float(ours[f"speedup_interval_{end}"]) for end in ("low", "high")] == given[
            "speedup_interval"
        ]
    assert [row["pareto"] for row in found] == ["False", "True", "False", "False", "False"]
    caption, _, heading, rule, *lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert caption == "**debian_de_en, 3 test samples**"
    assert heading.startswith("| setting | speed-up | % of full depth | BLEU | tokens/s |")
    assert len(lines) == 5 and rule.count("|") == heading.count("|")
    assert lines[2].startswith(
        "| adaptive \\| x | 2.00 [0.90, 3.00] | 98.00 [95.00, 104.00] | 22 [18.00, 23.50] |"
    )


# What figures may be shown, and how


def change_figures(folder, **changes):
    """Change figures of FREE at batch 1."""
    content = json.loads((folder / "sweep.json").read_text())
    content["rows"][1] |= changes
    write_json(folder / "sweep.json", content)
    return folder


@pytest.mark.slow
def test_slower_settings_look_different(tmp_path):
    fast = build(tmp_path, make_sweep(tmp_path / "sweep")[0])
    assert "▼ " not in fast.text.replace("▼ slower", "") and "slower" not in fast.attributes("class")
    slow = build(tmp_path, change_figures(tmp_path / "sweep", speedup=0.8, speedup_interval=[0.7, 0.9]))
    assert [tag for tag, attrs in slow.tags if attrs.get("class") == "slower"] == ["li"]  # its card
    assert "number slower" in slow.attributes("class") and "▼ 0.80" in slow.text
    assert "| FREE <b>0.4</b> | ▼ 0.80 [" in (tmp_path / "report" / "report.md").read_text()
    assert re.search(r">\s*slower\s*<", slow.source) and not re.search(r">\s*slower\s*<", fast.source)  # plot


@pytest.mark.slow
def test_doubts_about_timing_are_told(tmp_path):
    doubt = "measured 8.13x, the work saved allows 4.00x"
    folder, _ = make_sweep(tmp_path / "sweep")
    page = build(tmp_path, change_figures(folder, speedup=8.13, timing_doubt=doubt))
    sentence = f"This timing cannot be trusted: FREE <b>0.4</b> {doubt}."
    (warning,) = [attrs for _, attrs in page.tags if attrs.get("role") == "alert"]
    assert warning["class"] == "warning" and sentence in page.text and "? 8.13" in page.text
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert sentence in markdown and "| ? 8.13 [" in markdown
    assert [row["timing_doubt"] for row in read_csv(tmp_path)] == ["", doubt, "", "", ""]


def test_captions_say_what_headings_do_not(everything):
    page, _ = everything
    captions = re.findall(r"<caption>(.*?)</caption>", page.source)
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page.source)
    assert "debian_de_en, 3 test samples" in captions and not set(captions) & set(headings)


def test_panels_without_information_are_left_out(tmp_path):
    folder, _ = make_sweep(tmp_path / "sweep")
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    write_lines(folder / "records.jsonl", [row | {"exit_layers": [4] * 4, "threshold": 0.4} for row in rows])
    (folder / "traces.jsonl").unlink()
    figures = json.loads((folder / "sweep.json").read_text())
    write_json(folder / "sweep.json", figures | {"rows": figures["rows"][:1]})  # one setting is no trade-off
    page = build(tmp_path, folder)
    assert page.sections == {"table", "calibration", "sources"}
    assert not (tmp_path / "report" / "trade_off.png").exists()


@pytest.mark.slow
def test_cards_of_tokens_show_the_source_and_every_method(tmp_path):
    folder, _ = make_sweep(tmp_path / "sweep")
    content = json.loads((folder / "settings.json").read_text())
    others = [("HF generate", "HF generate", None), ("Static 2", "Static", [2] * 4)]
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for name, method, exits in others:
        content["settings"].append(content["settings"][0] | {"name": name, "method": method})
        rows += [row | {"setting": name, "exit_layers": exits} for row in rows[:3]]
    write_json(folder / "settings.json", content)
    write_lines(folder / "records.jsonl", rows)
    page = build(tmp_path, folder)
    cards = re.findall(r"<article.*?</article>", page.source, re.DOTALL)
    names = ["Full depth, HF generate", "FREE &lt;b&gt;0.4&lt;/b&gt;", "adaptive | x", "Static 2"]
    for number, card in enumerate(cards):
        assert re.findall(r"<dt>(.*?)</dt>", card) == ["source", "reference", *names]
        assert f"<dd>Quelle {number} " in card and card.count('<dd class="tokens">') == 3
    assert len(cards) == 3


@pytest.mark.slow
def test_long_sources_unfold(tmp_path):
    folder, _ = make_sweep(tmp_path / "sweep")
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    write_lines(folder / "records.jsonl", [row | {"source": 90 * "Wort " + "Ende"} for row in rows])
    page = build(tmp_path, folder)
    (summary, *_) = re.findall(r"<dd><details><summary>(.*?) …</summary>", page.source)
    assert len(summary) == 400 and "Ende" in page.text


@pytest.mark.slow
def test_tokens_without_a_text_are_shown(tmp_path):
    """Models have more tokens than their tokenizers."""
    folder, _ = make_sweep(tmp_path / "sweep")
    (folder / "traces.jsonl").unlink()
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    write_lines(
        folder / "records.jsonl", [row | {"pieces": ["\u2581Text", None, "a", "</s>"]} for row in rows]
    )
    assert "\N{REPLACEMENT CHARACTER}" in build(tmp_path, folder).text


def test_every_zeta_is_a_series_of_its_own():
    settings = [
        SettingResults(
            f"FREE adaptive {zeta} x{size}", "FREE adaptive", "free", None, 2, size, zeta=zeta,
            figures={"tokens_per_second": 100 * size + zeta, "speedup": 1.5, "bleu": 20.0},
        )
        for zeta in (0.4, 0.1)
        for size in (1, 4)
    ]  # fmt: skip
    result = ResultSet("sweep", "sweep", "debian_de_en", "test", "bleu", 3, settings)
    (line,) = throughput_lines([result])
    assert line.points == [(1, 100.4), (4, 400.4)]
    axes = Measure("speedup", "", "", ""), Measure("bleu", "", "", "")
    orders = [as_point(result, setting, *axes, several=False).order for setting in settings]
    assert orders[0] == orders[1] > orders[2] == orders[3]
