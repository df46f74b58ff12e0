"""Figure 2 of the paper (arXiv 2408.12857): the time of an SVD of a gradient, and of one step of online PCA.

On the weight shapes of LLaMA 60M to 7B, for each rank:

* `torch.linalg.svd`, exact, in float32 (GaLore's way; it knows no rank and no bfloat16);
* `torch.svd_lowrank` with torch's defaults, in float32;
* `randomized_svd`, this package's start of P, in float32;
* `autograd`, P's step as the paper's code takes it: autograd through P Pᵀ and AdamW, all in the gradient's precision;
* `closed form`, this package's: ||G||, R = down(G, P), A = correlate(G, R), the gradient in closed form, AdamW, P in
  float32; and `closed form, given R`, what P's step adds to a training step, which has ||G|| and R anyway.

Calls take turns, the medians count. A method is not tried where a smaller matrix says that one call would take longer
than `--limit` seconds: those places stay empty, nothing is extrapolated.

Reads experiments/<name>.json; writes results/<device>/<name>.json, .md and .png.

    python examples/benchmarks/projection_time.py --shapes 256x688 --ranks 32 --rounds 3     # a look, seconds
    python examples/benchmarks/projection_time.py                                            # six minutes, two cores
    python examples/benchmarks/projection_time.py projection_time_gpu --device cuda
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from contenders import autograd_pca_step
from environment import describe, load_experiment, named, pick_device, results_folder, save
from hf_osd.optim.step.gradients import check_gradients
from hf_osd.subspace import Left, Right, choose_side, randomized_svd
from hf_osd.subspace.precision import reduced_precision
from hf_osd.update_rules import RuleStep, build_rule
from shapes import sizes
from stopwatch import in_turn, timed


SVDS = ("torch.linalg.svd", "torch.svd_lowrank", "randomized_svd")
STEPS = ("autograd", "closed form", "closed form, given R")
LAMBDA, LR = 0.1, 5e-3
BUDGET = 2.0  # seconds


def model_shapes(models: list[str]) -> list[tuple[int, int]]:
    """The two shapes of each model's matrices; a gate's or up-projection's is the transpose of the second."""
    return [shape for h, i, _ in map(sizes, models) for shape in ((h, h), (h, i))]


def contenders(m: int, n: int, rank: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Every method for one gradient (m, n)."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(m, n, generator=generator).to(device, dtype)
    side = choose_side(m, n)
    P_0 = torch.linalg.qr(torch.randn(min(m, n), rank, generator=generator)).Q.to(device)
    # the paper's code keeps P in the precision of the gradient
    P_autograd = P_0.to(dtype).requires_grad_()
    adamw = torch.optim.AdamW([P_autograd], lr=LR)
    step = ClosedForm(P_0.clone(), side)
    check = check_gradients([G])[0]
    R = step.op.down(G, step.P.to(dtype))
    return {
        "torch.linalg.svd": lambda: torch.linalg.svd(G.float(), full_matrices=False),
        "torch.svd_lowrank": lambda: torch.svd_lowrank(G.float(), rank),
        "randomized_svd": lambda: randomized_svd((G if side == "left" else G.mT).float(), rank, seed=0),
        "autograd": lambda: autograd_pca_step(P_autograd, G, adamw),
        "closed form": lambda: step(G),
        "closed form, given R": lambda: step.move(G, R, check),
    }


class ClosedForm:
    """P's step as the optimizer of this package takes it, by the same functions."""

    def __init__(self, P: Tensor, side: str):
        self.P, self.op, self.rule = P, Left if side == "left" else Right, build_rule("adamw")
        self.moments = {moment.name: torch.zeros_like(P) for moment in self.rule.moments(tuple(P.shape))}
        self.step = torch.zeros((), device=P.device)

    def __call__(self, G: Tensor) -> None:
        """From the gradient alone."""
        check = check_gradients([G])[0]
        self.move(G, self.op.down(G, self.P.to(G.dtype)), check)

    def move(self, G: Tensor, R: Tensor, check: Any) -> None:
        """From what a training step has anyway: R = down(G, P) and ||G||."""
        P = self.P
        with reduced_precision(G):
            A = self.op.correlate(G, R).to(P.dtype)
        gP = self.op.pca_gradient(P, A, check.inv_norm2, LAMBDA)
        self.step.add_(check.keep)
        P.add_(self.rule.direction(gP, RuleStep(self.moments, self.step, check)), alpha=-LR)


def measure(
    shapes: list[tuple[int, int]],
    ranks: list[int],
    rounds: int,
    limit: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:
    """One row for each shape and rank below its sides, small shapes first.

    Args:
        shapes (`list[tuple[int, int]]`): Of the gradients.
        ranks (`list[int]`): Of the subspaces.
        rounds (`int`): Calls of each method; one that has taken `BUDGET` seconds in all is not called again.
        limit (`float`): Seconds. No call that is expected to take longer is made.
        device (`torch.device`): Where.
        dtype (`torch.dtype`): Of the gradient.
    """
    cost: dict[str, float] = {}  # seconds of the last call by its work: m n min(m, n), or m n r where r decides
    for m, n in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        exact: list[float] | None = None  # an exact SVD knows no rank: it is measured once for a shape
        for rank in sorted(r for r in ranks if r < min(m, n)):
            calls = contenders(m, n, rank, device, dtype)
            if exact is not None:
                del calls["torch.linalg.svd"]
            work = {name: m * n * (min(m, n) if name in ("torch.linalg.svd", "autograd") else rank) for name in calls}
            tried = {name: call for name, call in calls.items() if work[name] * cost.get(name, 0.0) <= limit}
            for name, call in tried.items():
                if work[name] * cost.get(name, 0.0) < BUDGET:  # what a library sets up at first is not counted
                    cost[name] = timed(call, device) / work[name]
            times = in_turn(tried, rounds, device, budget=BUDGET)
            cost |= {name: min(taken) / work[name] for name, taken in times.items()}
            if exact is None:
                exact = times.get("torch.linalg.svd", [])
            times["torch.linalg.svd"] = exact
            seconds = {name: statistics.median(times[name]) if times.get(name) else None for name in (*SVDS, *STEPS)}
            kind = str(dtype).removeprefix("torch.")
            line = ", ".join(f"{name} {1e3 * t:.1f} ms" if t else f"{name} -" for name, t in seconds.items())
            print(f"{m} x {n}, rank {rank}, {kind}: {line}", flush=True)
            yield {"shape": [m, n], "rank": rank, "dtype": kind, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds, and how many closed-form steps an SVD takes."""
    heads = ("gradient", "rank", *SVDS, *STEPS, "SVD / closed form", "autograd / closed form")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        m, n = row["shape"]
        seconds = row["seconds"]
        cells = [f"{m} x {n}, {row['dtype']}", str(row["rank"])]
        cells += ["-" if seconds[name] is None else f"{1e3 * seconds[name]:.2f}" for name in (*SVDS, *STEPS)]
        for name in ("torch.linalg.svd", "autograd"):
            both = seconds[name] and seconds["closed form"]
            cells.append(f"{seconds[name] / seconds['closed form']:.1f}" if both else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time against shape at each rank; exact SVDs are the same in all panels."""
    kinds = sorted({(row["dtype"], row["rank"]) for row in rows}, key=lambda kind: (kind[0] != "float32", kind))
    columns = max(1, len({rank for _, rank in kinds}))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.2 + 2.9 * columns, 1.1 + 2.9 * lines), dpi=130, layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axes, (dtype, rank) in zip(panels, kinds, strict=False):
        own = [row for row in rows if (row["dtype"], row["rank"]) == (dtype, rank)]
        for name in (*SVDS, *STEPS):
            values = [1e3 * row["seconds"][name] if row["seconds"][name] else float("nan") for row in own]
            style = "o-" if name in STEPS else "s--"
            axes.plot(range(len(own)), values, style, markersize=4, linewidth=1.2, label=name)
        axes.set_yscale("log")
        axes.set_xticks(
            range(len(own)), [f"{m} x {n}" for m, n in (row["shape"] for row in own)], rotation=45, ha="right"
        )
        axes.tick_params(labelsize=8)
        axes.set_title(f"rank {rank}, {dtype} gradient", loc="left", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.supylabel("milliseconds", fontsize=9)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path)


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md` and `<path>.png`."""
    named(path, ".md").write_text(table(result["rows"]), encoding="utf-8")
    draw(result["rows"], result["title"], named(path, ".png"))


def parse_shape(text: str) -> tuple[int, int]:
    """`512x1376`."""
    m, n = text.split("x")
    return int(m), int(n)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="projection_time", help="default: projection_time")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, help="m x n, as 512x1376; prints, writes nothing")
    parser.add_argument("--ranks", nargs="+", type=int, help="prints, writes nothing")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="prints, writes nothing")
    parser.add_argument("--rounds", type=int, help="calls of each method; prints, writes nothing")
    parser.add_argument("--limit", type=float, help="seconds of one call; prints, writes nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--output_dir", type=Path, help="writes there, whatever was asked for")
    arguments = parser.parse_args(argv)
    experiment = load_experiment(arguments.experiment)
    device = pick_device(arguments.device)
    given = {key: getattr(arguments, key) for key in ("ranks", "dtypes", "rounds", "limit") if getattr(arguments, key)}
    settings = {key: experiment[key] for key in ("ranks", "dtypes", "rounds", "limit")} | given
    shapes = arguments.shapes or model_shapes(experiment["models"])
    written = arguments.output_dir or not (given or arguments.shapes)
    rows: list[dict[str, Any]] = []
    result = {"environment": describe(device), "title": experiment["title"], **settings, "rows": rows}
    ranks, rounds, limit = (settings[key] for key in ("ranks", "rounds", "limit"))
    for dtype in settings["dtypes"]:
        for row in measure(shapes, ranks, rounds, limit, torch.device(device), getattr(torch, dtype)):
            rows.append(row)
            if written:  # after each: what is cut off keeps those before
                save((arguments.output_dir or results_folder(device)) / arguments.experiment, result, render)


if __name__ == "__main__":
    main()
