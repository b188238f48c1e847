"""Rows: where they come from, how they become texts, token ids and batches."""
