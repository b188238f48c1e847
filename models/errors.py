"""The one error that bad input raises: a single line that names the flag or file and says what to do."""


class UserError(ValueError):
    """Wrong flags, data or checkpoint. `run.py` prints it without a traceback and exits with code 2."""
