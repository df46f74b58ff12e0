"""`hf-osd show`: what a P that was saved or shared looks like."""

import argparse
import json


DESCRIPTION = """Show the projections P in a folder or in a repository on the Hub.

  hf-osd show out/checkpoint-1000
  hf-osd show user/name --revision v1 --json
  hf-osd show out --base user/base-model --plot shares.png

orthogonality: ||P'P - I|| / sqrt(r), 0 for orthonormal columns. share: how much of the weight's change since --base
lies in P's subspace, ||QQ' dW||^2 / ||dW||^2 with Q a basis of it; random: what a random subspace would hold, r / s.
Of a two-sided P both are of its two factors: the mean, and the product. P of: the weight whose P this is, where layers
that are given one input share it.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "show", help=DESCRIPTION.split("\n")[0], description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", metavar="PATH_OR_ID", help="folder or repository with osd_config.json")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--base", metavar="MODEL", help="folder or repository of the model before training")
    parser.add_argument("--model", metavar="MODEL", help="the model after training; default: PATH_OR_ID itself")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--plot", metavar="FILE", help="draw the values per layer into a picture")
    parser.set_defaults(function=show)


def show(arguments: argparse.Namespace) -> None:
    """Print what was asked for."""
    from .show_report import inspect, inspect_text, plot

    if arguments.model and not arguments.base:
        raise ValueError("--model needs --base, the model before training.")
    report = inspect(arguments)
    if arguments.plot:
        plot(report["parameters"], arguments.plot)
    if arguments.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print(inspect_text(report))
