"""Bytes that a process exchanges in one step under DDP and FSDP2: whole gradients against `source="activations"`.

Counted from the shapes of the model: for each weight whose layer is prepared R (m r numbers), for each input, which
several layers may share, A and ||x||² (n r + 1), and the whole gradients of all others: embeddings, head and norms.
DDP all-reduces all of it. FSDP2 reduce-scatters gradients, and R like them. Where P is whole on each process
(`divide_projection=False`) A and ||x||² are all-reduced, which is a reduce-scatter and an all-gather: they count
twice. Where processes divide P, it is gathered in the forward pass and in the step, its gradient is reduce-scattered,
and ||x||² all-reduced. What FSDP2 gathers of weights is the same with all of them: it is in the last column alone,
twice those of blocks. Tests of two processes count what they really exchange and find the same. Writes
results/<device>/ddp_exchange.json and .md.

Needs: nothing beyond the package; no weights are made.

    python examples/benchmarks/ddp_exchange.py                                   # LLaMA 1B, rank 128 and 512
    python examples/benchmarks/ddp_exchange.py --model llama_7b --ranks 256 1024
"""

import argparse
import json
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import hf_osd
from environment import describe, results_folder
from hf_osd.layers.linear import InSubspace
from shapes import config_file


def exchanged_bytes(optimizer: hf_osd.OSD, model: nn.Module) -> tuple[int, int, int, int]:
    """What one process gives to a step's exchanges: all, and that of prepared layers; then whole gradients likewise.

    Args:
        optimizer ([`OSD`]): Of `source="activations"`, after a forward pass of the model.
        model (`nn.Module`): The model.
    """
    layers = {module.osd: None for module in model.modules() if isinstance(module, InSubspace)}  # tied ones once
    prepared = sum(layer.stand_in.nbytes for layer in layers) + input_bytes(model)
    whole = sum(layer.weight.nbytes for layer in layers)
    rest = sum(p.nbytes for group in optimizer.trained_groups for p in group["params"]) - whole
    return prepared + rest, prepared, whole + rest, whole


def input_bytes(model: nn.Module) -> int:
    """A and ||x||² of all inputs, in the precision of the weights: the part of it that FSDP2 does not divide."""
    return sum((size + 1) * dtype.itemsize for size, dtype in _inputs(model))


def gathered_bytes(model: nn.Module) -> tuple[int, int, int]:
    """Of a P that processes divide, in a step without checkpoints: gathered, reduce-scattered, all-reduced."""
    P = sum(size * dtype.itemsize for size, dtype in _inputs(model))
    energies = sum(torch.promote_types(dtype, torch.float32).itemsize for _, dtype in _inputs(model))
    return 2 * P, P, energies


def _inputs(model: nn.Module) -> list[tuple[int, torch.dtype]]:
    """Entries of P of each input, and the precision of the weights."""
    layers = [module.osd for module in model.modules() if isinstance(module, InSubspace)]
    inputs = {layer.input: layer.weight.dtype for layer in layers}
    return [(shared.size * shared.first.rank, dtype) for shared, dtype in inputs.items()]


def rows(model_name: str, ranks: list[int]) -> list[dict[str, Any]]:
    """One row for each rank, for bfloat16 gradients."""
    config = AutoConfig.from_pretrained(config_file(model_name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = []
    for rank in ranks:
        optimizer = hf_osd.create_osd_optimizer(model, rank=rank, source="activations")
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))  # layers meet their inputs
        exchanged, prepared, whole, matrices = exchanged_bytes(optimizer, model)
        gathers, scattered, energies = gathered_bytes(model)
        by_whole_p = exchanged + input_bytes(model)
        by_divided_p = exchanged - input_bytes(model) + gathers + scattered + 2 * energies
        blocks = sum(p.nbytes for p in model.model.layers.parameters())
        weights = blocks + sum(p.nbytes for p in model.parameters())  # the root's are gathered once
        found.append(
            {
                "model": model_name,
                "rank": rank,
                "whole_bytes": whole,
                "exchanged_bytes": exchanged,
                "ratio": round(exchanged / whole, 4),
                "matrices_ratio": round(prepared / matrices, 4),
                "fsdp2_ratio": round(by_whole_p / whole, 4),
                "fsdp2_divided_ratio": round(by_divided_p / whole, 4),
                "fsdp2_divided_to_whole_p": round((weights + by_divided_p) / (weights + by_whole_p), 4),
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    titles = ["", "whole gradients", "`source=activations`", "ratio", "of the projected matrices"]
    titles += ["FSDP2, P whole", "FSDP2, P divided", "over P whole, weights' gathers included"]
    lines = [f"| {' | '.join(titles).lstrip()} |", "| --- " * len(titles) + "|"]
    for row in found:
        whole, exchanged = (row[key] / 1e6 for key in ("whole_bytes", "exchanged_bytes"))
        name = row["model"].replace("llama_", "LLaMA ").upper().replace("LLAMA", "LLaMA")
        lines.append(
            f"| {name}, rank {row['rank']} | {whole:,.0f} MB | {exchanged:,.0f} MB | {row['ratio']:.3f} | "
            f"{row['matrices_ratio']:.3f} | {row['fsdp2_ratio']:.3f} | {row['fsdp2_divided_ratio']:.3f} | "
            f"{row['fsdp2_divided_to_whole_p']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_1b", help="file in llama_configs/ (default: llama_1b)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 512])
    arguments = parser.parse_args()
    found = rows(arguments.model, arguments.ranks)
    folder = results_folder()
    result = {"environment": describe(), "gradients": "bfloat16", "rows": found}
    (folder / "ddp_exchange.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "ddp_exchange.md").write_text(table(found))
    print(table(found), end="")


if __name__ == "__main__":
    main()
