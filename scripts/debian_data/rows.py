"""From package descriptions to rows: translation pairs of aligned paragraphs, and summaries of documents."""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scripts.debian_data.archive import Description
from util.script_arguments import DebianArguments

Row = dict[str, Any]
MIN_WORDS = 2
MIN_DOCUMENT = 10
BULLET = re.compile(r"^(?:[-*+•o]|\d{1,2}[.)]|\(\d{1,2}\))\s")
# Replacement characters, UTF-8 once read as Latin-1, and the marker of an unfinished translation.
DAMAGE = re.compile(r"\ufffd|Ã[\x80-\xbf¤¼¶Ÿ„–œ]|<trans>", re.IGNORECASE)
INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0xFEFF])
WORD = re.compile(r"[^\W\d_]{2,}")
ENGLISH_WORD = re.compile(
    r"\b(?:the|and|of|for|is|are|with|to|this|that|from|by|as|be|it|you|your|can|has|have|which|or|on|using)\b",
    re.IGNORECASE,
)
GERMAN_WORD = re.compile(
    r"\b(?:der|die|das|den|dem|des|eine?|einen|eine[mrs]|und|oder|für|ist|sind|mit|zu|zum|zur|von|vom|auf|aus|bei"
    r"|nach|durch|dieses?|dieser|es|sie|wird|werden|kann|können|enthält|als|auch)\b",
    re.IGNORECASE,
)
# A hyphen at a line's end joins a compound, unless it stands for a part that follows ("HTML- und XML-Datei").
JOINED = re.compile(r"(?<=\w-)\n(?!(?:und|oder|bzw|sowie|bis|als|and|or|to|nor)\b)(?=\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Task:
    """How rows of one data set are made, limited and read."""

    name: str
    make: Callable[[Description, DebianArguments, Counter[str]], Iterator[Row]]
    read: Callable[[Row], tuple[str, str]]
    max_per_source: int | None = None
    train_rows: int | None = None


def clean_text(text: str) -> str:
    """Put text in form NFC on one line, without entities and invisible characters."""
    text = html.unescape(unicodedata.normalize("NFC", text)).translate(INVISIBLE)
    return " ".join(text.split())


def count_words(text: str) -> int:
    """Count words, as runs of characters that are not white space."""
    return len(text.split())


def split_paragraphs(description: str) -> tuple[str, list[list[str]]]:
    """Split a description into its synopsis and its paragraphs, each a list of lines."""
    synopsis, *lines = description.split("\n")
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip() in ("", "."):
            paragraphs.append([])
        else:
            # The first space only marks a continuation line; a second one means preformatted.
            paragraphs[-1].append(line[1:])
    return clean_text(synopsis), [paragraph for paragraph in paragraphs if paragraph]


def is_listed(line: str) -> bool:
    """Tell whether a line is preformatted or begins a list item."""
    return line[0].isspace() or BULLET.match(line) is not None


def join_lines(lines: list[str]) -> str:
    """Unwrap the lines of a paragraph into one."""
    return clean_text(JOINED.sub("", "\n".join(line.strip() for line in lines)))


def take_prose(lines: list[str]) -> tuple[str, bool]:
    """Join the lines before the first list line, and tell whether there is a list line."""
    listed = [is_listed(line) for line in lines]
    end = listed.index(True) if any(listed) else len(lines)
    prose = join_lines(lines[:end])
    # A sentence that runs on into a list is cut at different words in the two languages.
    is_cut = any(listed) and not prose.endswith((".", ":", "!", "?"))
    return "" if is_cut else prose, any(listed)


def align_paragraphs(german: list[list[str]], english: list[list[str]]) -> Iterator[tuple[int, str, str]]:
    """Yield number, German and English of the prose paragraphs that are shaped alike."""
    if len(german) != len(english):
        return
    for number, (left, right) in enumerate(zip(german, english, strict=True), start=1):
        (de, de_listed), (en, en_listed) = take_prose(left), take_prose(right)
        if de and en and de_listed == en_listed:
            yield number, de, en


def is_untranslated(german: str, english: str) -> bool:
    """Tell whether the German side is, for the most part, English."""
    words = WORD.findall(german.lower())
    shared = set(WORD.findall(english.lower()))
    copied = sum(word in shared for word in words)
    foreign, native = len(ENGLISH_WORD.findall(german)), len(GERMAN_WORD.findall(german))
    # A single German function word tells "Client für X" from an English text with many names.
    allowed = 0.9 if native else 0.7
    return copied > allowed * len(words) or foreign > max(1, native)


def reject_pair(german: str, english: str, args: DebianArguments) -> str | None:
    """Name the filter that drops a pair, or None to keep it."""
    short, long = sorted((count_words(german), count_words(english)))
    if DAMAGE.search(german) or DAMAGE.search(english):
        return "damaged"
    if german.casefold() == english.casefold():
        return "equal"
    if short < MIN_WORDS or long > args.max_words:
        return "length"
    # One compound noun stands for several English words: short texts are too noisy for a ratio.
    if long >= 8 and long > args.max_ratio * short:
        return "ratio"
    return "untranslated" if is_untranslated(german, english) else None


def make_pairs(description: Description, args: DebianArguments, counts: Counter[str]) -> Iterator[Row]:
    """Yield the translation rows of one package."""
    if description.german is None:
        return
    de_synopsis, de_paragraphs = split_paragraphs(description.german)
    en_synopsis, en_paragraphs = split_paragraphs(description.english)
    counts["paragraph_count_differs"] += len(de_paragraphs) != len(en_paragraphs)
    pairs = [(0, de_synopsis, en_synopsis), *align_paragraphs(de_paragraphs, en_paragraphs)]
    for number, de, en in pairs:
        reason = reject_pair(de, en, args)
        counts[reason or "kept"] += 1
        if reason is None:
            yield {"id": f"{description.package}#{number}", "translation": {"de": de, "en": en}}


def join_items(lines: list[str]) -> list[str]:
    """Unwrap a paragraph: prose onto one line, each list item or preformatted line onto its own."""
    items: list[list[str]] = []
    for line in lines:
        if not items or is_listed(line):
            items.append([])
        items[-1].append(line)
    return [join_lines(item) for item in items]


def make_synopsis(description: Description, args: DebianArguments, counts: Counter[str]) -> Iterator[Row]:
    """Yield the summarization row of one package, if it passes the filters."""
    summary, paragraphs = split_paragraphs(description.english)
    document = "\n".join(line for paragraph in paragraphs for line in join_items(paragraph))
    if DAMAGE.search(document) or DAMAGE.search(summary):
        reason = "damaged"
    elif not MIN_DOCUMENT <= count_words(document) <= args.max_document or count_words(summary) < MIN_WORDS:
        reason = "length"
    else:
        reason = "kept"
        yield {"id": description.package, "document": document, "summary": summary}
    counts[reason] += 1


def make_tasks(args: DebianArguments) -> list[Task]:
    """Name the two data sets, with how to read a row's input and target."""
    return [
        Task("debian_de_en", make_pairs, lambda row: (row["translation"]["de"], row["translation"]["en"])),
        Task(
            "debian_synopsis",
            make_synopsis,
            lambda row: (row["document"], row["summary"]),
            max_per_source=args.max_per_source,
            train_rows=args.train_rows,
        ),
    ]
