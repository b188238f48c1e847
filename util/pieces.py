"""Tokens as a reader writes them. Needs no torch."""

from __future__ import annotations

from functools import cache


@cache
def byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes, as GPT-2's (Radford et al., 2019) does:
    printable ones stand for themselves, the others for those from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


def readable(piece: str | None) -> str:
    """A piece of SentencePiece or byte-level BPE as text; None, a token without one, as U+FFFD."""
    if piece is None:
        return "\N{REPLACEMENT CHARACTER}"
    letters = byte_letters()
    if piece.isascii() or not all(letter in letters for letter in piece):
        return piece.replace("▁", " ")
    try:
        return bytes(letters[letter] for letter in piece).decode("utf8")
    except UnicodeDecodeError:  # SentencePiece's é, or a part of a byte-level letter
        return piece.replace("Ġ", " ")
