"""Bytes that a data-parallel process exchanges in one step, whole gradients against `ddp_compression="subspace"`.

Counted from the shapes of the model: r (m + n) numbers for a projected matrix (R and A) and two for norms, against
m n; embeddings, head and norms are exchanged whole in both. A test of two processes counts what they really exchange
and finds the same. Writes results/<device>/ddp_exchange.json and .md.

Needs: nothing beyond the package; no weights are made.

    python examples/benchmarks/ddp_exchange.py                                   # LLaMA 1B, rank 128 and 512
    python examples/benchmarks/ddp_exchange.py --model llama_7b --ranks 256 1024
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_osd
from environment import describe, results_folder
from hf_osd.optim.arrival.exchange import exchange_bytes
from hf_osd.optim.step.geometry import ProjectedGeometry


CONFIGS = Path(__file__).parents[1] / "llama_configs"


def rows(model_name: str, ranks: list[int]) -> list[dict[str, Any]]:
    """One row for each rank, for bfloat16 gradients."""
    config = AutoConfig.for_model(**json.loads((CONFIGS / f"{model_name}.json").read_text()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = []
    for rank in ranks:
        optimizer = hf_osd.create_osd_optimizer(model, rank=rank)
        params = (p for group in optimizer.param_groups for p in group["params"])
        geometries = [optimizer.weight_of(p).geometry for p in params]
        projected = [geometry for geometry in geometries if isinstance(geometry, ProjectedGeometry)]
        compressed, whole = exchange_bytes(geometries, [torch.bfloat16] * len(geometries))
        of_matrices = exchange_bytes(projected, [torch.bfloat16] * len(projected))
        found.append(
            {
                "model": model_name,
                "rank": rank,
                "whole_bytes": whole,
                "compressed_bytes": compressed,
                "ratio": round(compressed / whole, 4),
                "matrices_ratio": round(of_matrices[0] / of_matrices[1], 4),
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | whole gradients | `subspace` | ratio | of the projected matrices |", "| --- " * 5 + "|"]
    for row in found:
        whole, compressed = (row[key] / 1e6 for key in ("whole_bytes", "compressed_bytes"))
        name = row["model"].replace("llama_", "LLaMA ").upper().replace("LLAMA", "LLaMA")
        lines.append(
            f"| {name}, rank {row['rank']} | {whole:,.0f} MB | {compressed:,.0f} MB | {row['ratio']:.3f} | "
            f"{row['matrices_ratio']:.3f} |"
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
