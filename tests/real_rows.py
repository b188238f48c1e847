"""Real rows to test with: those in ../shared/data where that folder exists, the embedded ones everywhere."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REAL_ROWS = ROOT.parent / "shared" / "data"
EMBEDDED_ROWS = ROOT / "data" / "debian"
FILES = {
    "debian_de_en": EMBEDDED_ROWS / "debian_de_en" / "validation.jsonl.gz",
    "debian_synopsis": EMBEDDED_ROWS / "debian_synopsis" / "validation.jsonl.gz",
    "questions": ROOT / "data" / "questions" / "validation.jsonl",
    **{
        name: REAL_ROWS / f"{name}.validation.json.gz"
        for name in ("samsum", "cnn_dailymail", "multi_news", "big_patent", "squad", "iwslt2017")
    },
}


def available(*names: str) -> list[str]:
    return [name for name in names if FILES[name].is_file()]


def read_rows(name: str, limit: int) -> list[dict]:
    opener = gzip.open if FILES[name].suffix == ".gz" else open
    with opener(FILES[name], "rt", encoding="utf8") as lines:
        return [json.loads(line) for _, line in zip(range(limit), lines, strict=False)]
