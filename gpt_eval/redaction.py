"""Take the API key out of what is printed, logged or kept, in whatever encoding an endpoint repeats it.

redact = Redactor(key)
redact("denied: Bearer sk%2Dmine")   # "denied: Bearer ***"
"""

from __future__ import annotations

import base64
import html.entities
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

SHORTEST_SECRET = 8  # servers without keys are given words such as "none" or "EMPTY", which answers may hold
MASK = "***"
# What is not seen: blanks and line ends, controls, soft hyphens, joiners, directions, fillers, tags.
UNSEEN = (
    "\\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
)
UNSEEN += "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffc\U000e0000-\U000e0fff"
AGAIN = "%(?:25)*"  # a percent sign, however often it was quoted
ESCAPED_UNSEEN = (  # the commoner ones: as URLs, JSON and HTML write them
    rf"{AGAIN}(?:0[9ad]|20|c2{AGAIN}a[0d]|e2{AGAIN}8[01]{AGAIN}[89a][0-9a-f]|ef{AGAIN}bb{AGAIN}bf)"
    r"|\\+(?:[nrt]|u00(?:09|0a|0d|20|a0|ad)|u20[0-6][0-9a-f]|ufeff)"
    r"|&(?:amp;)*(?:#0*(?:9|10|13|32|160|173|82\d\d|65279)|#x0*(?:9|a|d|20|a0|ad|20[0-6][0-9a-f]|feff)"
    r"|tab|newline|nbsp|shy|zwn?j|lrm|rlm|zerowidthspace);?"
)


class Redactor:
    """Replaces a key by three stars: plain, split by unseen characters, with characters escaped as URLs,
    JSON and HTML escape them, and inside base64, as Basic authorization is."""

    def __init__(self, key: str) -> None:
        self._pattern = None if len(key) < SHORTEST_SECRET else re.compile(key_pattern(key))

    def __call__(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub(MASK, text)

    def every_text(self, value: Any) -> Any:
        """A decoded JSON value with the key taken out of all of its texts."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, list):
            return [self.every_text(entry) for entry in value]
        if isinstance(value, dict):
            return {self(name): self.every_text(entry) for name, entry in value.items()}
        return value


def key_pattern(key: str) -> str:
    gap = f"(?:[{UNSEEN}]|(?i:{ESCAPED_UNSEEN}))*"
    plain = gap.join(f"(?:{re.escape(char)}|{escapes(char)})" for char in key)
    return "|".join([plain, *map(in_base64, base64_cores(key.encode()))])


@cache
def escapes(char: str) -> str:
    """Pattern of a character as %2D (or %252D, quoted twice), as \\u002d, and as &#45;, &#x2d; or by name."""
    quoted = "".join(f"{AGAIN}{byte:02x}" for byte in char.encode())
    names = sorted({name.rstrip(";") for name, value in html.entities.html5.items() if value == char})
    entities = [f"#0*{ord(char)}", f"#x0*{ord(char):x}", *map(re.escape, names)]
    escaped = rf"\\+(?:u{ord(char):04x}|u\{{0*{ord(char):x}\}}|x{ord(char):02x})"
    return rf"(?i:{quoted}|{escaped}|&(?:amp;)*(?:{'|'.join(entities)});?)"


def base64_cores(data: bytes) -> list[str]:
    """What base64 of `data` inside any text has in common: one form for each place in a group of three."""
    cores = []
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + data).decode()
        known = 8 * (before + len(data)) // 6  # digits after it hold bits of what follows
        cores.append(encoded[-(-8 * before // 6) : known])
    return cores


def in_base64(core: str) -> str:
    """Pattern of the whole run of base64 around a core, in either alphabet."""
    digits = {"+": r"[+\-]", "/": "[/_]"}
    return rf"[\w+/\-]{{0,100}}{''.join(digits.get(char, char) for char in core)}[\w+/\-]*=*"


class RedactingFilter(logging.Filter):
    """Formats a record at once, traceback included, and redacts what came of it."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__()
        self.redact = redact

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self.redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = self.redact(logging.Formatter().formatException(record.exc_info))
        return True


@contextmanager
def redacted_logs(redact: Redactor) -> Iterator[None]:
    """Keep the key out of what any library logs meanwhile."""
    handlers, added = list(logging.getLogger().handlers), RedactingFilter(redact)
    for handler in handlers:
        handler.addFilter(added)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(added)
