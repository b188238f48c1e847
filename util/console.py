"""What commands show: our own log, real warnings of the libraries, and neither their harmless ones nor, where
no terminal is, their progress bars. Every program of run.py and scripts/ works in `with command():`."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import one_line_errors
from util.progress import is_first_process, on_terminal

OUR_LOGGERS = ("models", "util", "scripts", "gpt_eval")
DEPRECATED = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)  # addressed to programmers


@contextmanager
def command(to_continue: str = "Run the same command to start again.") -> Iterator[None]:
    """The work of a command: our log is shown; what ends it early is one line, as `one_line_errors` says."""
    prepare_console()
    with one_line_errors(to_continue):
        yield


def prepare_console() -> None:
    """Set up logging to stderr, and let a log see each line at once; may be called again, and must be where
    a command imports transformers or datasets late: nothing is loaded for it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if is_first_process() else logging.WARNING)
    for category in DEPRECATED:
        warnings.filterwarnings("ignore", category=category)
    if sys.modules.get("transformers"):
        quiet_transformers()
    if sys.modules.get("datasets") and not on_terminal():
        quiet_datasets()


def quiet_transformers() -> None:
    """Drop what transformers logs as deprecated, and the bars of loading and saving weights."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logger = logging.getLogger("transformers")  # has its own handler
    for handler in logger.handlers:
        handler.addFilter(is_no_deprecation)


def quiet_datasets() -> None:
    from datasets import disable_progress_bars

    disable_progress_bars()


def is_no_deprecation(record: logging.LogRecord) -> bool:
    return "deprecated" not in record.getMessage()
