"""What there is to choose on the page: checkpoints, and texts that fit them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from models.prompts import SOURCE
from util.data.sources import load_file
from util.tasks import DATASETS, TASKS

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
FIRST = "debian-t5-free"
DEBIAN = "debian-"  # how the names of those begin that translate package descriptions
INSTRUCTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short letter that thanks a colleague for her help.",
    "Name three ways to save energy at home.",
)
BEGINNINGS = ("The best way to learn a language is", "Once upon a time, in a small village by the sea,")
SENTENCES = (
    "translate English to German: The house is wonderful.",
    "summarize: The city council met on Monday. It will open the bridge again, as the repairs are done.",
)
EXAMPLES = 6
SHORTEST, LONGEST = 40, 120  # characters of a German example


def embedded_checkpoints() -> list[str]:
    """The folders in checkpoints/ that hold a model, the one to begin with first."""
    folders = [path.parent for path in CHECKPOINTS.glob("*/config.json")]
    return list(map(str, sorted(folders, key=lambda folder: (folder.name != FIRST, folder.name))))


def is_debian(checkpoint: str) -> bool:
    return Path(checkpoint).name.startswith(DEBIAN)


def template_of(checkpoint: str) -> str:
    """Around the source of a model without an encoder: of the task that it was trained for, if known."""
    return TASKS["translation"].prompt if is_debian(checkpoint) else SOURCE


def examples_for(checkpoint: str, *, encoder: bool, chat: bool) -> list[str]:
    """Texts that a model can do something with."""
    if is_debian(checkpoint):
        return german_sentences()
    if encoder:
        return list(SENTENCES)
    return list(INSTRUCTIONS if chat else BEGINNINGS)


def german_sentences() -> list[str]:
    """Package descriptions of the embedded test split that are neither too short nor too long to show."""
    folder = DATASETS["debian_de_en"].folder
    assert folder is not None
    rows = load_file(folder / "test.jsonl.gz")
    sources = (str(row["translation"]["de"]) for row in rows)
    return list(islice((text for text in sources if SHORTEST <= len(text) <= LONGEST), EXAMPLES))
