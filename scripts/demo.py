"""A page that shows tokens in the colour of the layer they stop at, beside the output of full depth.

    pip install -r requirements-demo.txt
    python scripts/demo.py

Then open http://127.0.0.1:7860. The page loads nothing from elsewhere and sends nothing out: docs/demo.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.errors import UserError
from util.console import command, prepare_console
from util.demo_arguments import DemoArguments
from util.flag_help import answer_help
from util.flags import parse_groups

if __name__ == "__main__":
    answer_help((DemoArguments,), __doc__)


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((DemoArguments,), __doc__, argv)
        show(flags)


def show(flags: DemoArguments) -> None:
    """Serve the page.

    Raises:
        UserError: Gradio is not installed, no checkpoint can be loaded, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        from util.demo.page import open_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("The page needs Gradio: pip install -r requirements-demo.txt") from error
    prepare_console()  # anew: transformers has been imported
    open_page(flags)


if __name__ == "__main__":
    main()
