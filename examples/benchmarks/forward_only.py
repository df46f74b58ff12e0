"""What steps of SubZero and MeZO take beside inference: memory over an evaluation, time over two forward passes.

A LLaMA with random weights in float32. Memory: all that is allocated at the peak of the third step, weights included,
over that of a forward pass without gradients on the same batch; counted by torch.profiler on a CPU, by the allocator
on a GPU. Time: the best of several steps, over the best of as many pairs of such passes, which take turns. Writes
results/<device>/forward_only.json and .md.

Needs: nothing beyond the package. The first command takes a minute, the second one five on two cores.

    python examples/benchmarks/forward_only.py --memory_model llama_60m --batch 2 --rounds 3
    python examples/benchmarks/forward_only.py
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocations import counted
from environment import describe, named, pick_device, results_folder, save
from hf_osd import SubZero
from stopwatch import in_turn
from whole_models import load_config, random_model


METHODS: dict[str, dict[str, Any]] = {
    "SubZero": {},
    "SubZero, source=activations": {"source": "activations"},
    "MeZO": {"perturbation": "dense"},
}


def prepared(model_name: str, batch: int, sequence: int, device: str) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """A model in evaluation mode, and its loss of one batch."""
    config = load_config(model_name)
    model = random_model(config, torch.float32, device).eval()
    ids = torch.randint(config.vocab_size, (batch, sequence), device=device)
    return model, lambda: model(input_ids=ids, labels=ids).loss


def memory(model_name: str, method: str, device: str) -> dict[str, Any]:
    """Bytes at the peaks, weights included, of 2 x 128 tokens."""
    with counted(device) as (phase, seen):
        with phase("model"):
            model, loss = prepared(model_name, 2, 128, device)
        with phase("evaluation"), torch.no_grad():
            loss()
        optimizer = SubZero(model, **METHODS[method])
        for step in range(3):
            with phase(f"step {step}"):
                optimizer.step(loss)
    start = seen["model"].start
    evaluation, step = (seen[name].peak - start for name in ("evaluation", "step 2"))
    first = seen["step 0"].peak - start
    return {"evaluation_bytes": evaluation, "step_bytes": step, "first_step_bytes": first, "memory": step / evaluation}


def time(model_name: str, method: str, batch: int, sequence: int, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of a step and of two forward passes, the best of each."""
    model, loss = prepared(model_name, batch, sequence, device)
    optimizer = SubZero(model, **METHODS[method])
    optimizer.step(loss)

    @torch.no_grad()
    def passes() -> None:
        loss()
        loss()

    seconds = in_turn({"step": lambda: optimizer.step(loss), "passes": passes}, rounds, torch.device(device))
    best = {name: min(times) for name, times in seconds.items()}
    return {"step_seconds": best["step"], "passes_seconds": best["passes"], "time": best["step"] / best["passes"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row a method."""
    lines = [
        "| | peak of a step | of an evaluation | ratio | time of a step | of two forward passes | ratio |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        cells = [row["method"], *(f"{row[key] / 2**20:,.0f} MiB" for key in ("step_bytes", "evaluation_bytes"))]
        cells += [f"{row['memory']:.3f}", f"{row['step_seconds']:.2f} s", f"{row['passes_seconds']:.2f} s"]
        cells.append(f"{row['time']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`."""
    named(path, ".md").write_text(table(result["rows"]), encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--memory_model", default="llama_350m", help="file in llama_configs/, or a path")
    parser.add_argument("--time_model", default="llama_60m", help="likewise")
    parser.add_argument("--batch", type=int, default=8, help="sequences that are timed")
    parser.add_argument("--seq", type=int, default=256, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--output_dir", type=Path, help="default: results/<device>/")
    given = parser.parse_args()
    device = pick_device(given.device)
    rows = []
    for method in given.methods:
        row = {"method": method, **memory(given.memory_model, method, device)}
        row |= time(given.time_model, method, given.batch, given.seq, given.rounds, device)
        rows.append(row)
        print(row, flush=True)
    keys = ("memory_model", "time_model", "batch", "seq", "rounds")
    result = {"environment": describe(), **{key: getattr(given, key) for key in keys}, "rows": rows}
    save((given.output_dir or results_folder()) / "forward_only", result, render)
    print(table(rows), end="")


if __name__ == "__main__":
    main()
