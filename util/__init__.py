"""Arguments, data, training, evaluation and reports around `models`."""
