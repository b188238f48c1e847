"""Decoding a split, what was decoded, and what it is worth."""
