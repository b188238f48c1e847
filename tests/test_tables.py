"""Reports: what is written can be read, and interrupted writes leave the old file."""

from __future__ import annotations

import csv
import json

import pytest

from util.tables import color_by_depth, comparison_table, format_figure, plot_trade_off, write_csv, write_json

ROWS = [
    {"method": "Full depth", "bleu": 30.0, "speedup": 1.0},
    {"method": "FREE", "bleu": 29.9, "speedup": 1.7, "exit_share": 0.6},
]


def test_files(tmp_path):
    write_json(tmp_path / "report.json", ROWS)
    write_csv(tmp_path / "report.csv", ROWS)
    plot_trade_off(tmp_path / "report.png", ROWS, "bleu", ROWS[0])
    assert json.loads((tmp_path / "report.json").read_text()) == ROWS
    with (tmp_path / "report.csv").open() as file:
        assert [row["exit_share"] for row in csv.DictReader(file)] == ["", "0.6"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "report.json", ROWS)
    with pytest.raises(TypeError):
        write_json(tmp_path / "report.json", {"bad": object()})
    assert json.loads((tmp_path / "report.json").read_text()) == ROWS


def test_table_shows_missing_figures():
    table = comparison_table("t", {"method": "method", "exit_share": "exits"}, ROWS)
    assert list(table.columns[1].cells) == ["-", "0.60"]
    assert format_figure(None) == "-" and format_figure(3) == "3"


def test_colours_follow_depth():
    text = color_by_depth(["a", "b", "c"], [2, 5, 8], 8)
    assert text.plain == "abc" and [span.style for span in text.spans] == ["green", "yellow", "red"]
