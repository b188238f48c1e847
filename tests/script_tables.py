"""What a script's tables show: cells by heading and row."""

from __future__ import annotations


def cells_by_row(output: str, first_heading: str) -> dict[str, dict[str, str]]:
    """By its first cell, each row's others by heading; tables that follow on from another are joined."""
    rows: dict[str, dict[str, str]] = {}
    headings: list[str] = []
    for line in filter(lambda line: line.startswith(("│", "┃")), output.splitlines()):
        first, *cells = [cell.strip() for cell in line.replace("┃", "│")[1:-1].split("│")]
        if first == first_heading:
            headings = cells
        elif headings:
            rows.setdefault(first, {}).update(zip(headings, cells, strict=True))
    return rows
