"""Exit with 0 if this Python has what requirements.txt asks for; else say what is missing, exit with 1."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"


def main() -> int:
    missing = [*find_missing(REQUIREMENTS.read_text(encoding="utf8").splitlines())]
    if missing:
        print(f"{sys.prefix} lacks {', '.join(missing)}: using .venv instead.", file=sys.stderr)
    return 1 if missing else 0


def find_missing(lines: Iterable[str]) -> Iterator[str]:
    """The requirements that no installed package meets; the first says so if they cannot be read."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield "packaging"
        return
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield line
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield f"{line} (has {found})"


if __name__ == "__main__":
    sys.exit(main())
