"""`hf-osd`: one sub-command per file of this folder."""

import argparse
import sys
from collections.abc import Sequence

from ..text import printable
from ..version import __version__
from . import estimate, extract_lora, report, run, show


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command and run it; exit with one sentence where what was asked for cannot be."""
    parser = argparse.ArgumentParser(
        prog="hf-osd", description="Online Subspace Descent for the Hugging Face ecosystem."
    )
    parser.add_argument("--version", action="version", version=f"hf_osd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run.add_parser(commands)
    show.add_parser(commands)
    estimate.add_parser(commands)
    extract_lora.add_parser(commands)
    report.add_parser(commands)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:  # all that follows belongs to the script: argparse would take its `--` and `-m`
        run.run(argv[1:])
        return
    arguments = parser.parse_args(argv)
    try:
        arguments.function(arguments)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"hf-osd {arguments.command}: {printable(' '.join(str(error).split()))}") from error
