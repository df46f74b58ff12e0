"""`hf-osd estimate`: whether a model can be trained on a GPU, with which optimizer, rank and batch."""

import argparse
import json
import sys


DESCRIPTION = """Estimate the memory of training a model, from its config alone: does it fit, and what would?

  hf-osd estimate meta-llama/Llama-2-7b-hf --rank 512 --layerwise --seq 2048 --batch 4 --gpu 24GB
  hf-osd estimate examples/llama_configs/llama_7b.json --rank 1024 --optim_args projection_dtype=bfloat16
  hf-osd estimate out/config.json --gpu 80GiB --json
  hf-osd estimate out/config.json --optim_args source=activations
  hf-osd estimate examples/llama_configs/llama_7b.json --rank 1024 --processes 8

A step is run on the meta device, where tensors have shapes and no memory, and what is alive is counted: with fused
attention, weights in --dtype, one batch for each step. GaLore has the rank of ours, LoRA too without --lora_rank,
SubZero that of --subzero_args; P is with its moments, and for SubZero U and V.
The columns are each part's most, "step" the temporaries of a parameter's step; the peak is what is there at once.
--reserve is kept free for the driver's context, libraries and fragmentation. --processes tells what each of so many
holds of what FSDP2 divides between steps: two buckets of P, 32 MiB or two P, come on top while it steps, and with
source=activations, while it computes, the P of two blocks, and of each input what P learns of it, as large as P whole.
For 7B it takes half a minute, with source=activations and --gpu minutes; what is being run is told on stderr.
"""
RESERVE = "1GB"
# As in `hf_osd.optim` and `hf_osd.estimate`, which take seconds to import.
DEFAULT_RANK = 128
DTYPES = ("bf16", "fp32", "bfloat16", "float32")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "estimate",
        help=DESCRIPTION.split("\n")[0],
        description=DESCRIPTION,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="repository on the Hub, folder, or config.json")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--optim", metavar="NAME", help="our optimizer (default: osd_adamw8bit)")
    parser.add_argument("--preset", metavar="NAME", help="finetune (default, if options allow), pretrain, reference")
    parser.add_argument("--rank", type=int, default=DEFAULT_RANK, metavar="R", help=f"default: {DEFAULT_RANK}")
    parser.add_argument("--lora_rank", type=int, metavar="R", help="of LoRA's row (default: the same)")
    parser.add_argument("--layerwise", action="store_true", help="step in the backward pass, as osd_*_layerwise")
    parser.add_argument("--optim_args", metavar="K=V,...", help="other options of our optimizer, as for a Trainer")
    parser.add_argument("--subzero_args", metavar="K=V,...", help="options of SubZero, such as source=activations")
    parser.add_argument(
        "--target_modules",
        nargs="+",
        metavar="NAME",
        help="what is projected: names, or one regular expression for whole names (default: all-linear)",
    )
    parser.add_argument(
        "--exclude_modules",
        nargs="+",
        metavar="NAME",
        help="of these what is not, as osd_exclude_modules of OSDTrainingArguments",
    )
    parser.add_argument("--seq", type=int, default=1024, metavar="S", help="tokens of a sequence (default: 1024)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences on the device (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: bf16)")
    parser.add_argument("--processes", type=int, metavar="N", help="tell, too, what each of N holds under FSDP2")
    parser.add_argument("--gpu", metavar="SIZE", help="memory of the device, such as 24GB or 80GiB")
    parser.add_argument("--reserve", metavar="SIZE", help=f"of it, not for tensors (default: {RESERVE})")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(function=estimate)


def estimate(arguments: argparse.Namespace) -> None:
    """Print what was asked for, and on stderr what is being run."""
    from .estimate_report import make_report, report_text

    report = make_report(arguments, usable_memory(arguments), _say)
    print(json.dumps(report, indent=2) if arguments.json else report_text(report))


def _say(text: str) -> None:
    print(f"hf-osd estimate: {text} ...", file=sys.stderr, flush=True)


def usable_memory(arguments: argparse.Namespace) -> int | None:
    """Bytes that tensors may take."""
    if arguments.gpu is None:
        if arguments.reserve is not None:
            raise ValueError("--reserve is for --gpu.")
        return None
    gpu, reserve = _size("gpu", arguments.gpu), _size("reserve", arguments.reserve or RESERVE)
    if reserve >= gpu:
        raise ValueError(f"--gpu {arguments.gpu} leaves nothing beside --reserve {arguments.reserve or RESERVE}.")
    return gpu - reserve


def _size(option: str, text: str) -> int:
    from accelerate.utils import convert_file_size_to_int

    try:
        return convert_file_size_to_int(text.upper())  # in lower case its b are bits
    except (ValueError, OverflowError):  # the latter for inf
        raise ValueError(f"--{option} must be a number with KB, MB, GB, KiB, MiB or GiB, got {text!r}.") from None
