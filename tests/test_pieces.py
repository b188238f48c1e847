"""Tokens as a reader writes them, against the tokenizers that made them."""

from __future__ import annotations

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from util.pieces import readable


@pytest.mark.parametrize(
    "text", ["Ella rented a car.", "Grüße aus Köln,\n\n ein Test", "日本 😀 naïve\tcafé"]
)
def test_byte_level_pieces_are_their_text(text):
    pieces = [piece for piece, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]
    assert "".join(map(readable, pieces)) == text


@pytest.mark.parametrize(
    ("piece", "text"),
    [("▁große", " große"), ("große", "große"), ("é", "é"), ("▁", " "), ("Haus", "Haus"), ("日本", "日本")],
)
def test_pieces_of_sentencepiece_are_their_text(piece, text):
    assert readable(piece) == text


def test_a_part_of_a_letter_and_a_token_without_a_text():
    assert readable("ĠðŁĺ") == " ðŁĺ"
    assert readable(None) == "\N{REPLACEMENT CHARACTER}"
