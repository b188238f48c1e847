"""Figures as CSV, as tables of a terminal and in Markdown, and text coloured by exit depth.

The functions know nothing of models: a row is a dict of a method's figures.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from util.files import written_aside

PLAIN_WIDTH = 200
DEPTH_STYLES = ("green", "yellow", "red")  # shallow, middle, deep


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line a row, one column for every key of any row."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with written_aside(path) as aside, aside.open("w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], rules: Sequence[str] | None = None
) -> str:
    """A table in GitHub's Markdown, without a line break at its end. `rules` say of each column on which side
    its cells stand: `:--`, `--:`, or `---`, as the viewer likes."""

    def line(cells: Sequence[str]) -> str:
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    rule = "|".join(rules or ["---"] * len(headings))
    return "\n".join([line(headings), f"|{rule}|", *map(line, rows)])


class WholeTable:
    """A table whose figures are never cut: where columns do not fit, they follow in further tables, which
    repeat the first column."""

    def __init__(self, title: str, columns: list[tuple[str, list[str]]]) -> None:
        """`columns` are pairs of a heading and its cells."""
        self.title = title
        self.columns = columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        unlimited = options.update(max_width=10_000)
        widths = [least_width(console, unlimited, column) for column in self.columns]
        groups: list[list[int]] = [[0]]  # column numbers of each table
        for index in range(1, len(self.columns)):
            wider = [*groups[-1], index]
            if len(wider) > 2 and sum(widths[one] + 3 for one in wider) >= options.max_width:  # 3: "│  "
                groups.append([0, index])
            else:
                groups[-1] = wider
        for number, group in enumerate(groups):
            title, columns = None if number else self.title, [self.columns[one] for one in group]
            table = draw_table(title, columns)
            if Measurement.get(console, unlimited, table).maximum > options.max_width:
                table = draw_table(title, columns, [widths[one] for one in group])
            yield table


def least_width(console: Console, options: ConsoleOptions, column: tuple[str, list[str]]) -> int:
    """Of a column whose heading may wrap between words."""
    heading, cells = column
    lines = [Measurement.get(console, options, cell).maximum for cell in cells]
    return max([Measurement.get(console, options, heading).minimum, *lines])


def draw_table(
    title: str | None, columns: list[tuple[str, list[str]]], widths: list[int] | None = None
) -> Table:
    table = Table(title=title, title_justify="left")
    for index, (heading, _) in enumerate(columns):
        width = None if widths is None else widths[index]
        table.add_column(heading, justify="right" if index else "left", width=width, overflow="fold")
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*cells)
    return table


def comparison_table(title: str, columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> WholeTable:
    """A table of the keys in `columns`, which maps each key to a heading; missing figures are dashes."""
    rows = list(rows)
    return WholeTable(
        title, [(heading, [format_figure(row.get(key)) for row in rows]) for key, heading in columns.items()]
    )


def format_figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def color_by_depth(pieces: list[str], exit_layers: list[int], num_layers: int) -> Text:
    """Text pieces, each in the colour of its exit layer: green shallow, yellow middle, red last."""
    text = Text()
    for piece, layer in zip(pieces, exit_layers, strict=True):
        text.append(piece, style=depth_style(layer, num_layers))
    return text


def depth_style(layer: int, num_layers: int) -> str:
    if layer == num_layers:
        return DEPTH_STYLES[2]
    return DEPTH_STYLES[0] if layer <= num_layers / 3 else DEPTH_STYLES[1]


def depth_legend() -> Text:
    """What the colours of `color_by_depth` mean."""
    legend = Text("exit depth: ")
    for name, style in zip(("early", "middle", "last layer"), DEPTH_STYLES, strict=True):
        legend.append(f" {name} ", style=style)
    return legend


def print_report(*parts: Any) -> None:
    """Print to the terminal; elsewhere (a log, a pipe) as wide as tables need. Names and paths are shown as
    they are: `[x]` and `:x:` mean nothing."""
    width = None if Console().is_terminal else PLAIN_WIDTH
    console = Console(width=width, markup=False, emoji=False)
    for part in parts:
        console.print(part)
