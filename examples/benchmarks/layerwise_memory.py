"""Memory of layerwise updates: live gradients counted on the CPU, and the peak of a 7B training under a cap on a GPU.

Without a GPU: one backward pass of LLaMA 60M in each mode, in which every parameter's gradient is watched from the
moment it is complete to the moment its memory is freed. With one: a stock Trainer (random weights, bfloat16, gradient
checkpointing, sequences of 1024, batch 1) with each optimizer in a process of its own, which may use `--cap_gb` of the
GPU; the peak of what torch allocated, or that it did not fit. Where bitsandbytes is missing, ours run in float32, by
that name. Reads experiments/<name>.json, for a GPU only; writes results/<device>/<name>.json and .md.

Needs: the `examples` extra; for the runs beside ours galore-torch and apollo-torch.

    python examples/benchmarks/layerwise_memory.py                                # CPU: LLaMA 60M, a minute
    python examples/benchmarks/layerwise_memory.py --device cuda --cap_gb 24      # GPU: LLaMA 7B
    python examples/benchmarks/layerwise_memory.py layerwise_memory_gpu --device cuda     # a few, in a minute
    python examples/benchmarks/layerwise_memory.py --device cuda --runs osd_adamw8bit_layerwise:rank=1024
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainingArguments

import hf_osd
from environment import describe, load_experiment, named, pick_device, results_folder, save, without_8bit
from hf_osd.optim import held_gradient_bytes, predicted_state_bytes
from whole_models import load_config, random_model


ON_CPU = {"model": "llama_60m", "sequence": 64, "steps": 5}


class LiveGradients:
    """Counts the bytes of parameters' gradients that are alive, whenever another one is complete."""

    def __init__(self) -> None:
        self.peak = 0
        self.watched: list[tuple[StorageWeakRef, int]] = []
        self.handles: dict[torch.nn.Parameter, RemovableHandle] = {}

    def watch(self, model: torch.nn.Module) -> None:
        """Watch the parameters of a model that are not watched yet.

        Before a layerwise optimizer does: hooks run in the order in which they were put on.
        """
        for p in model.parameters():
            if p.requires_grad and p not in self.handles:
                self.handles[p] = p.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, p: torch.Tensor) -> None:
        if p.grad is None:  # the weight of a layer that makes R instead
            return
        storage = p.grad.untyped_storage()
        known = {reference.cdata for reference, _ in self.watched}
        reference = StorageWeakRef(storage)
        if reference.cdata not in known:  # with accumulation the same one comes again
            self.watched.append((reference, storage.nbytes()))
        self.peak = max(self.peak, self.alive())

    def alive(self) -> int:
        """Bytes that are alive now."""
        self.watched = [(reference, size) for reference, size in self.watched if not reference.expired()]
        return sum(size for _, size in self.watched)


def gradient_memory(model_name: str, rank: int, sequence: int) -> list[dict[str, Any]]:
    """One step of every mode on the CPU: peak of live gradients, and of what is held in the subspace."""
    rows = []
    for mode, micro in (("ordinary", 1), ("layerwise", 1), ("ordinary", 2), ("layerwise", 2)):
        model = random_model(load_config(model_name), torch.float32, "cpu")
        live = LiveGradients()
        live.watch(model)
        optim, options = "osd_adamw", {}
        if mode == "layerwise":
            optim, options = "osd_adamw_layerwise", {"gradient_accumulation": micro > 1}
        optimizer = hf_osd.create_osd_optimizer(model, optim, rank=rank, init="orthonormal", **options)
        held = 0
        for _ in range(2):  # P moves from the second step on
            for _ in range(micro):
                ids = torch.randint(model.config.vocab_size, (1, sequence))
                model(input_ids=ids, labels=ids).loss.backward()
                held = max(held, held_gradient_bytes(optimizer))
            optimizer.step()
            optimizer.zero_grad()
        sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
        full_size = sum(
            p.numel() * p.element_size() for g in optimizer.param_groups if g["rank"] is None for p in g["params"]
        )
        rows.append(
            {
                "mode": mode,
                "micro_batches": micro,
                "rank": rank,
                "peak_live_gradient_bytes": live.peak,
                "held_bytes": held,
                "all_gradients_bytes": sum(sizes.values()),
                "full_size_gradients_bytes": full_size,
                "largest_gradient_bytes": max(sizes.values()),
            }
        )
        optimizer.remove()
    return rows


class RandomTokens(Dataset):
    """Random sequences: memory does not depend on what they say."""

    def __init__(self, vocab_size: int, length: int):
        """Of `length` tokens each."""
        self.vocab_size, self.length = vocab_size, length

    def __len__(self) -> int:
        """Enough for any run here."""
        return 1024

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The same sequence for the same index."""
        ids = torch.randint(self.vocab_size, (self.length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(run: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps with one optimizer in this process, under the cap."""
    optim, _, text = run.partition(":")
    cuda = arguments.device == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        if total < 0.9 * arguments.cap_gb * 1e9:
            return {"run": run, "fits": None, "left_out": f"the card has {total / 1e9:.1f} GB"}
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.cap_gb * 1e9 / total))
    result: dict[str, Any] = {"run": run, "fits": True}
    try:
        model = random_model(load_config(arguments.model), torch.bfloat16, arguments.device)
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                optim=optim,
                optim_args=text or None,
                optim_target_modules=None if optim == "adamw_bnb_8bit" else ["self_attn", "mlp"],
                learning_rate=1e-4,
                max_steps=arguments.steps,
                per_device_train_batch_size=1,
                gradient_checkpointing=True,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                use_cpu=not cuda,
            )
            if optim.startswith("osd_"):
                args.optim_target_modules = None  # all-linear: the same matrices
            trainer = Trainer(model, args, train_dataset=RandomTokens(model.config.vocab_size, arguments.sequence))
            trainer.train()
        result["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        own = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        if isinstance(own, hf_osd.OSD):
            result["predicted_state_bytes"] = predicted_state_bytes(own)
    except torch.cuda.OutOfMemoryError:
        result["fits"] = False
    if cuda:
        result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return result


def train_all(cases: list[tuple[str, float]], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run, under its cap, in a process of its own: nothing of one is left in the memory of the next."""
    for asked, cap_gb in cases:
        run = without_8bit(asked)
        command = [sys.executable, __file__, "--one_run", run, "--device", arguments.device]
        command += ["--model", arguments.model, "--steps", str(arguments.steps), "--cap_gb", str(cap_gb)]
        command += ["--sequence", str(arguments.sequence)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        result = json.loads(line[7:]) if line else {"run": run, "fits": None, "error": done.stderr[-2000:]}
        print(run, "failed" if "error" in result else "fits" if result["fits"] else "does not fit", flush=True)
        yield (
            result
            | {"cap_gb": cap_gb if arguments.device == "cuda" else None}
            | ({} if run == asked else {"for": asked})
        )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    if "run" in rows[0]:
        lines = ["| optimizer | GPU memory that it may use | peak of what torch allocated |", "| --- | --- | --- |"]
        for row in rows:
            peak = f"{row['peak_allocated_bytes'] / 1e9:.1f} GB" if row.get("peak_allocated_bytes") else "-"
            note = "failed" if "error" in row else peak if row["fits"] else row.get("left_out", "does not fit")
            cap = f"{row['cap_gb']:g} GB" if row["cap_gb"] else "-"
            lines.append(f"| `{row['run']}` | {cap} | {note} |")
        return "\n".join(lines) + "\n"
    lines = ["| | micro-batches | live gradients, peak | held until the step |", "| --- | --- | --- | --- |"]
    for row in rows:
        live, held = (row[key] / 2**20 for key in ("peak_live_gradient_bytes", "held_bytes"))
        lines.append(f"| {row['mode']} | {row['micro_batches']} | {live:.1f} MiB | {held:.1f} MiB |")
    return "\n".join(lines) + "\n"


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`."""
    named(path, ".md").write_text(table(result["rows"]), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 0 where no run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="layerwise_memory", help="what a GPU trains: experiments/")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="file in llama_configs/, or a path (on the CPU: llama_60m)")
    parser.add_argument("--rank", type=int, default=128, help="rank of the count on the CPU (default: 128)")
    parser.add_argument(
        "--runs", nargs="+", help="optim:optim_args, trained in a Trainer (default on a GPU: the file's)"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sequence", type=int, help="tokens (on the CPU: 64)")
    parser.add_argument("--cap_gb", type=float, default=24, help="of --runs: GPU memory in 10^9 bytes (default: 24)")
    parser.add_argument("--output_dir", type=Path, help="default: results/<device>/")
    parser.add_argument("--one_run", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    experiment = load_experiment(arguments.experiment)
    cuda = pick_device(arguments.device) == "cuda"
    for key, on_cpu in ON_CPU.items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, experiment[key] if cuda else on_cpu)
    if arguments.one_run:
        print("RESULT " + json.dumps(train(arguments.one_run, arguments)))
        return 0
    cases = [(run, arguments.cap_gb) for run in arguments.runs or ()] or (experiment["cases"] if cuda else [])
    path = (arguments.output_dir or results_folder(arguments.device)) / arguments.experiment
    rows: list[dict[str, Any]] = []
    settings = {"model": arguments.model, "sequence": arguments.sequence}
    result = {"environment": describe(arguments.device), **settings, "rows": rows}
    if not cases:
        rows += gradient_memory(arguments.model, arguments.rank, arguments.sequence)
        save(path, result, render)
    for row in train_all(cases, arguments):
        rows.append(row)
        save(path, result, render)  # after every run: what is cut off keeps those before
    print(table(rows), end="")
    failed = {row["run"]: row["error"].strip().splitlines()[-1] for row in rows if "error" in row}
    for run, reason in failed.items():
        print(f"{run} failed: {reason}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
