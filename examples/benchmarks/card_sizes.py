"""The largest model whose full fine-tuning fits a card, by method: computed, never run.

Batch 1, gradient checkpointing, bfloat16; peaks as `hf-osd estimate` counts them on the meta device, which for models
that fit here are within 1% of counted allocations (`memory.py`). GaLore's moments in 8 bits and QLoRA's weights in 4
are told from their formats: two bytes and two absmax in 256 elements; half a byte, and 4.127 bits with double
quantisation. Of each card `reserve_gb` is for the driver's context, libraries and fragmentation.
Reads experiments/card_sizes.json; writes results/<device>/card_sizes.json and .md.

    python examples/benchmarks/card_sizes.py
    python examples/benchmarks/card_sizes.py --models 7B --methods "AdamW" "QLoRA, rank 16"
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from environment import describe, load_experiment, named, results_folder, save
from hf_osd.estimate import Method, Workload, adamw, adamw8bit, galore, lora, osd
from hf_osd.estimate.peak import parts
from whole_models import parse_name


QLORA_BITS = 4.127  # 4, and a scale for 64 weights, itself in 8 bits with a float32 for 256 (arXiv 2305.14314)
MOMENTS_8BIT = 2 + 2 * 4 / 256  # bytes for both of one element


def galore_8bit_layerwise(model: nn.Module, rank: int) -> Method:
    """galore-torch's 8-bit optimizer with a hook for each parameter: moments of two bytes."""
    method = galore(model, rank, "all-linear")
    size = next(model.parameters()).element_size()
    return replace(method, state=int(method.state / (2 * size) * MOMENTS_8BIT), layerwise=True)


def qlora_weights(model: nn.Module) -> int:
    """Bytes of a model with adapters whose linear layers, but for the head, are in 4 bits."""
    head = model.get_output_embeddings()
    quantised = {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    quantised = {p for p in quantised if not p.requires_grad}
    return int(sum(p.numel() * QLORA_BITS / 8 if p in quantised else p.nbytes for p in model.parameters()))


def peak(work: Workload, kind: str, options: dict[str, Any]) -> int:
    """Bytes at the peak of a step with checkpointing."""
    model = work.model()
    if kind == "qlora":
        adapters = work.model("lora", True)
        return parts(qlora_weights(adapters), work.run("lora", True, 1), lora(adapters)).peak
    if kind == "lora":
        method = lora(work.model("lora"))
    elif kind == "galore":
        method = galore_8bit_layerwise(model, **options)
    elif kind == "osd":
        name, given = parse_name(options["run"])
        layerwise = name.endswith("_layerwise")
        method = osd(model, name.removesuffix("_layerwise"), options["rank"], given, layerwise=layerwise)
    else:
        method = {"adamw": adamw, "adamw8bit": adamw8bit}[kind](model)
    return work.parts(method, True, 1).peak


def compute(experiment: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each method, with its peak in bytes for each model."""
    rows = [{"method": name, "peak": {}} for name, _, _ in experiment["methods"]]
    for name, (_, config) in experiment["models"].items():
        work = Workload(
            AutoConfig.for_model(**config), torch.bfloat16, experiment["sequence"], experiment["lora_rank"]
        )
        for row, (_, kind, options) in zip(rows, experiment["methods"], strict=True):
            row["peak"][name] = peak(work, kind, options)
            print(f"{row['method']}, {name}: {row['peak'][name] / 1e9:.1f} GB", flush=True)
    return rows


def largest(peaks: dict[str, int], memory: float) -> str:
    """The largest model that fits; they are in order of size."""
    return next((name for name in reversed(peaks) if peaks[name] <= memory), "-")


def table(result: dict[str, Any]) -> str:
    """What fits each card, and the peaks."""
    cards, models = result["cards_gb"], list(result["rows"][0]["peak"])
    free = result["reserve_gb"]
    lines = [
        f"Computed: {result['sequence']:,} tokens, batch 1, gradient checkpointing, bfloat16, {free} GB left free.",
        "",
        "| largest model on a card of | " + " | ".join(f"{card} GB" for card in cards) + " |",
        "| --- |" + " --- |" * len(cards),
    ]
    for row in result["rows"]:
        fitting = [largest(row["peak"], (card - free) * 1e9) for card in cards]
        lines.append(f"| {row['method']} | " + " | ".join(fitting) + " |")
    lines += ["", "| peak, GB | " + " | ".join(models) + " |", "| --- |" + " --- |" * len(models)]
    for row in result["rows"]:
        lines.append(f"| {row['method']} | " + " | ".join(f"{row['peak'][name] / 1e9:.1f}" for name in models) + " |")
    lines += ["", "; ".join(f"{name}: {what}" for name, (what, _) in result["models"].items()) + "."]
    return "\n".join(lines) + "\n"


def render(result: dict[str, Any], path: Path) -> None:
    """The table."""
    named(path, ".md").write_text(table(result), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Compute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="card_sizes")
    parser.add_argument("--models", nargs="+", help="of the experiment (default: all)")
    parser.add_argument("--methods", nargs="+", help="of the experiment (default: all)")
    parser.add_argument("--output_dir", type=Path, help="default: results/<device>/")
    settings = parser.parse_args(argv)
    experiment = load_experiment(settings.experiment)
    if settings.models:
        experiment["models"] = {name: experiment["models"][name] for name in settings.models}
    if settings.methods:
        experiment["methods"] = [own for own in experiment["methods"] if own[0] in settings.methods]
    result = {"environment": describe("cpu"), **experiment, "rows": compute(experiment)}
    save((settings.output_dir or results_folder("cpu")) / settings.experiment, result, render)
    print(table(result), end="")


if __name__ == "__main__":
    main()
