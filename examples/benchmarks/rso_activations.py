"""Memory of a training step with Randomized Subspace Optimization, against full training, GaLore and OSD.

Three counts: the activations that autograd keeps from the forward pass for the backward pass (unique storages,
parameters excluded) by sequence length, on tensors without contents, so that any model fits anywhere; the bytes of
gradients that a data-parallel process exchanges; and, with --real_run, the growth of the resident memory of a process
that trains two steps. AdamW, GaLore and OSD need the gradient of W, for which autograd keeps the inputs of every
layer: their activations are the same. Writes results/<device>/rso_activations.json, .md and .png.

Needs: `pip install "hf_osd[examples]"`. The first command takes a minute; the second trains LLaMA 60M and needs 4 GB.

    python examples/benchmarks/rso_activations.py
    python examples/benchmarks/rso_activations.py --real_run
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from environment import describe, named, results_folder
from hf_osd.rso import create_rso_model, gradient_bytes, subspace_bytes
from layerwise_memory import RandomTokens, make_model


sys.path.insert(0, str(Path(__file__).parents[1]))
from run_report import optimizer_state_bytes, peak_memory_bytes


CONFIGS = Path(__file__).parents[1] / "llama_configs"
CASES = {"llama_60m": 128, "llama_1b": 512}  # a quarter of the hidden size
SEQUENCES = [256, 512, 1024, 2048, 4096]
FULL, RSO = "AdamW, GaLore, OSD", "RSO"
REAL_RUNS = {
    "adamw_torch": None,
    "galore_adamw": "rank=128,update_proj_gap=200,scale=0.25",
    "osd_adamw": "rank=128",
    "rso_adamw": "rank=128",
}
COLORS = {FULL: "#5a5a5a", RSO: "#2f5fa8"}


def saved_bytes(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, int]:
    """Bytes that autograd keeps from a forward pass: in the blocks, and outside (embedding, head, loss)."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again
    found, place = Counter(blocks=0, outside=0), ["outside"]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in seen:
            seen[storage._cdata] = storage
            found[place[0]] += storage.nbytes()
        return tensor

    def entered(*_: Any) -> None:
        place[0] = "blocks"

    def left(*_: Any) -> None:
        place[0] = "outside"

    handles = [layer.register_forward_pre_hook(entered) for layer in model.model.layers]
    handles += [layer.register_forward_hook(left) for layer in model.model.layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    return dict(found)


def without_contents(model: torch.nn.Module) -> None:
    """Replace tensors on the meta device by such that behave as if on the CPU; within a `FakeTensorMode`."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def activations(name: str, rank: int, sequences: list[int]) -> list[dict[str, Any]]:
    """Kept bytes of one sequence in bfloat16, by length and method; nothing is computed."""
    settings = json.loads((CONFIGS / f"{name}.json").read_text()) | {"max_position_embeddings": max(sequences)}
    rows = []
    for method in (FULL, RSO):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
        if method == RSO:
            create_rso_model(model, rank)
        # Whether one row holds several packed sequences cannot be read off tensors without contents: it does not.
        with FakeTensorMode(), patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None):
            without_contents(model)
            for sequence in sequences:
                ids = torch.zeros(1, sequence, dtype=torch.long)
                row = {"model": name, "method": method, "rank": rank if method == RSO else None, "sequence": sequence}
                rows.append(row | saved_bytes(model, ids) | {"gradient_bytes": gradient_bytes(model)})
    return rows


def real_run(optim: str, model_name: str, sequence: int) -> dict[str, Any]:
    """Train two steps in this process and tell how its resident memory has grown."""
    import galore_torch  # noqa: F401 - what libraries take is no part of a run, and Trainer imports them later
    import peft  # noqa: F401

    model = make_model(model_name, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            optim=optim,
            optim_args=REAL_RUNS[optim],
            optim_target_modules=".*(self_attn|mlp).*" if optim == "galore_adamw" else None,
            max_steps=2,  # moments are there from the first on
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, args, train_dataset=RandomTokens(model.config.vocab_size, sequence))
        before = peak_memory_bytes()
        trainer.train()
    growth = peak_memory_bytes() - before
    held = optimizer_state_bytes(trainer.optimizer) + subspace_bytes(trainer.model)
    return {"optim": optim, "growth_bytes": growth, "state_bytes": held}


def real_runs(model_name: str, sequence: int) -> list[dict[str, Any]]:
    """Every run in a process of its own."""
    rows = []
    # glibc returns freed memory at once above this size; else what is resident is what was once in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    for optim in REAL_RUNS:
        command = [sys.executable, __file__, "--one_run", optim, "--model", model_name, "--sequence", str(sequence)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        rows.append(json.loads(line.removeprefix("RESULT ")))
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    head = ["| kept for the backward pass, one sequence in bfloat16 |", *(f" {n} |" for n in SEQUENCES)]
    lines = ["".join(head), "| --- " + "| ---: " * len(SEQUENCES) + "|"]
    for name, rank in CASES.items():
        rows = [row for row in result["activations"] if row["model"] == name]
        for method in (FULL, RSO):
            own = [row for row in rows if row["method"] == method]
            label = f"{title(name)}: {method}" + (f", rank {rank}" if method == RSO else "")
            for part, of in (("", ("blocks", "outside")), (", blocks alone", ("blocks",))):
                cells = (f"{sum(row[key] for key in of) / 2**20:,.0f} MiB" for row in own)
                lines.append(f"| {label}{part} | " + " | ".join(cells) + " |")
    lines += ["", "| gradients to all-reduce, bfloat16 | full | RSO |", "| --- | ---: | ---: |"]
    for name in CASES:
        found = {row["method"]: row["gradient_bytes"] for row in result["activations"] if row["model"] == name}
        lines.append(f"| {title(name)} | {found[FULL] / 1e6:,.0f} MB | {found[RSO] / 1e6:,.0f} MB |")
    if runs := result.get("real_runs"):
        where = f"{title(runs['model'])}, {runs['sequence']} tokens, float32, rank 128"
        lines += ["", f"| a real run: {where} | growth of the process | moments, P and B |"]
        lines += ["| --- | ---: | ---: |"]
        for row in runs["rows"]:
            growth, held = row["growth_bytes"] / 2**20, row["state_bytes"] / 2**20
            lines.append(f"| `{row['optim']}` | {growth:,.0f} MiB | {held:,.0f} MiB |")
    return "\n".join(lines) + "\n"


def title(name: str) -> str:
    """`LLaMA 60M`."""
    return name.replace("llama_", "LLaMA ")[:-1] + name[-1].upper()


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Kept bytes against the sequence length, one panel for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), dpi=150, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(CASES)), CASES, strict=True):
        for method in (FULL, RSO):
            own = [row for row in rows if row["model"] == name and row["method"] == method]
            lengths = [row["sequence"] for row in own]
            total = [(row["blocks"] + row["outside"]) / 2**30 for row in own]
            blocks = [row["blocks"] / 2**30 for row in own]
            label = method + (f", rank {CASES[name]}" if method == RSO else "")
            axes.plot(lengths, total, "o-", color=COLORS[method], markersize=4, label=label)
            axes.plot(lengths, blocks, "o--", color=COLORS[method], markersize=3, label=f"{label}: blocks alone")
        axes.set_title(title(name), loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("tokens in the sequence")
        axes.set_ylabel("kept for the backward pass (GiB)")
        axes.set_ylim(bottom=0)
        axes.set_xticks(SEQUENCES[2:])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md` and `<path>.png`."""
    named(path, ".md").write_text(table(result))
    picture(result["activations"], named(path, ".png"))


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real_run", action="store_true", help="train too; else the committed runs are kept")
    parser.add_argument("--model", default="llama_60m", help="of the real run (default: llama_60m)")
    parser.add_argument("--sequence", type=int, default=512, help="tokens, of the real run (default: 512)")
    parser.add_argument("--one_run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_run:
        print("RESULT " + json.dumps(real_run(arguments.one_run, arguments.model, arguments.sequence)))
        return
    folder = results_folder()
    file = folder / "rso_activations.json"
    kept = json.loads(file.read_text()).get("real_runs") if file.is_file() else None
    if arguments.real_run:
        rows = real_runs(arguments.model, arguments.sequence)
        kept = {"model": arguments.model, "sequence": arguments.sequence, "environment": describe(), "rows": rows}
    counted = [row for name, rank in CASES.items() for row in activations(name, rank, SEQUENCES)]
    result = {"environment": describe(), "activations": counted, "real_runs": kept}
    file.write_text(json.dumps(result, indent=2) + "\n")
    render(result, folder / "rso_activations")
    print(table(result), end="")


if __name__ == "__main__":
    main()
