"""Early-exit decoding and training for unmodified Hugging Face models."""
