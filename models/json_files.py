"""JSON files that users hand over: a mapping with fields of the right types, or one line that names the file.

    settings = read_mapping(path, "--conf_shortlist")
    check_fields(settings, get_type_hints(ExitConfig), str(path))

Both raise UserError. A byte order mark, as editors on Windows write it, is skipped.
"""

from __future__ import annotations

import json
import math
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from models.errors import UserError

LARGEST = 2**63 - 1  # of what tensors, sizes and seeds take


def read_mapping(path: Path, flag: str = "") -> dict[str, Any]:
    """The JSON object in a file; `flag` is the one that named it."""
    place = f"{flag} {path}".strip()
    value = decode_json(read_text(path, flag), place)
    if not isinstance(value, dict):
        raise UserError(f"{place} must hold a JSON object, not {describe(value)}.")
    return value


def read_text(path: Path, flag: str = "", newline: str | None = None) -> str:
    """The text of a file without its byte order mark; `newline` as in `open`: "" keeps line ends."""
    place = f"{flag} {path}".strip()
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror}.") from error


def decode_json(text: str | bytes, place: str) -> Any:
    """The value that a text is JSON of; `place` is the file, or the file and the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f", line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{place}{where}: not JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text.") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise UserError(f"{place}: not JSON that can be read ({error}).") from error


def check_fields(content: dict[str, Any], hints: dict[str, Any], place: str) -> None:
    """Raise UserError unless each field in `content` has the type that `hints` gives it."""
    for name, value in content.items():
        if not fits(value, hints[name]):
            raise UserError(f"{place}: {name} must be {spell(hints[name])}, not {describe(value)}.")


def check_keys(content: dict[str, Any], hints: dict[str, Any], place: str) -> None:
    """Raise UserError unless `content` has exactly the fields that `hints` names, of their types."""
    missing, unknown = set(hints) - set(content), set(content) - set(hints)
    if missing or unknown:
        found = [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
        found += [f"has no use for {', '.join(sorted(unknown))}"] * bool(unknown)
        raise UserError(f"{place} {' and '.join(found)}.")
    check_fields(content, hints, place)


def fits(value: Any, hint: Any) -> bool:
    """Whether a decoded JSON value is of a type; numbers must be finite, integers have 64 bits."""
    if hint is Any:
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(entry, arguments[1]) for entry in value.values())
    if hint is int:
        return type(value) is int and abs(value) <= LARGEST
    if hint is float:
        return type(value) in (int, float) and abs(value) <= LARGEST and math.isfinite(value)
    return isinstance(value, hint)


def spell(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(spell, arguments))
    if origin is list:
        return f"a list (each entry {spell(arguments[0])})"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return words.get(hint) or {types.NoneType: "null", dict: "an object"}.get(origin or hint, "any value")


def describe(value: Any) -> str:
    """A value, shortened to fit into a message."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
