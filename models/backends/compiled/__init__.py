"""Decoding by `torch.compile`: layers over buffers of fixed size, one graph a segment and window size."""
