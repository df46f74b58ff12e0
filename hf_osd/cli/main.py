"""`hf-osd`: one sub-command per file of this folder."""

import argparse
import sys
from collections.abc import Sequence

from . import run


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command and run it."""
    parser = argparse.ArgumentParser(
        prog="hf-osd", description="Online Subspace Descent for the Hugging Face ecosystem."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run.add_parser(commands)
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    arguments.function(arguments)
