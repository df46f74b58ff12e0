"""`hf-osd run`: run a script that knows nothing of hf_osd with the optimizer's names registered."""

import argparse
import os
import runpy
import sys


DESCRIPTION = """Register the osd_ optimizers with transformers, then run a script or module as __main__.

  hf-osd run train.py --optim osd_adamw8bit --output_dir out
  hf-osd run -m trl.cli sft --optim osd_adamw8bit ...
  torchrun --nproc_per_node 2 -m hf_osd run train.py --optim osd_adamw8bit ...
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "run", help=DESCRIPTION.split("\n")[0], description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-m", "--module", action="store_true", help="the target is a module's name, as in python -m")
    parser.add_argument("target", help="path of a script, or name of a module with -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on untouched")
    parser.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the target as `python target arguments` would."""
    import hf_osd  # noqa: F401 - registers the names

    sys.argv = [arguments.target, *arguments.arguments]
    if arguments.module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments.target, run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(arguments.target):
        raise SystemExit(f"hf-osd run: there is no script {arguments.target!r}. Use -m for a module.")
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments.target)))
    runpy.run_path(arguments.target, run_name="__main__")
