"""The one error that bad input raises: a single line that names the flag or file and says what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # 128 + SIGINT, as shells count


class UserError(ValueError):
    """Wrong flags, data or checkpoint; commands wrap themselves in `one_line_errors`."""


@contextmanager
def one_line_errors(to_continue: str = "Run the same command to start again.") -> Iterator[None]:
    """Answer a UserError by its line on stderr and exit code 2, Ctrl-C by `to_continue` and 130; neither
    with a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {to_continue}", file=sys.stderr)
        sys.exit(INTERRUPTED)
