"""Time of one optimizer step on the weight shapes of LLaMA 60M, 350M and 1B, as ratios measured in one run.

Compares `osd_adamw` with (a) the three bare matrix products that a step cannot do without, (b) galore-torch with the
time of its SVD spread over 200 steps, (c) the same step with P's gradient from autograd, (d) torch's fused AdamW.
All step the same tensors, in turn, and the medians are compared. One transformer block is timed: a model's time is
that times its number of blocks.

Needs: the `examples` extra (galore-torch, matplotlib). Writes results/<device>/step_time.json, .md and .png.

    python examples/benchmarks/step_time.py --models 60m --rounds 5          # a look, half a minute
    python examples/benchmarks/step_time.py                                  # the committed figures
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from galore_torch import GaLoreAdamW
from torch import Tensor

from environment import describe, results_folder
from hf_osd import OSD


# hidden and intermediate size of the LLaMA family of GaLore and the paper
SIZES = {"60m": (512, 1376), "350m": (1024, 2736), "1b": (2048, 5461)}
SVD_INTERVAL = 200
EXTRA_RANKS = {"1b": [512]}
Step = Callable[[], object]


def block_shapes(model: str) -> list[tuple[int, int]]:
    """Shapes of the seven matrices of one block: q, k, v, o; gate, up; down."""
    hidden, intermediate = SIZES[model]
    return [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]


def bare_products(params: list[Tensor], rank: int) -> Step:
    """(a) down, correlate and up: every product with an (m, n) operand in a step."""
    work = []
    for W in params:
        s = min(W.shape)
        P = torch.linalg.qr(torch.randn(s, rank, device=W.device)).Q.to(W.dtype)
        work.append((W, P))

    def step() -> None:
        for W, P in work:
            G = W.grad
            if W.shape[0] <= W.shape[1]:
                R = P.mT @ G
                G @ R.mT
                W.addmm_(P, R, alpha=-1e-9)
            else:
                R = G @ P
                G.mT @ R
                W.addmm_(R, P.mT, alpha=-1e-9)

    return torch.no_grad()(step)


class AutogradStep:
    """(c) The same step written with autograd and torch's own optimizers, one of each per weight."""

    def __init__(self, params: list[Tensor], rank: int):
        """Start P at random orthonormal columns: where it starts has no part in the time."""
        self.work = []
        for W in params:
            m, n = W.shape
            P = torch.linalg.qr(torch.randn(min(m, n), rank, device=W.device)).Q.requires_grad_()
            D = torch.zeros((rank, n) if m <= n else (m, rank), device=W.device, requires_grad=True)
            self.work.append((W, P, torch.optim.AdamW([P], lr=5e-3), D, torch.optim.AdamW([D], lr=1e-3)))

    def __call__(self) -> None:
        """One step."""
        for W, P, optimizer_P, D, optimizer_D in self.work:
            left = W.shape[0] <= W.shape[1]
            with torch.no_grad():
                R = P.mT @ W.grad if left else W.grad @ P
                D.zero_()
                D.grad = R
            optimizer_D.step()
            with torch.no_grad():
                W.add_(P @ D if left else D @ P.mT)
            G = W.grad / W.grad.norm()
            residual = (P @ P.mT) @ G - G if left else G @ (P @ P.mT) - G
            orthogonality = P.mT @ P - torch.eye(P.shape[1], device=P.device)
            (residual.square().sum() + 0.1 * orthogonality.square().sum()).backward()
            optimizer_P.step()
            optimizer_P.zero_grad()


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: str, rank: int, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds per step of every contender for one block."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in block_shapes(model):
        W = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        W.grad = torch.randn(shape, generator=generator).to(device, dtype)
        params.append(W)
    osd = OSD([{"params": params, "rank": rank}], lr=1e-3)
    galore_group = {"params": params, "rank": rank, "update_proj_gap": SVD_INTERVAL, "scale": 0.25, "proj_type": "std"}
    galore = GaLoreAdamW([galore_group], lr=1e-3, no_deprecation_warning=True)
    contenders: dict[str, Step] = {
        "three products": bare_products(params, rank),
        "osd_adamw": osd.step,
        "galore-torch": galore.step,
        "autograd": AutogradStep(params, rank),
        "torch AdamW fused": torch.optim.AdamW(params, lr=1e-3, fused=True).step,
    }
    first = {name: timed(step, device) for name, step in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            times[name].append(timed(step, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    # galore-torch's first step is a step with an SVD of every weight
    plain, with_svd = medians.pop("galore-torch"), first["galore-torch"]
    medians["galore-torch without SVD"] = plain
    medians["galore-torch"] = plain + (with_svd - plain) / SVD_INTERVAL
    return {**medians, "osd_adamw first step": first["osd_adamw"], "galore-torch SVD step": with_svd}


def table(rows: list[dict]) -> str:
    """Markdown: the ratios to the three bare products."""
    names = ["osd_adamw", "galore-torch", "autograd", "torch AdamW fused"]
    lines = [f"| | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for row in rows:
        ratios = " | ".join(f"{row['ratio'][name]:.2f}" for name in names)
        lines.append(f"| LLaMA {row['model'].upper()}, rank {row['rank']} | {ratios} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: str) -> None:
    """Bars of the ratios to the three bare products."""
    names = ["osd_adamw", "galore-torch", "autograd", "torch AdamW fused"]
    figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for i, name in enumerate(names):
        places = [j + (i - 1.5) * 0.2 for j in range(len(rows))]
        values = [row["ratio"][name] for row in rows]
        bars = axes.bar(places, values, width=0.19, label=name)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(rows)), [f"LLaMA {row['model'].upper()}, rank {row['rank']}" for row in rows])
    axes.set_ylabel("time of a step / time of its three bare products")
    axes.set_yscale("log")
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10"])
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.03, 16)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("One optimizer step on one transformer block (lower is faster)")
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each contender (default: 30)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = partial(measure, rounds=arguments.rounds, device=device, dtype=getattr(torch, arguments.dtype))
    rows = []
    for model in arguments.models:
        for rank in [arguments.rank, *EXTRA_RANKS.get(model, [])]:
            seconds = run(model, rank)
            ratio = {name: value / seconds["three products"] for name, value in seconds.items()}
            rows.append(
                {
                    "model": model,
                    "rank": rank,
                    "milliseconds": {k: 1e3 * v for k, v in seconds.items()},
                    "ratio": ratio,
                }
            )
            print(
                f"LLaMA {model.upper()}, rank {rank}: three products {1e3 * seconds['three products']:.2f} ms; ratios:"
            )
            print(
                "   " + "; ".join(f"{name} {value:.2f}" for name, value in ratio.items() if name != "three products")
            )
    folder = results_folder()
    name = "step_time" if arguments.dtype == "float32" else f"step_time_{arguments.dtype}"
    result = {"environment": describe(), "dtype": arguments.dtype, "rounds": arguments.rounds, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(table(rows))
    draw(rows, str(folder / f"{name}.png"))
    print(f"Written: {folder / name}.json, .md and .png")


if __name__ == "__main__":
    main()
