"""Reports: what is written can be read, and interrupted writes leave the old file."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console

from util.files import write_json
from util.tables import (
    color_by_depth,
    comparison_table,
    format_figure,
    markdown_table,
    print_report,
    write_csv,
)

ROWS = [
    {"method": "Full depth", "bleu": 30.0, "speedup": 1.0},
    {"method": "FREE", "bleu": 29.9, "speedup": 1.7, "exit_share": 0.6},
]


def test_files(tmp_path):
    write_json(tmp_path / "report.json", ROWS)
    write_csv(tmp_path / "report.csv", ROWS)
    assert json.loads((tmp_path / "report.json").read_text()) == ROWS
    with (tmp_path / "report.csv").open() as file:
        assert [row["exit_share"] for row in csv.DictReader(file)] == ["", "0.6"]


class Unwritable(dict):
    def get(self, name, default=None):
        return 1 / 0


def test_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "report.json", ROWS)
    with pytest.raises(TypeError):
        write_json(tmp_path / "report.json", {"bad": object()})
    assert json.loads((tmp_path / "report.json").read_text()) == ROWS
    write_csv(tmp_path / "report.csv", ROWS)
    before = (tmp_path / "report.csv").read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_csv(tmp_path / "report.csv", [*ROWS, Unwritable({"method": "x"})])
    assert (tmp_path / "report.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_table_shows_missing_figures():
    table = comparison_table("t", {"method": "method", "exit_share": "exits"}, ROWS)
    assert table.columns[1] == ("exits", ["-", "0.60"])
    assert format_figure(None) == "-" and format_figure(3) == "3"


@pytest.mark.parametrize("width", [36, 60, 80, 120])
def test_tables_never_cut_a_figure(width):
    """What does not fit follows below, beside the first column; no line is longer than the screen."""
    columns = {"name": "setting", **{f"figure_{k}": f"tokens/s at {k}" for k in range(9)}}
    rows = [
        {"name": f"FREE lossless 0.{k}", **{f"figure_{j}": 1000.0 * k + j for j in range(9)}} for k in (1, 2)
    ]
    console = Console(width=width, file=io.StringIO())
    console.print(comparison_table("9 figures", columns, rows))
    shown = console.file.getvalue()
    assert all(f"{1000 * k + j}.00 " in shown for k in (1, 2) for j in range(9)) and "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    tables = shown.count("┏")
    assert shown.count("FREE lossless 0.1") == tables == {36: 9, 60: 3, 80: 2, 120: 1}[width]


def test_colours_follow_depth():
    text = color_by_depth(["a", "b", "c"], [2, 5, 8], 8)
    assert text.plain == "abc" and [span.style for span in text.spans] == ["green", "yellow", "red"]


def test_names_and_paths_are_shown_as_they_are(capsys):
    name = "save/run[v2] [/] [red]x :smile:"
    print_report(f"Wrote {name}", comparison_table(name, {"name": name}, [{"name": name}]))
    assert capsys.readouterr().out.count(name) == 4


def test_cells_of_markdown_stay_in_their_columns():
    assert markdown_table(["a", "b|c"], [["x | y\nz", "1"]]) == (
        "| a | b\\|c |\n|---|---|\n| x \\| y z | 1 |"
    )
    assert markdown_table(["a", "b"], [], [":--", "--:"]) == "| a | b |\n|:--|--:|"
