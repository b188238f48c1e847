"""Turn result folders into one HTML page that needs no network, with its table as CSV and Markdown.

python scripts/report.py save/sweep save/judge --output_dir save/report

A folder may come from run.py, from scripts/sweep.py or from gpt_eval. Give a run at full depth on the same
samples along with other runs, and their quality is compared with it; speed-ups are those of sweeps, whose
settings decode in turn.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.script_arguments import ReportArguments

if __name__ == "__main__":
    answer_help((ReportArguments,), __doc__)  # before what is slow is imported

from util.console import command
from util.files import locked_output_dir
from util.flags import parse_groups
from util.report.folders import read_folders
from util.report.page import write_report


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((ReportArguments,), __doc__, argv)
        results = read_folders(flags.folders)
        with locked_output_dir(flags.output_dir) as folder:
            written = write_report(results, folder)
    print(f"Wrote {', '.join(path.name for path in written)} to {flags.output_dir}. Next: open report.html")


if __name__ == "__main__":
    main()
