"""Result folders as sweep.py, run.py and gpt_eval write them, and the page made of them."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser

from scripts.report import main

EVIL = "<script>alert('x')</script>"
LAYERS = 4
ABOUT_TOKENS = {"depth", "calibration", "thresholds", "tokens", "oracle"}
SECTIONS = ABOUT_TOKENS | {"trade-off", "table", "batches", "judge", "sources"}


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
        "source": f"Quelle {number} {EVIL}",
        "reference": f"reference {number} {EVIL}",
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
            if setting["method"] != "Full depth":
                del record["source"]  # full depth's says it for all
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
        "interleaved": True,
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
        "samples": len(seconds),
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


def read_csv(tmp_path):
    with (tmp_path / "report" / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))
