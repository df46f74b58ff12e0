r"""Time of a whole training step of LLaMA 60M, 350M and 1B: forward pass, backward pass and optimizer, by method.

Contenders (`whole_models.py`) take turns in random order, `at_once` of them at a time, and always with them fused
AdamW at full rank, to whose times beside theirs they are compared. All train the same weights, in memory as well, with
states of their own. For each: the first step, which makes its state; medians and minima of the steps after it, whole
and by part. What a method renews every 200 steps (galore-torch's SVD) is spread over 200 steps by the time of its
first one.

LoRA has adapters of the same rank on all linear layers of the blocks, twice: as it is mostly used, with embeddings and
head frozen, which saves their gradients; and training both, as all the others here do.

Reads experiments/<name>.json; writes results/<device>/<name>.json, .md, _all.md (every part) and .png.

Needs: the `examples` extra. A library that is missing is left out, and the result says so.

    python examples/benchmarks/training_step.py --cases 60m@2:128:3           # two blocks of 60M, a look
    python examples/benchmarks/training_step.py training_step                 # the committed figures on a CPU
    python examples/benchmarks/training_step.py training_step_gpu --device cuda
    python examples/benchmarks/training_step.py --cases quickstart:48:20 --batch 4 256 \
        --contenders osd_adamw8bit osd_adamw8bit:source=activations           # what `make quickstart` trains
"""

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from contenders import INTERVAL
from environment import added, describe, load_experiment, missing, pick_device, results_folder, save
from hf_osd.subspace import subspace_options
from step_time import parse_case
from stopwatch import in_turn, laps, timed
from training_step_report import PARTS, render, table
from whole_models import BASELINE, GALORE, load_config, make_optimizer, parse_name, prepare_model, random_model


class TrainingStep:
    """One step on a batch; keeps what its parts took.

    Args:
        model (`nn.Module`): Has the weights that all contenders train.
        name (`str`): The contender.
        rank (`int`): Of what has one.
        ids (`torch.Tensor`): The batch.
        stack (`ExitStack`): Ends the optimizer.
    """

    def __init__(self, model: torch.nn.Module, name: str, rank: int, ids: torch.Tensor, stack: ExitStack):
        own = copy.deepcopy(model, {id(p): torch.nn.Parameter(p.data) for p in model.parameters()})
        self.model = prepare_model(own, name, rank)
        self.optimizer = stack.enter_context(make_optimizer(self.model, name, rank))
        self.ids, self.loss, self.laps = ids, torch.zeros(()), []

    def __call__(self) -> None:
        """Forward, backward, optimizer."""
        self.laps.append(laps([self.forward, self.backward, self.update], self.ids.device))

    def forward(self) -> None:
        """The loss."""
        self.loss = self.model(input_ids=self.ids, labels=self.ids).loss

    def backward(self) -> None:
        """All gradients."""
        self.loss.backward()
        self.loss = self.loss.detach()

    def update(self) -> None:
        """New weights, and gradients freed."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def renews(name: str) -> bool:
    """Whether a contender makes P anew every `INTERVAL` steps."""
    optim, options = parse_name(name)
    return optim == GALORE or "update_interval" in subspace_options(options.get("subspace", "online_pca"))


def measure(
    case: tuple[str, int, int],
    names: Sequence[str],
    batch: tuple[int, int],
    at_once: int,
    device: torch.device,
    dtype: torch.dtype,
    svd_up_to: float = math.inf,
) -> dict[str, Any]:
    """One case: a row of the result.

    Args:
        case (`tuple`):
            Size of the LLaMA as in the names of `llama_configs/`, with `@` and a number of blocks where not all are
            trained; rank; timed steps of each contender, after its first step and one more.
        names (`Sequence[str]`): The contenders; fused AdamW is always with them.
        batch (`tuple[int, int]`): Sequences and tokens of each.
        at_once (`int`): How many have their state in memory at a time.
        device (`torch.device`): Where.
        dtype (`torch.dtype`): Of the weights.
        svd_up_to (`float`, *optional*): Hidden size above which galore-torch, which takes exact SVDs, is left out.
    """
    model, rank, rounds = case
    size, _, blocks = model.partition("@")
    config = load_config(size, int(blocks or 0))
    weights = random_model(config, dtype, str(device))
    ids = torch.randint(config.vocab_size, batch, device=device)
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    if config.hidden_size > svd_up_to and GALORE in names:
        left_out[GALORE] = f"SVDs of all weights take too long here above s = {svd_up_to}"
    others = [name for name in dict.fromkeys(names) if name != BASELINE and name not in left_out]
    for group in [others[start : start + at_once] for start in range(0, len(others), at_once)] or [[]]:
        with ExitStack() as stack:
            steps: dict[str, TrainingStep] = {}
            for name in (BASELINE, *group):
                try:
                    steps[name] = TrainingStep(weights, name, rank, ids, stack)
                except ImportError as error:
                    left_out[name] = missing(error)
            for name, entry in _summaries(steps, rounds, device).items():
                found.setdefault(name, entry)
    return {
        "model": size,
        "rank": rank,
        "rounds": rounds,
        "blocks": config.num_hidden_layers,
        "all_blocks": load_config(size).num_hidden_layers,
        "batch": list(batch),
        "seconds": found,
        "left_out": left_out,
    }


def _summaries(steps: dict[str, TrainingStep], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """What each step takes beside the others."""
    first = {name: timed(step, device) for name, step in steps.items()}
    in_turn(steps, 1, device)  # the second step may still allocate
    for step in steps.values():
        step.laps.clear()
    in_turn(steps, rounds, device)
    found = {}
    for name, step in steps.items():
        if not math.isfinite(step.loss.item()):
            raise ValueError(f"{name} does not train: its loss is {step.loss.item()}.")
        times = {"whole": [sum(parts) for parts in step.laps]} | dict(
            zip(PARTS, map(list, zip(*step.laps, strict=True)), strict=True)
        )
        entry: dict[str, Any] = {key: _median_and_minimum(values) for key, values in times.items()}
        entry["first"] = first[name]
        entry["renewal"] = max(0.0, first[name] - entry["whole"]["median"]) / INTERVAL if renews(name) else 0.0
        found[name] = entry
    for entry in found.values():
        entry["beside"] = found[BASELINE]["whole"]
    return found


def _median_and_minimum(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "minimum": min(values)}


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="training_step", help="file in experiments/")
    parser.add_argument("--cases", nargs="+", type=parse_case, help="model[@blocks]:rank:rounds; writes nothing")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="see whole_models.py; writes nothing")
    parser.add_argument("--batch", nargs=2, type=int, metavar=("SEQUENCES", "TOKENS"), help="writes nothing")
    parser.add_argument("--at_once", type=int, help="contenders in memory beside AdamW (default: the experiment's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--add", action="store_true", help="put these cases into the result that there is")
    parser.add_argument("--output_dir", type=Path, help="writes there, whatever was asked for")
    arguments = parser.parse_args(argv)
    experiment = load_experiment(arguments.experiment)
    device = pick_device(arguments.device)
    names = arguments.contenders or experiment["contenders"]
    batch, at_once = arguments.batch or experiment["batch"], arguments.at_once or experiment["at_once"]
    chosen = arguments.cases or arguments.contenders or arguments.batch
    written = arguments.output_dir or arguments.add or not chosen
    dtype, svd_up_to = getattr(torch, experiment["dtype"]), experiment.get("svd_up_to", math.inf)
    rows: list[dict[str, Any]] = []
    result = {"environment": describe(device), "title": experiment["title"], "dtype": experiment["dtype"]}
    result["rows"] = rows
    for case in arguments.cases or map(parse_case, experiment["cases"]):
        rows.append(measure(case, names, tuple(batch), at_once, torch.device(device), dtype, svd_up_to))
        print(table(rows[-1]), flush=True)
        if written:  # after every case: what is cut off keeps those before
            path = (arguments.output_dir or results_folder(device)) / arguments.experiment
            save(path, added(path, result, ("model", "blocks", "rank")) if arguments.add else result, render)


if __name__ == "__main__":
    main()
