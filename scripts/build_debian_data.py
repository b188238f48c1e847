"""Build the debian_de_en and debian_synopsis data sets from Debian 12 package descriptions.
Run from the repository root, on a machine with apt-get and a reachable Debian mirror:
    python scripts/build_debian_data.py --output_dir data/debian
"""

import gzip
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.errors import UserError
from scripts.debian_data.archive import Description, describe_archive, fetch_indexes, load_descriptions
from scripts.debian_data.rows import MIN_DOCUMENT, MIN_WORDS, Row, Task, count_words, make_tasks
from util.console import command
from util.files import json_line, locked_output_dir, write_json, write_text
from util.flags import parse_groups
from util.script_arguments import DebianArguments
from util.tables import markdown_table

CARD = Path(__file__).parent / "debian_data" / "card.md"  # with $names for the numbers of a run
Splits = dict[str, list[Row]]
SPLIT_ENDS = {"train": 0.94, "validation": 0.97, "test": 1.0}


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


def write_split(path: Path, rows: list[Row]) -> dict[str, Any]:
    """Write one split, and describe the file."""
    content = "".join(map(json_line, rows)).encode()
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
    words = ("words in input (mean)", "words in target (mean)")
    lines = []
    for task, result in stats["data_sets"].items():
        for name, split in result["splits"].items():
            means = (f"{split[key]:.1f}" for key in ("input_words_mean", "target_words_mean"))
            seen = "" if name == "train" else f"{split['target_in_train']:.1%}"
            lines.append([f"`{task}`", name, str(split["rows"]), *means, seen])
    return markdown_table(["data set", "split", "rows", *words, "target also in train"], lines)


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
        "examples": "".join(map(json_line, examples)).rstrip(),
    }
    write_text(args.output_dir / "README.md", Template(CARD.read_text(encoding="utf-8")).substitute(values))


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
    write_json(args.output_dir / "stats.json", stats)
    return stats


def main(argv: list[str] | None = None) -> None:
    """Fetch the index files and build both data sets."""
    with command():
        (args,) = parse_groups((DebianArguments,), __doc__, argv)
        with locked_output_dir(args.output_dir), tempfile.TemporaryDirectory() as temporary:
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
