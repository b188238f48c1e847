"""Build the debian_de_en and debian_synopsis data sets from Debian 12 package descriptions.
Run from the repository root, on a machine with apt-get and a reachable Debian mirror:
    python scripts/build_debian_data.py --output_dir data/debian
"""

import gzip
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.errors import UserError, one_line_errors
from util.flags import parse_groups
from util.script_arguments import DebianArguments

Row = dict[str, Any]
Splits = dict[str, list[Row]]

SPLIT_ENDS = {"train": 0.94, "validation": 0.97, "test": 1.0}
MIN_WORDS = 2
MIN_DOCUMENT = 10
INDEX_SUFFIXES = {
    "release": "_InRelease",
    "packages": "_main_binary-amd64_Packages",
    "en": "_main_i18n_Translation-en",
    "de": "_main_i18n_Translation-de",
}
BULLET = re.compile(r"^(?:[-*+•o]|\d{1,2}[.)]|\(\d{1,2}\))\s")
# Replacement characters, UTF-8 once read as Latin-1, and the marker of an unfinished translation.
DAMAGE = re.compile(r"\ufffd|Ã[\x80-\xbf¤¼¶Ÿ„–œ]|<trans>", re.IGNORECASE)
INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0xFEFF])
WORD = re.compile(r"[^\W\d_]{2,}")
ENGLISH_WORD = re.compile(
    r"\b(?:the|and|of|for|is|are|with|to|this|that|from|by|as|be|it|you|your|can|has|have|which|or|on|using)\b",
    re.IGNORECASE,
)
GERMAN_WORD = re.compile(
    r"\b(?:der|die|das|den|dem|des|eine?|einen|eine[mrs]|und|oder|für|ist|sind|mit|zu|zum|zur|von|vom|auf|aus|bei"
    r"|nach|durch|dieses?|dieser|es|sie|wird|werden|kann|können|enthält|als|auch)\b",
    re.IGNORECASE,
)
# A hyphen at a line's end joins a compound, unless it stands for a part that follows ("HTML- und XML-Datei").
JOINED = re.compile(r"(?<=\w-)\n(?!(?:und|oder|bzw|sowie|bis|als|and|or|to|nor)\b)(?=\w)", re.IGNORECASE)

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

README = """\
# Debian package descriptions

Two small, real data sets made from the package descriptions of Debian $version ("$suite", section
`main`, architectures amd64 and all; the archive's release file is dated $date).
This file is written by `scripts/build_debian_data.py`; its numbers are those of `stats.json`.

| data set | task | input | target |
|---|---|---|---|
| `debian_de_en` | translation | `translation.de` | `translation.en` |
| `debian_synopsis` | summarization | `document` (long description) | `summary` (short description) |

## Where the text comes from

- English: the `Description` fields that Debian maintainers write in the `debian/control` file of each
  source package, as published in the archive's `Translation-en` index.
- German: translations by the volunteers of the
  [Debian Description Translation Project](https://www.debian.org/international/l10n/ddtp) (DDTP),
  as published in the archive's `Translation-de` index.
- The `Packages` index maps each binary package to its source package. The two languages are joined by
  the `Description-md5` of the English text, so a translation of an outdated description is never used.

## Licence

A description is part of its source package and is covered by that package's licence for the packaging,
stated in its `debian/copyright` (installed as `/usr/share/doc/<package>/copyright`, and shown at
https://sources.debian.org). Every package is from `main`, so these are licences that meet the Debian Free
Software Guidelines, but they are not one single licence. The translations are derived from those
descriptions, and are the work of the DDTP translators; the index files carry no licence statement of
their own. The text is passed on here for research, credited to the Debian maintainers and
the DDTP. Each row's `id` begins with the name of its binary package, so that the terms and the authors of
any row can be looked up. This project's own licence does not apply to the data.

## Columns

- `id`: the binary package, for `debian_de_en` followed by `#0` (short description) or `#n` (its n-th
  paragraph).
- `translation`: `{"de": ..., "en": ...}`, or `document` and `summary`.
- `seen_in_train`: in validation and test, whether the row's target (English text or summary) is also
  the target of a row of train. Such rows are mostly boilerplate shared by many packages. Report scores
  on the rows where it is false as well as on all. It is true in all of train, where it says nothing.

## Splits

All binary packages of one source package are in one split: the SHA-256 of the source package's name
sends about 94 / 3 / 3 % of the source packages to train / validation / test. Exact duplicates are removed
within a split. Rows are in the order of the SHA-256 of seed and `id`, so the head of a file is a sample.

$table

Test rows whose target is also a target in train: $seen_de_en of `debian_de_en`, $seen_synopsis of
`debian_synopsis`. Test rows whose input is also an input in train: $input_de_en and $input_synopsis.

## Filters

All text is put in Unicode form NFC, HTML entities are resolved, and runs of white space become one space.

`debian_de_en` has the short descriptions, and the paragraphs of those long descriptions that have the same
number of paragraphs in both languages. Wrapped lines are joined. Of a paragraph that turns into a list or
into preformatted text, only the prose before it is kept, and only if both sides do so at the end of a
sentence or at a colon. A pair is dropped if

- a side has under $min_words or over $max_words words;
- a side has 8 or more words, and more than $max_ratio times as many as the other;
- the sides are equal but for case;
- the German side is mostly English: nearly all of its words are on the English side too, or English
  function words outnumber German ones;
- its encoding is damaged.

`debian_synopsis` has all paragraphs and list items as the document, one a line. A row is dropped if the
document has under $min_document or over $max_document words, the summary has under $min_words, or the
encoding is damaged. At most $max_per_source rows (by hash) come from one source package. Train is then cut
to the first $train_rows rows in hash order.

## Examples

```json
$examples
```

## Load and rebuild

```python
from datasets import load_dataset

files = {split: f"data/debian/debian_de_en/{split}.jsonl.gz" for split in ("train", "validation", "test")}
data = load_dataset("json", data_files=files)
```

```
python scripts/build_debian_data.py --output_dir data/debian
```

The same index files give the same bytes of JSON; `stats.json` has their SHA-256. A later point release
changes some rows; `--mirror https://snapshot.debian.org/archive/debian/<timestamp>` fetches an older one.
"""


@dataclass(frozen=True)
class Description:
    """One binary package's description, in English and, where translated, in German."""

    package: str
    source: str
    english: str
    german: str | None


@dataclass(frozen=True)
class Task:
    """How rows of one data set are made, limited and read."""

    name: str
    make: Callable[[Description, DebianArguments, Counter[str]], Iterator[Row]]
    read: Callable[[Row], tuple[str, str]]
    max_per_source: int | None = None
    train_rows: int | None = None


def prepare_output(directory: Path) -> None:
    """Make the output directory, or say that it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {directory} cannot be made: {error.strerror}.") from error
    if not os.access(directory, os.W_OK):
        raise UserError(f"--output_dir {directory} is not writable.")


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


def clean_text(text: str) -> str:
    """Put text in form NFC on one line, without entities and invisible characters."""
    text = html.unescape(unicodedata.normalize("NFC", text)).translate(INVISIBLE)
    return " ".join(text.split())


def count_words(text: str) -> int:
    """Count words, as runs of characters that are not white space."""
    return len(text.split())


def split_paragraphs(description: str) -> tuple[str, list[list[str]]]:
    """Split a description into its synopsis and its paragraphs, each a list of lines."""
    synopsis, *lines = description.split("\n")
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip() in ("", "."):
            paragraphs.append([])
        else:
            # The first space only marks a continuation line; a second one means preformatted.
            paragraphs[-1].append(line[1:])
    return clean_text(synopsis), [paragraph for paragraph in paragraphs if paragraph]


def is_listed(line: str) -> bool:
    """Tell whether a line is preformatted or begins a list item."""
    return line[0].isspace() or BULLET.match(line) is not None


def join_lines(lines: list[str]) -> str:
    """Unwrap the lines of a paragraph into one."""
    return clean_text(JOINED.sub("", "\n".join(line.strip() for line in lines)))


def take_prose(lines: list[str]) -> tuple[str, bool]:
    """Join the lines before the first list line, and tell whether there is a list line."""
    listed = [is_listed(line) for line in lines]
    end = listed.index(True) if any(listed) else len(lines)
    prose = join_lines(lines[:end])
    # A sentence that runs on into a list is cut at different words in the two languages.
    is_cut = any(listed) and not prose.endswith((".", ":", "!", "?"))
    return "" if is_cut else prose, any(listed)


def align_paragraphs(german: list[list[str]], english: list[list[str]]) -> Iterator[tuple[int, str, str]]:
    """Yield number, German and English of the prose paragraphs that are shaped alike."""
    if len(german) != len(english):
        return
    for number, (left, right) in enumerate(zip(german, english, strict=True), start=1):
        (de, de_listed), (en, en_listed) = take_prose(left), take_prose(right)
        if de and en and de_listed == en_listed:
            yield number, de, en


def is_untranslated(german: str, english: str) -> bool:
    """Tell whether the German side is, for the most part, English."""
    words = WORD.findall(german.lower())
    shared = set(WORD.findall(english.lower()))
    copied = sum(word in shared for word in words)
    foreign, native = len(ENGLISH_WORD.findall(german)), len(GERMAN_WORD.findall(german))
    # A single German function word tells "Client für X" from an English text with many names.
    allowed = 0.9 if native else 0.7
    return copied > allowed * len(words) or foreign > max(1, native)


def reject_pair(german: str, english: str, args: DebianArguments) -> str | None:
    """Name the filter that drops a pair, or None to keep it."""
    short, long = sorted((count_words(german), count_words(english)))
    if DAMAGE.search(german) or DAMAGE.search(english):
        return "damaged"
    if german.casefold() == english.casefold():
        return "equal"
    if short < MIN_WORDS or long > args.max_words:
        return "length"
    # One compound noun stands for several English words: short texts are too noisy for a ratio.
    if long >= 8 and long > args.max_ratio * short:
        return "ratio"
    return "untranslated" if is_untranslated(german, english) else None


def make_pairs(description: Description, args: DebianArguments, counts: Counter[str]) -> Iterator[Row]:
    """Yield the translation rows of one package."""
    if description.german is None:
        return
    de_synopsis, de_paragraphs = split_paragraphs(description.german)
    en_synopsis, en_paragraphs = split_paragraphs(description.english)
    counts["paragraph_count_differs"] += len(de_paragraphs) != len(en_paragraphs)
    pairs = [(0, de_synopsis, en_synopsis), *align_paragraphs(de_paragraphs, en_paragraphs)]
    for number, de, en in pairs:
        reason = reject_pair(de, en, args)
        counts[reason or "kept"] += 1
        if reason is None:
            yield {"id": f"{description.package}#{number}", "translation": {"de": de, "en": en}}


def join_items(lines: list[str]) -> list[str]:
    """Unwrap a paragraph: prose onto one line, each list item or preformatted line onto its own."""
    items: list[list[str]] = []
    for line in lines:
        if not items or is_listed(line):
            items.append([])
        items[-1].append(line)
    return [join_lines(item) for item in items]


def make_synopsis(description: Description, args: DebianArguments, counts: Counter[str]) -> Iterator[Row]:
    """Yield the summarization row of one package, if it passes the filters."""
    summary, paragraphs = split_paragraphs(description.english)
    document = "\n".join(line for paragraph in paragraphs for line in join_items(paragraph))
    if DAMAGE.search(document) or DAMAGE.search(summary):
        reason = "damaged"
    elif not MIN_DOCUMENT <= count_words(document) <= args.max_document or count_words(summary) < MIN_WORDS:
        reason = "length"
    else:
        reason = "kept"
        yield {"id": description.package, "document": document, "summary": summary}
    counts[reason] += 1


def make_tasks(args: DebianArguments) -> list[Task]:
    """Name the two data sets, with how to read a row's input and target."""
    return [
        Task("debian_de_en", make_pairs, lambda row: (row["translation"]["de"], row["translation"]["en"])),
        Task(
            "debian_synopsis",
            make_synopsis,
            lambda row: (row["document"], row["summary"]),
            max_per_source=args.max_per_source,
            train_rows=args.train_rows,
        ),
    ]


def pick_split(source: str) -> str:
    """Pick the split of a source package, the same on every run."""
    share = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64
    return next(name for name, end in SPLIT_ENDS.items() if share < end)


def order_rows(rows: Iterable[tuple[str, Row]], seed: int) -> list[tuple[str, Row]]:
    """Put rows in an order that depends on seed and id alone."""
    return sorted(rows, key=lambda item: hashlib.sha256(f"{seed}:{item[1]['id']}".encode()).digest())


def split_rows(task: Task, rows: Iterable[tuple[str, Row]], counts: Counter[str]) -> Splits:
    """Share rows out to the splits, without a split's duplicates and a source package's surplus."""
    splits: Splits = {name: [] for name in SPLIT_ENDS}
    known: set[tuple[str, tuple[str, str]]] = set()
    taken: Counter[str] = Counter()
    for source, row in rows:
        name, texts = pick_split(source), task.read(row)
        if (name, texts) in known:
            counts["duplicate"] += 1
        elif task.max_per_source is not None and taken[source] >= task.max_per_source:
            counts["surplus_of_source"] += 1
        else:
            known.add((name, texts))
            taken[source] += 1
            splits[name].append(row)
    if task.train_rows is not None:
        counts["not_sampled"] = max(0, len(splits["train"]) - task.train_rows)
        splits["train"] = splits["train"][: task.train_rows]
    return splits


def mark_seen(task: Task, splits: Splits) -> None:
    """Mark the rows whose target is also the target of a train row."""
    targets = {task.read(row)[1] for row in splits["train"]}
    for rows in splits.values():
        for row in rows:
            row["seen_in_train"] = task.read(row)[1] in targets


def build_splits(
    task: Task, descriptions: list[Description], args: DebianArguments
) -> tuple[Splits, Counter[str]]:
    """Make the rows of one data set, and count what each filter dropped."""
    counts: Counter[str] = Counter()
    rows = [(found.source, row) for found in descriptions for row in task.make(found, args, counts)]
    splits = split_rows(task, order_rows(rows, args.seed), counts)
    mark_seen(task, splits)
    return splits, counts


def dump_rows(rows: Iterable[Row]) -> bytes:
    """Render rows as JSON lines in UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_split(path: Path, rows: list[Row]) -> dict[str, Any]:
    """Write one split, and describe the file."""
    content = dump_rows(rows)
    # Without time and file name in the gzip header, equal rows make equal files.
    packed = gzip.compress(content, compresslevel=9, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed)
    return {"gzip_bytes": len(packed), "json_sha256": hashlib.sha256(content).hexdigest()}


def average_words(texts: Iterable[str]) -> float:
    """Average the word counts of texts."""
    words = [count_words(text) for text in texts]
    return round(sum(words) / len(words), 2) if words else 0.0


def describe_split(task: Task, rows: list[Row], train: list[Row]) -> dict[str, Any]:
    """Count rows and words of a split, and the rows it shares with train."""
    inputs = {task.read(row)[0] for row in train}
    seen_inputs = sum(task.read(row)[0] in inputs for row in rows)
    return {
        "rows": len(rows),
        "input_words_mean": average_words(task.read(row)[0] for row in rows),
        "target_words_mean": average_words(task.read(row)[1] for row in rows),
        "target_in_train": round(sum(row["seen_in_train"] for row in rows) / max(1, len(rows)), 4),
        "input_in_train": round(seen_inputs / max(1, len(rows)), 4),
    }


def write_task(task: Task, splits: Splits, output_dir: Path) -> dict[str, Any]:
    """Write the splits of one data set, and return their statistics."""
    stats = {}
    for name, rows in splits.items():
        stats[name] = describe_split(task, rows, splits["train"])
        stats[name] |= write_split(output_dir / task.name / f"{name}.jsonl.gz", rows)
    return stats


def format_table(stats: dict[str, Any]) -> str:
    """Render the counts of all splits as a Markdown table."""
    lines = [
        "| data set | split | rows | words in input (mean) | words in target (mean) | target also in train |",
        "|---|---|---|---|---|---|",
    ]
    for task, result in stats["data_sets"].items():
        for name, split in result["splits"].items():
            words = f"{split['input_words_mean']:.1f} | {split['target_words_mean']:.1f}"
            seen = "" if name == "train" else f"{split['target_in_train']:.1%}"
            lines.append(f"| `{task}` | {name} | {split['rows']} | {words} | {seen} |")
    return "\n".join(lines)


def pick_examples(task: Task, rows: list[Row]) -> list[Row]:
    """Pick the first two rows that are neither boilerplate nor long."""
    fit = (row for row in rows if not row["seen_in_train"] and 8 <= count_words(task.read(row)[0]) <= 40)
    return [row for row, _ in zip(fit, range(2), strict=False)]


def write_readme(stats: dict[str, Any], examples: list[Row], args: DebianArguments) -> None:
    """Write the data card, with the numbers of this run."""
    test = {task: result["splits"]["test"] for task, result in stats["data_sets"].items()}
    values = {
        **vars(args),
        **stats["archive"],
        "min_words": MIN_WORDS,
        "min_document": MIN_DOCUMENT,
        "table": format_table(stats),
        "seen_de_en": f"{test['debian_de_en']['target_in_train']:.1%}",
        "seen_synopsis": f"{test['debian_synopsis']['target_in_train']:.1%}",
        "input_de_en": f"{test['debian_de_en']['input_in_train']:.1%}",
        "input_synopsis": f"{test['debian_synopsis']['input_in_train']:.1%}",
        "examples": dump_rows(examples).decode().rstrip(),
    }
    (args.output_dir / "README.md").write_text(Template(README).substitute(values), encoding="utf-8")


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


def build_data(indexes: dict[str, Path], args: DebianArguments) -> dict[str, Any]:
    """Write both data sets with statistics and data card, and return the statistics."""
    descriptions = load_descriptions(indexes)
    stats: dict[str, Any] = {"archive": describe_archive(indexes), "data_sets": {}}
    stats["packages"] = len(descriptions)
    stats["translated_packages"] = sum(found.german is not None for found in descriptions)
    examples: list[Row] = []
    for task in make_tasks(args):
        splits, counts = build_splits(task, descriptions, args)
        written = write_task(task, splits, args.output_dir)
        stats["data_sets"][task.name] = {"splits": written, "filters": dict(sorted(counts.items()))}
        examples += pick_examples(task, splits["test"])
    write_readme(stats, examples, args)
    (args.output_dir / "stats.json").write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    return stats


def main(argv: list[str] | None = None) -> None:
    """Fetch the index files and build both data sets."""
    with one_line_errors():
        (args,) = parse_groups((DebianArguments,), __doc__, argv)
        prepare_output(args.output_dir)
        with tempfile.TemporaryDirectory() as temporary:
            work = (args.work_dir or Path(temporary)).resolve()
            # Run as root, apt drops to a user of its own, who must be able to enter the directory.
            Path(temporary).chmod(0o755)
            try:
                stats = build_data(fetch_indexes(work, args), args)
            except OSError as error:
                raise UserError(
                    f"{error.filename} cannot be used ({error.strerror}): check --output_dir and --work_dir."
                ) from error
    print(json.dumps(stats, indent=2))


if __name__ == "__main__":
    main()
