"""Which V helps SubZero: a random one, the P of another run (`init`), one that follows the inputs; or MeZO, without.

A LLaMA of bytes, hardly pretrained with AdamW on Python source, is fine-tuned with forward passes alone on docstrings:
every method with as many steps, at several learning rates with the first seed and at its best one with the others.
Told are the loss on docstrings held out, the mean over seeds, and how much V keeps of the gradients of linear layers
at the end, ||G V Vᵀ||² / ||G||². Writes results/<device>/forward_only_bases.json and .md.

Needs: nothing beyond the package. The first command takes a minute, the second one about three of one core.

    python examples/benchmarks/forward_only_bases.py --pretraining_steps 10 --steps 20 --seeds 1 --rates 1e-3
    python examples/benchmarks/forward_only_bases.py
"""

import argparse
import copy
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from environment import describe, named, results_folder, save
from hf_osd import ProjectionState, SubZero, create_osd_optimizer
from python_text import texts


sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' own modules
from docstrings import docstrings_of_source  # noqa: E402


LENGTH = 64  # bytes of a sequence
METHODS: dict[str, dict[str, Any]] = {
    "MeZO": {"perturbation": "dense"},
    "random V": {},
    "a saved P as V": {"init": True},
    "V follows the inputs": {"source": "activations"},
}


class Bytes:
    """A text as sequences of bytes, of which the last tenth is held out."""

    def __init__(self, parts: list[str]):
        data = torch.frombuffer(bytearray("\n\n".join(parts).encode()), dtype=torch.uint8)
        self.train, self.held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    def batch(self, generator: torch.Generator, size: int, held_out: bool = False) -> Tensor:
        """Sequences from anywhere, (size, LENGTH)."""
        data = self.held_out if held_out else self.train
        starts = torch.randint(len(data) - LENGTH, (size, 1), generator=generator)
        return data[starts + torch.arange(LENGTH)].long()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the next byte."""
    return model(input_ids=ids, labels=ids).loss


def pretrained(text: Bytes, steps: int, width: int) -> nn.Module:
    """A small LLaMA after so many steps of AdamW."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss_of(model, text.batch(generator, 32)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def saved_projection(model: nn.Module, text: Bytes, rank: int) -> ProjectionState:
    """P of the inputs of the pretraining: power iteration on 30 batches, with weights that stay."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    optimizer = create_osd_optimizer(model, lr=0.0, rank=rank, source="activations", subspace="power")
    for _ in range(30):
        loss_of(model, text.batch(generator, 32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ProjectionState.from_optimizer(optimizer)


def evaluate(model: nn.Module, text: Bytes) -> float:
    """Loss on 256 sequences held out, always the same."""
    with torch.no_grad():
        return loss_of(model, text.batch(torch.Generator().manual_seed(9), 256, held_out=True)).item()


def kept(model: nn.Module, optimizer: SubZero, ids: Tensor) -> float | None:
    """||G V Vᵀ||² / ||G||² over all linear layers, G of one batch."""
    weights = {name: w for name, w in optimizer.weights.weights.items() if hasattr(w, "V") and "layers" in name}
    if not weights:
        return None
    grads = torch.autograd.grad(loss_of(model, ids), [w.W for w in weights.values()])
    inside = sum((G @ w.V).square().sum() for G, w in zip(grads, weights.values(), strict=True))
    return (inside / sum(G.square().sum() for G in grads)).item()


def finetune(
    start: nn.Module, text: Bytes, options: dict[str, Any], lr: float, seed: int, steps: int, batch: int
) -> dict[str, Any]:
    """One run; it is given up where its loss is nearly that of a guess."""
    model, generator = copy.deepcopy(start), torch.Generator().manual_seed(100 + seed)
    optimizer = SubZero(model, lr=lr, seed=seed, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        ids = text.batch(generator, batch)
        loss = optimizer.step(lambda ids=ids: loss_of(model, ids))
        if step % 50 == 49 and not loss < 5:  # a uniform guess has 5.5
            return {"lr": lr, "seed": seed, "loss": math.inf, "kept": None}
    return {
        "lr": lr,
        "seed": seed,
        "loss": evaluate(model, text),
        "kept": kept(model, optimizer, text.batch(generator, 64)),
    }


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """All runs."""
    sources = texts(given.characters)
    source = Bytes(sources)
    docs = Bytes([text for code in sources for text in _docstrings(code)])
    start = pretrained(source, given.pretraining_steps, given.width)
    state = saved_projection(start, source, given.rank)
    result: dict[str, Any] = {"before": evaluate(start, docs), "rows": []}
    print(f"before: {result['before']:.3f}", flush=True)
    for method in given.methods:
        own = {key: state if key == "init" else value for key, value in METHODS[method].items()}
        own |= {} if "perturbation" in own else {"rank": given.rank, "update_interval": given.update_interval}
        runs = [finetune(start, docs, own, lr, 1, given.steps, given.batch) for lr in given.rates]
        best = min(runs, key=lambda run: run["loss"])["lr"]
        seeds = range(2, given.seeds + 1)
        runs += [finetune(start, docs, own, best, seed, given.steps, given.batch) for seed in seeds]
        result["rows"].append({"method": method, "lr": best, "runs": runs})
        print(result["rows"][-1], flush=True)
    return result


def _docstrings(code: str) -> list[str]:
    try:
        return list(docstrings_of_source(code))
    except SyntaxError:  # of templates
        return []


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row a method."""
    lines = ["| | loss | learning rate | V keeps of G |", "| --- " * 4 + "|"]
    for row in rows:
        runs = [run for run in row["runs"] if run["lr"] == row["lr"]]
        losses, shares = [run["loss"] for run in runs], [run["kept"] for run in runs if run["kept"] is not None]
        spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
        share = f"{100 * mean(shares):.0f}%" if shares else "all"
        lines.append(f"| {row['method']} | {mean(losses):.3f}{spread} | {row['lr']:g} | {share} |")
    return "\n".join(lines) + "\n"


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`."""
    named(path, ".md").write_text(table(result["rows"]), encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=2_000_000, help="of source code that are read")
    parser.add_argument("--width", type=int, default=64, help="of the model, of three layers")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--update_interval", type=int, default=100, help="steps between new U and V")
    parser.add_argument("--pretraining_steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=200, help="of two forward passes")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 64 bytes")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3], help="that are tried")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, help="default: results/<device>/")
    given = parser.parse_args()
    result = {"environment": describe(), **{k: v for k, v in vars(given).items() if k != "output_dir"}}
    result |= compare(given)
    save((given.output_dir or results_folder()) / "forward_only_bases", result, render)
    print(table(result["rows"]), end="")


if __name__ == "__main__":
    main()
