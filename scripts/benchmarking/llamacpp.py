"""llama.cpp on the .gguf file of a loaded model. Imported only where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from models.errors import UserError

LLAMA_CPP = "llama.cpp"
Generator = Callable[[list[int], int], list[int]]
"""From a prompt's tokens and the greatest number of new ones to these, end included."""


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def open_generator(path: Path, ends: set[int], context: int, threads: int) -> Generator:
    """Greedy decoding in the file's own precision until one of `ends`, of at most `context` tokens in all.

    Raises:
        UserError: llama_cpp was installed without what it needs.
    """
    try:
        from llama_cpp import Llama
    except (ImportError, RuntimeError, OSError) as error:  # a module or a shared library that is missing
        raise UserError(
            f"llama_cpp cannot be imported ({error}): install it again by "
            "`pip install -r scripts/benchmarking/requirements-llama.txt`, or uninstall it."
        ) from error

    limits = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads}
    llama = Llama(str(path), verbose=False, **limits)

    def generate(prompt: list[int], longest: int) -> list[int]:
        llama.reset()  # else the prompt's keys and values of the last call are taken again
        tokens: list[int] = []
        for token in islice(llama.generate(prompt, temp=0.0), longest):
            tokens.append(token)
            if token in ends:
                break
        return tokens

    return generate
