"""The paper's theorem, watched: H never increases, wherever P goes; and what P must do for the gradient to vanish.

Integrates the continuous-time systems of Examples 4.1 to 4.3 of Online Subspace Descent (arXiv 2408.12857), momentum,
Adam and Lion-K, on a loss that is not convex, while P moves

1. by online PCA (gradient flow of Eq. 6), also for P and Q of the two-sided operator P X Q;
2. by online PCA fifty times slower;
3. on a random smooth path, blind to the gradient;
4. by an adversary, who rotates it away from the gradient.

For each it prints H, the largest increase of H, the difference between its decrease and the paper's formula of dH/dt
(both: the integrator's error), and the norm of the gradient. H falls on all of them. The gradient goes to zero with
online PCA; the adversary brings the weights to rest where Pᵀ grad L = 0 (Assumption 4.4 ii forbids such a P), and so
does an online PCA that turns more slowly than the weights move: its saddle, Pᵀ grad L = 0, attracts them then.

Needs: the `examples` extra (matplotlib, scipy). Writes lyapunov.json and .png.

    python examples/lyapunov.py --t_end 5 --output_dir runs/lyapunov      # a look, seconds
    python examples/lyapunov.py                                           # the committed picture, half a minute
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from lyapunov_flow import OPERATORS, Trajectory, adversary, integrate, online_pca, random_path
from lyapunov_systems import SYSTEMS, WavyBowl


# name -> operator, path, color and style of the line
RUNS = {
    "online PCA": ("left", online_pca, "#2f5fa8", "-"),
    "online PCA, two-sided": ("two-sided", online_pca, "#2f5fa8", "--"),
    "online PCA, 50 times slower": ("left", partial(online_pca, alpha=0.2), "#c78a1e", "-"),
    "random path": ("left", random_path, "#6a9a3b", "-"),
    "adversary": ("left", adversary, "#c4442f", "-"),
}
FORMULAS = {  # of H, for the titles
    "momentum": r"$H = L + \|M\|^2 / 2a$",
    "Adam": r"$H = L + \langle M / (\sqrt{V} + e),\, M\rangle / 2a$",
    "Lion-K": r"$H = a L + K((1-b) M) / (1-b)$",
}
M, N, RANK = 12, 6, 3  # m >= n + r, so that there is a P with Pᵀ G = 0 whatever G is
POINTS = 200  # of a curve in the JSON


def curve(trajectory: Trajectory) -> dict[str, list[float]]:
    """A trajectory at no more than `POINTS` of its steps, six digits each."""
    kept = torch.linspace(0, len(trajectory.t) - 1, min(POINTS, len(trajectory.t))).round().long()
    columns = {"t": trajectory.t, "H": trajectory.H, "gradient_norm": trajectory.gradient_norm}
    return {name: [float(f"{x:.6g}") for x in column[kept].tolist()] for name, column in columns.items()}


def measure(t_end: float, seed: int) -> dict:
    """All systems along all paths, from the same W and, for each operator, the same P."""
    generator = torch.Generator().manual_seed(seed)
    loss = WavyBowl.random(M, N, generator)
    W = torch.zeros(M, N, dtype=torch.float64)
    figures: dict = {}
    for system_name, system in SYSTEMS.items():
        print(f"\n{system_name:<29}{'H at 0':>9}{'at the end':>12}{'increase':>10}{'error':>9}{'||grad L||':>18}")
        figures[system_name] = {}
        for name, (operator, path, _, _) in RUNS.items():
            P = OPERATORS[operator].start(M, N, RANK, torch.Generator().manual_seed(seed + 1))
            found = integrate(loss, system, OPERATORS[operator], path, W, P, t_end)
            norms = found.gradient_norm
            print(
                f"{name:<29}{found.H[0]:9.3f}{found.H[-1]:12.3g}{max(found.increase, 0.0):10.1e}{found.error:9.1e}"
                f"{norms[0]:9.2f} -> {norms[-1]:.2g}",
                flush=True,
            )
            figures[system_name][name] = {
                "decrease": float(found.H[0] - found.H[-1]),
                "decrease_by_the_formula": -float(found.integral[-1]),
                "error": found.error,
                "increase": found.increase,
                "curve": curve(found),
            }
    return figures


def draw(figures: dict, file: Path) -> None:
    """H above and the norm of the gradient below, one column for each system."""
    figure = Figure(figsize=(12, 6.6), dpi=150, layout="constrained")
    rows = figure.subplots(2, len(figures), sharex=True, sharey="row")
    for column, (system_name, runs) in enumerate(figures.items()):
        above, below = rows[:, column]
        for name, run in runs.items():
            _, _, color, style = RUNS[name]
            points = run["curve"]
            for axes, key in ((above, "H"), (below, "gradient_norm")):
                axes.plot(points["t"], points[key], color=color, linestyle=style, linewidth=1.7, label=name)
        above.set_title(f"{system_name}:  {FORMULAS[system_name]}", loc="left", fontsize=11)
        below.set_yscale("log")
        below.set_xlabel("time t")
        for axes in (above, below):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    rows[0, 0].set_ylabel("H (its infimum is 0)")
    rows[0, 0].set_ylim(bottom=0)
    rows[1, 0].set_ylabel("norm of the gradient of L")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(RUNS), frameon=False)
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> None:
    """Integrate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t_end", type=float, default=40.0, help="length of the integrations (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the loss and of P (default: 0)")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = measure(options.t_end, options.seed)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {"m": M, "n": N, "rank": RANK, "t_end": options.t_end, "seed": options.seed}
    (options.output_dir / "lyapunov.json").write_text(json.dumps({**settings, "systems": figures}) + "\n")
    draw(figures, options.output_dir / "lyapunov.png")
    print(f"\nWritten: {options.output_dir / 'lyapunov'}.json and .png")


if __name__ == "__main__":
    main()
