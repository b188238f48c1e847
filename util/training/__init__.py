"""Training: from flags to a saved model."""
