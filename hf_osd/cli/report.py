"""`hf-osd report`: one HTML page about one or several training runs."""

import argparse
import os
import sys
from pathlib import Path


DESCRIPTION = """Write one HTML page about training runs: losses, learning rates, PCA loss and orthogonality of every
layer, memory by part, throughput, and the settings in which the runs differ. It needs neither network nor server.

  hf-osd report out
  hf-osd report runs/osd runs/adamw --output comparison.html

RUN_DIR is the output_dir of a Trainer, or one of its checkpoints. Needs pip install ".[report]" in a clone.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "report",
        help="Write one HTML page about training runs.",
        description=DESCRIPTION,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="output_dir of a Trainer")
    parser.add_argument(
        "--output", default="report.html", metavar="FILE", help="the page to write (default: report.html)"
    )
    parser.set_defaults(function=report)


def report(arguments: argparse.Namespace) -> None:
    """Write the page; exit with one sentence where no run can be read."""
    from ..report import read_runs, render
    from ..text import printable, write_text

    runs, errors = read_runs(arguments.folders)
    lines = [f"hf-osd report: {printable(name)}: {printable(text)}" for name, text in errors.items()]
    if not runs:
        raise SystemExit("\n".join(lines))
    for line in lines:
        print(line, file=sys.stderr)
    output = Path(os.path.realpath(arguments.output))  # a link stays one
    if output.exists() and not output.is_file():
        raise ValueError(f"--output {arguments.output} is not a file.")
    write_text(output, render(runs, errors))
    print(f"{printable(arguments.output)}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
