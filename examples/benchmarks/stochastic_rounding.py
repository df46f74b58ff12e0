"""Tiny steps on bfloat16 weights: rounded to nearest they vanish, rounded at random they add up.

Two runs, each with float32 weights, bfloat16 weights, and bfloat16 weights with `stochastic_rounding`:

1. a matrix, thousands of SGD steps of 2^-12 of each weight: how far the weights have come;
2. a small LLaMA, pretrained in float32 on docstrings (bytes), then trained on with `osd_adamw` at a fine-tuning
   learning rate: the validation loss, always computed in float32, so that the weights alone make the difference.

Needs: the `examples` extra (matplotlib). Writes results/<device>/stochastic_rounding.json and .png.

    python examples/benchmarks/stochastic_rounding.py --steps 50 --pretraining_steps 50     # a look, half a minute
    python examples/benchmarks/stochastic_rounding.py                                       # the committed figures
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' own modules

from docstrings import docstrings_file
from environment import describe, named, results_folder
from hf_osd import OSD, create_osd_optimizer


# name -> dtype of the weights, stochastic rounding, color and width of the line
METHODS = {
    "float32": (torch.float32, False, "#9a9a9a", 4.0),
    "bfloat16": (torch.bfloat16, False, "#c4442f", 1.6),
    "bfloat16, stochastic rounding": (torch.bfloat16, True, "#2f5fa8", 1.6),
}
STEP = 2.0**-12  # of a weight; bfloat16 to nearest loses steps below 2^-9 of it, and some of twice that
CONTEXT, BATCH, VALIDATION_BATCHES = 64, 8, 24


def travel(dtype: torch.dtype, stochastic: bool, steps: int) -> list[tuple[int, float]]:
    """(step, <W - W0, W0> / ||W0||²) of a matrix whose gradient is -W0 at every step."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(128, 8, generator=generator), torch.randn(8, 192, generator=generator)
    W0 = (A @ B).to(torch.bfloat16)  # of rank 8, as the subspace
    W = nn.Parameter(W0.to(dtype))
    optimizer = OSD([W], lr=STEP, rank=8, weight_rule="sgd", momentum=0.0, stochastic_rounding=stochastic)
    W.grad = -W.detach()
    start, points = W0.double(), [(0, 0.0)]
    for t in range(1, steps + 1):
        optimizer.step()
        if t % (steps // 40) == 0:
            change = W.detach().double() - start
            points.append((t, float((change * start).sum() / start.square().sum())))
    return points


def read_bytes() -> tuple[Tensor, Tensor]:
    """Bytes of docstrings for training and validation."""
    with docstrings_file().open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    train, validation = documents[::10], documents[5::200]
    return tuple(
        torch.frombuffer(bytearray("\n".join(part), "utf-8"), dtype=torch.uint8) for part in (train, validation)
    )


def batch(data: Tensor, seed: int) -> Tensor:
    """Random windows of the data, (BATCH, CONTEXT)."""
    starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + CONTEXT] for start in starts]).long()


@torch.no_grad()
def validation_loss(model: nn.Module, data: Tensor) -> float:
    """Nats per byte on fixed windows, of a float32 copy of the model."""
    copied = copy.deepcopy(model).float().eval()
    windows = [batch(data, seed) for seed in range(VALIDATION_BATCHES)]
    return sum(float(copied(input_ids=ids, labels=ids).loss) for ids in windows) / len(windows)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], steps: int, first: int):
    """Yields (step, validation loss) at the start and at every twentieth part of the steps."""
    yield 0, validation_loss(model, data[1])
    for t in range(1, steps + 1):
        ids = batch(data[0], first + t)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if t % max(steps // 20, 1) == 0:
            yield t, validation_loss(model, data[1])


def pretrained(data: tuple[Tensor, Tensor], steps: int) -> nn.Module:
    """A LLaMA of 0.3M parameters after ordinary training in float32, with weights that bfloat16 can hold."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = create_osd_optimizer(model, "osd_adamw", lr=5e-3, rank=24)
    points = list(train(model, optimizer, data, steps, first=0))
    print(f"pretrained: validation loss {points[0][1]:.3f} -> {points[-1][1]:.3f}", flush=True)
    return model.bfloat16()


def render(result: dict, path: Path) -> None:
    """Writes `<path>.png`, two pictures side by side: the long run of the matrix, and the loss of the model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), dpi=150, layout="constrained")
    for name, (_, _, color, width) in METHODS.items():
        left.plot(*zip(*result["travel"][name], strict=True), color=color, linewidth=width, label=name)
        right.plot(*zip(*result["loss"][name], strict=True), color=color, linewidth=width, label=name)
    left.set_title("A matrix: SGD steps of 2$^{-12}$ of each weight", loc="left", fontsize=11)
    left.set_ylabel("distance travelled / size of the weights")
    right.set_title(f"A small LLaMA: osd_adamw at learning rate {result['lr']:g}", loc="left", fontsize=11)
    right.set_ylabel("validation loss (nats per byte)")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(named(path, ".png"))


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="steps of the LLaMA (default: 600)")
    parser.add_argument("--pretraining_steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate of the LLaMA (default: 2e-5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict = {"environment": describe(), **vars(arguments), "step": STEP, "travel": {}, "loss": {}}
    data = read_bytes()
    model = pretrained(data, arguments.pretraining_steps)
    for name, (dtype, stochastic, _, _) in METHODS.items():
        result["travel"][name] = travel(dtype, stochastic, steps=2000)
        tuned = copy.deepcopy(model).to(dtype)
        optimizer = create_osd_optimizer(tuned, lr=arguments.lr, rank=24, stochastic_rounding=stochastic)
        first = arguments.pretraining_steps
        result["loss"][name] = list(train(tuned, optimizer, data, arguments.steps, first))
        loss = result["loss"][name]
        print(
            f"{name}: travelled {result['travel'][name][-1][1]:.4f}, loss {loss[0][1]:.4f} -> {loss[-1][1]:.4f}",
            flush=True,
        )
    folder = results_folder()
    (folder / "stochastic_rounding.json").write_text(json.dumps(result, indent=2) + "\n")
    render(result, folder / "stochastic_rounding")
    print(f"Written: {folder / 'stochastic_rounding'}.json and .png")


if __name__ == "__main__":
    main()
