"""Time of one optimizer step on the weights of LLaMA 60M to 7B: ours and the libraries that people use now.

All contenders (`contenders.py`) step the same tensors, those of one transformer block, in turns of random order;
a model's time is that times its number of blocks. For each: the first step, which makes its state; the median and the
worst of the steps after it; the median with what is done at some steps only spread over all; the ratio to the three
bare matrix products that a step of Online Subspace Descent cannot do without; how often a step makes the host wait;
how many operators it is made of, and on a GPU the kernels it launches.

Reads experiments/<name>.json; writes results/<device>/<name>.json, .md (a few), _all.md (all) and .png.

Needs: the `benchmarks` extra. A library that is missing is left out, and the result says so.

    python examples/benchmarks/step_time.py --cases 60m:128:5              # a look, half a minute
    python examples/benchmarks/step_time.py step_time                      # the committed figures on a CPU
    python examples/benchmarks/step_time.py step_time_gpu --device cuda    # 1B and 7B in bfloat16
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from contenders import BARE, CONTENDERS, INTERVAL, Step
from environment import describe, load_experiment, pick_device, results_folder, save
from hf_osd.subspace.precision import full_precision, reduced_precision
from shapes import block_shapes, sizes
from step_report import render, table
from stopwatch import in_turn, launches, operators, timed, waits


CUBIC_UP_TO = {"cpu": 2048, "cuda": 1 << 30}


def block(model: str, device: torch.device, dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], list[torch.Tensor]]:
    """The weights of one block and a gradient for each."""
    generator = torch.Generator().manual_seed(0)
    params, grads = [], []
    for shape in block_shapes(model):
        params.append(torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)))
        grads.append(torch.randn(shape, generator=generator).to(device, dtype))
    return params, grads


def measure(
    model: str, rank: int, rounds: int, names: list[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One case: a row of the result.

    Args:
        model (`str`): Size of the LLaMA, as in the names of `llama_configs/`.
        rank (`int`): Rank of the subspaces.
        rounds (`int`): Timed steps of each contender, after its first step and one more.
        names (`list[str]`): The contenders; the bare products are always among them.
        device (`torch.device`): Where.
        dtype (`torch.dtype`): Of weights and gradients.
    """
    params, grads = block(model, device, dtype)

    def restore() -> None:  # galore-torch in 8 bits replaces the gradients
        for W, G in zip(params, grads, strict=True):
            W.grad = G

    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    left_out: dict[str, str] = {}
    size = min(min(W.shape) for W in params)
    for name in dict.fromkeys([BARE, *names]):
        contender = CONTENDERS[name]
        obstacle = contender.obstacle(device, size, CUBIC_UP_TO[device.type])
        if obstacle is None:
            restore()
            try:
                steps[name] = contender.make(params, rank)
            except ImportError:
                obstacle = f"{contender.package} is not installed"
            else:
                first[name] = timed(steps[name], device)
        if obstacle is not None:
            left_out[name] = obstacle
    in_turn(steps, 1, device, restore)  # the second step may still allocate
    times = in_turn(steps, rounds, device, restore)
    found = {}
    for name, step in steps.items():
        median, period = statistics.median(times[name]), CONTENDERS[name].period
        kinds = [statistics.median(times[name][kind::period]) for kind in range(min(period, rounds))]
        spread = max(0.0, first[name] - median) / INTERVAL if CONTENDERS[name].renews else 0.0
        found[name] = {
            "first": first[name],
            "median": median,
            "worst": max(times[name]),
            "amortised": statistics.fmean(kinds) + spread,
            "waits": _most(partial(waits, step, device), len(kinds), restore),
            "operators": _most(partial(operators, step), len(kinds), restore),
            "launches": None if device.type == "cpu" else _most(partial(launches, step), len(kinds), restore),
        }
    return {
        "model": model,
        "rank": rank,
        "rounds": rounds,
        "blocks": sizes(model)[2],
        "seconds": found,
        "left_out": left_out,
    }


def kernels(shape: tuple[int, int, int] = (2736, 1024, 128), rounds: int = 15) -> dict[str, dict[str, float]]:
    """Products of float32 matrices on the CPU, by torch's usual kernel and by those that a step chooses.

    Returns:
        `dict`: By kernel its median time in seconds, and its relative error against float64.
    """
    m, n, r = shape
    G, P = torch.randn(m, n), torch.randn(n, r)
    exact = G.double() @ P.double()
    ways = {"usual": nullcontext(), "of R and W": full_precision(G), "of A": reduced_precision(G)}
    found = {}
    for name, way in ways.items():
        with way:
            found[name] = {
                "seconds": statistics.median(timed(lambda: G @ P, torch.device("cpu")) for _ in range(rounds)),
                "relative_error": float((G @ P - exact).norm() / exact.norm()),
            }
    return found


def _most(count: Callable[[], int], kinds: int, prepare: Callable[[], None]) -> int:
    """What the kind of step counts that has most of it."""
    seen = []
    for _ in range(kinds):
        prepare()
        seen.append(count())
    return max(seen)


def parse_case(text: str) -> tuple[str, int, int]:
    """`60m:128:30`: model, rank, rounds."""
    try:
        model, rank, rounds = text.rsplit(":", 2)
        return model, int(rank), int(rounds)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not model:rank:rounds, such as 60m:128:30") from None


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="step_time", help="file in experiments/ (default: step_time)")
    parser.add_argument("--cases", nargs="+", type=parse_case, help="model:rank:rounds; prints, writes nothing")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help="prints, writes nothing")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights; prints, writes nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--output_dir", type=Path, help="writes there, whatever was asked for")
    arguments = parser.parse_args(argv)
    experiment = load_experiment(arguments.experiment)
    device = pick_device(arguments.device)
    dtype = arguments.dtype or experiment["dtype"]
    names = arguments.contenders or experiment.get("contenders") or list(CONTENDERS)
    written = arguments.output_dir or not (arguments.cases or arguments.contenders or arguments.dtype)
    rows: list[dict[str, Any]] = []
    result = {"environment": describe(device), "title": experiment["title"], "dtype": dtype, "rows": rows}
    result["table"] = experiment.get("table") or names
    if device == "cpu" and dtype == "float32":
        result["kernels"] = kernels()
    for model, rank, rounds in arguments.cases or map(parse_case, experiment["cases"]):
        rows.append(measure(model, rank, rounds, names, torch.device(device), getattr(torch, dtype)))
        print(table(rows[-1]), flush=True)
        if written:  # after every case: what is cut off keeps those before
            save((arguments.output_dir or results_folder(device)) / arguments.experiment, result, render)


if __name__ == "__main__":
    main()
