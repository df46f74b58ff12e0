"""`hf-osd extract-lora`: share a full-weight fine-tune as a PEFT LoRA adapter."""

import argparse
import warnings
from typing import TYPE_CHECKING

from ..text import format_bytes, printable, table


if TYPE_CHECKING:
    from ..interop import ExtractedLora


DESCRIPTION = """Turn what training changed in a model's weights into a PEFT LoRA adapter, of a few megabytes.

  hf-osd extract-lora out --base user/base-model --rank 16 --output adapter
  hf-osd extract-lora user/tuned --base user/base-model --energy 0.9 --push user/adapter

kept: share of the change of a layer that its rank keeps, ||BA||^2 / ||dW||^2. In the files all layers have the largest
rank, filled up with zeros, and alpha is that rank: peft, vLLM and llama.cpp read the same adapter. Without --output
and --push it is shown and nothing is written. It is loaded with peft.PeftModel.from_pretrained(base, adapter). It
needs a folder or repository of its own: one that holds a model is refused.
"""
CARRY = ("none", "head", "auto", "all")  # as in `hf_osd.interop`, which takes seconds to import


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "extract-lora",
        help=DESCRIPTION.split("\n")[0],
        description=DESCRIPTION,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("tuned", metavar="TUNED", help="folder or repository of the model after training")
    parser.add_argument("--base", required=True, metavar="BASE", help="the model before training")
    rank = parser.add_mutually_exclusive_group()
    rank.add_argument("--rank", type=int, metavar="R", help="rank of each layer (default: 16)")
    rank.add_argument(
        "--energy", type=float, metavar="E", help="or: the smallest rank that keeps this share, e.g. 0.9"
    )
    parser.add_argument("--max_rank", type=int, metavar="R", help="limit for the ranks that --energy asks for")
    parser.add_argument(
        "--carry",
        choices=CARRY,
        default="auto",
        help="what else to take along: nothing, for vLLM and llama.cpp (none); the task head; norms and biases too\n"
        "(auto, default); embeddings too (all)",
    )
    parser.add_argument("--exact", action="store_true", help="exact SVD of large matrices too")
    parser.add_argument("--output", metavar="DIR", help="write the adapter into this folder")
    parser.add_argument("--push", metavar="USER/NAME", help="push the adapter to this repository")
    parser.add_argument("--private", action="store_true", help="a repository that --push creates is private")
    parser.set_defaults(function=extract)


def extract(arguments: argparse.Namespace) -> None:
    """Do what was asked for."""
    from ..interop import extract_lora
    from ..interop.destination import check_folder, check_repository

    if arguments.private and not arguments.push:
        raise ValueError("--private is for --push.")
    if arguments.max_rank is not None and arguments.energy is None:
        raise ValueError("--max_rank is for --energy.")
    models = (arguments.tuned, arguments.base)
    if arguments.output:
        check_folder(arguments.output, models)
    if arguments.push:
        check_repository(arguments.push, models)
    fixed = 16 if arguments.rank is None else arguments.rank
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The adapter leaves out")  # the text below says it
        warnings.filterwarnings("ignore", message="vLLM refuses")
        adapter = extract_lora(
            arguments.tuned,
            arguments.base,
            rank="auto" if arguments.energy is not None else fixed,
            energy=arguments.energy,
            max_rank=arguments.max_rank,
            carry=arguments.carry,
            exact=arguments.exact,
        )
        print(text(adapter, arguments.tuned))
        if arguments.output:
            adapter.save_pretrained(arguments.output)
            print(f"written to {arguments.output}")
        if arguments.push:
            commit = adapter.push_to_hub(arguments.push, private=arguments.private or None)
            print(f"pushed to {arguments.push}: {commit.commit_url}")


def text(adapter: "ExtractedLora", tuned: str) -> str:
    """A table of the layers, what else is carried, what is left out, and sizes."""
    from ..interop.changes import relative_text

    rows = [
        [name, f"{layer.shape[0]} x {layer.shape[1]}", str(layer.rank), f"{100 * layer.kept:.1f}%"]
        for name, layer in adapter.layers.items()
    ]
    lines = [table(["layer", "shape", "rank", "kept"], rows, left=("layer",)), ""]
    for title, found in (("carried in full", adapter.carried), ("left out", adapter.dropped)):
        if found:
            named = ", ".join(f"{printable(name)} ({relative_text(change)})" for name, change in found.items())
            lines.append(f"{title}, with the relative change: {named}")
    if adapter.limits:
        lines.append(adapter.limits)
    size, model_size = (format_bytes(size, 2, "MB") for size in (adapter.bytes, adapter.model_bytes))
    lines.append(
        f"{len(rows)} layers keep {100 * adapter.kept:.1f}% of their change, stored at rank {adapter.rank}; {size} "
        f"for {tuned}, whose weights have {model_size}"
    )
    return "\n".join(lines)
