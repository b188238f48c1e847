"""Package descriptions of a Debian archive: its index files, fetched and verified by apt, and their texts."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from models.errors import UserError
from util.script_arguments import DebianArguments

INDEX_SUFFIXES = {
    "release": "_InRelease",
    "packages": "_main_binary-amd64_Packages",
    "en": "_main_i18n_Translation-en",
    "de": "_main_i18n_Translation-de",
}
APT_CONFIG = """\
Dir::State::Lists "$work/lists";
Dir::Cache "$work/cache";
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "-";
Acquire::Languages { "en"; "de"; };
Acquire::GzipIndexes "false";
Acquire::PDiffs "false";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


@dataclass(frozen=True)
class Description:
    """One binary package's description, in English and, where translated, in German."""

    package: str
    source: str
    english: str
    german: str | None


def find_mirror(apt_get: str, suite: str) -> str:
    """Take the mirror of the suite's main section from this machine's apt sources."""
    command = [apt_get, "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"]
    done = subprocess.run([*command, "Created-By: Packages"], capture_output=True, text=True, check=False)
    targets = [line.split() for line in done.stdout.splitlines()]
    uris = [target[0] for target in targets if target[1:] == [suite, "main"]]
    if not uris:
        raise UserError(f"The apt sources here have no {suite} main: name a Debian mirror with --mirror.")
    # Other vendors also name their suites after Debian's; a Debian archive lies in a folder "debian".
    return min(uris, key=lambda uri: not uri.rstrip("/").endswith("/debian"))


def write_apt_config(work: Path, mirror: str, suite: str, keyring: Path) -> Path:
    """Write apt settings that leave the machine's own lists, cache and sources alone."""
    for name in ("lists/partial", "cache"):
        (work / name).mkdir(parents=True, exist_ok=True)
    options = f"arch=amd64 lang=en,de target=Packages,Translations signed-by={keyring.resolve()}"
    (work / "sources.list").write_text(f"deb [{options}] {mirror} {suite} main\n", encoding="utf-8")
    config = work / "apt.conf"
    config.write_text(Template(APT_CONFIG).substitute(work=work), encoding="utf-8")
    return config


def fetch_indexes(work: Path, args: DebianArguments) -> dict[str, Path]:
    """Let apt fetch and verify the index files, and name the fetched files."""
    apt_get = shutil.which("apt-get")
    if apt_get is None:
        raise UserError("apt-get is not installed: run this on Debian or in a Debian container.")
    if not args.keyring.is_file():
        raise UserError(f"--keyring: there is no file {args.keyring}; debian-archive-keyring brings it.")
    mirror = args.mirror or find_mirror(apt_get, args.suite)
    config = write_apt_config(work, mirror, args.suite, args.keyring)
    command = [apt_get, "-q", "-c", str(config), "update", "--error-on=any"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())
        raise UserError(f"No index files could be fetched: name a reachable --mirror. apt-get says: {reason}")
    return {name: find_index(work / "lists", args.suite, suffix) for name, suffix in INDEX_SUFFIXES.items()}


def find_index(lists: Path, suite: str, suffix: str) -> Path:
    """Name the one index file with this suffix."""
    found = sorted(lists.glob(f"*_dists_{suite}{suffix}"))
    if len(found) != 1:
        raise UserError(f"--work_dir: {len(found)} index files end in {suffix}, not one; empty it.")
    return found[0]


def read_stanzas(path: Path) -> Iterator[dict[str, str]]:
    """Yield the stanzas of a Debian control file, continuation lines kept as lines."""
    stanza: dict[str, str] = {}
    key = ""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in (raw.rstrip("\n") for raw in lines):
            if not line:
                if stanza:
                    yield stanza
                stanza = {}
            elif line[0] in " \t":
                stanza[key] += "\n" + line
            else:
                key, _, value = line.partition(":")
                stanza[key] = value.strip()
    if stanza:
        yield stanza


def read_texts(path: Path, language: str) -> dict[str, str]:
    """Map the md5 of each English description to its text in one language."""
    field = f"Description-{language}"
    return {s["Description-md5"]: s[field] for s in read_stanzas(path) if field in s}


def read_release(path: Path) -> dict[str, str]:
    """Read version and date from the head of the archive's release file."""
    head = path.read_text(encoding="utf-8").partition("\nMD5Sum:")[0]
    fields = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    return {"version": fields.get("Version", "unknown"), "date": fields.get("Date", "unknown")}


def load_descriptions(indexes: dict[str, Path]) -> list[Description]:
    """Join packages with their descriptions, in the order of the package names."""
    english, german = (read_texts(indexes[language], language) for language in ("en", "de"))
    found: dict[str, Description] = {}
    for stanza in read_stanzas(indexes["packages"]):
        package, md5 = stanza["Package"], stanza.get("Description-md5", "")
        if md5 in english and package not in found:
            # A source field may carry a version, as in "gcc-12 (12.2.0-14)".
            source = stanza.get("Source", package).split()[0]
            found[package] = Description(package, source, english[md5], german.get(md5))
    return [found[package] for package in sorted(found)]


def describe_archive(indexes: dict[str, Path]) -> dict[str, Any]:
    """Describe the index files, without the name of the mirror."""
    hashes = {
        suffix.removeprefix("_main_").replace("i18n_", "i18n/").replace("amd64_", "amd64/"): hashlib.sha256(
            indexes[name].read_bytes()
        ).hexdigest()
        for name, suffix in INDEX_SUFFIXES.items()
        if name != "release"
    }
    return {**read_release(indexes["release"]), "index_sha256": hashes}
