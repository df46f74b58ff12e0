"""Pretraining for equal time: the validation loss that each method reaches in so many seconds, and tokens per second.

Every contender (`whole_models.py`) trains the same LLaMA from the same weights on the same blocks of packed text, the
Python source of installed packages (`python_text.py`), alone on the device. The learning rate rises in the first
twentieth of the time and falls to 0 as a cosine at its end. All that a step does counts, first steps and GaLore's SVDs
too; what does not: data, evaluations, and one forward and backward pass before the first step, which wakes the
libraries. Each contender has the one learning rate of the experiment's file, without a search.

Reads experiments/<name>.json; writes results/<device>/<name>.json, .md and .png after each contender.

    python examples/benchmarks/equal_time.py equal_time_gpu --device cuda               # five minutes
    python examples/benchmarks/equal_time.py equal_time_gpu --device cpu --model quickstart --seconds 20 --batch 4 128
"""

import argparse
import gc
import math
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import LambdaLR

from environment import describe, load_experiment, missing, named, pick_device, results_folder, save, without_8bit
from python_text import Blocks, packed_text
from step_report import OURS_COLOR, PEER_COLOR
from whole_models import load_config, make_optimizer, prepare_model, random_model


EVALUATIONS = 8
WARMUP = 0.05  # of the time
UNWATCHED = 10  # steps on a GPU between two looks at its clock, which wait for it


def factor(share: float) -> float:
    """The learning rate over its highest, at this share of the time."""
    return min(share / WARMUP, 1.0) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


class Clock:
    """Seconds of training, without what is done while it stands."""

    def __init__(self, device: torch.device):
        self.device, self.passed = device, 0.0
        self.since: float | None = None

    def go(self) -> None:
        """From now on."""
        self.wait()
        self.since = time.perf_counter()

    def stop(self) -> None:
        """Until all that was asked of the device is done."""
        self.wait()
        self.passed, self.since = self.now, None

    def wait(self) -> None:
        """For the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def now(self) -> float:
        """So far; while it goes, the host may be ahead of the device."""
        return self.passed + (0.0 if self.since is None else time.perf_counter() - self.since)


def batches(blocks: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Without end."""
    for step in count():
        rows = torch.arange(step * size, (step + 1) * size, device=blocks.device) % len(blocks)
        yield blocks[rows].long()


@torch.no_grad()
def evaluate(model: torch.nn.Module, blocks: torch.Tensor, size: int) -> float | None:
    """Mean loss of blocks, so many at a time; `None` where it is no number any more."""
    leading = blocks.split(size)
    model.eval()
    losses = [(model(input_ids=ids.long(), labels=ids.long()).loss * len(ids)).item() for ids in leading]
    model.train()
    mean = sum(losses) / sum(map(len, leading))
    return mean if math.isfinite(mean) else None


def train(model: torch.nn.Module, name: str, lr: float, text: Blocks, settings: dict[str, Any]) -> dict[str, Any]:
    """One contender: a row of the result.

    Args:
        model (`nn.Module`): With its first weights.
        name (`str`): The contender.
        lr (`float`): The highest learning rate.
        text (`Blocks`): On the model's device.
        settings (`dict`): The experiment's.
    """
    device, size, seconds = text.train.device, settings["batch"][0], settings["seconds"]
    clock, step, curve = Clock(device), 0, []
    held_out = text.validation[: max(1, settings["evaluation_tokens"] // text.validation.shape[1])]
    stream = batches(text.train, size)
    model = prepare_model(model, name, settings["rank"])
    with make_optimizer(model, name, settings["rank"], lr) as optimizer:
        schedule = LambdaLR(optimizer, lambda _: factor(clock.now / seconds))
        for mark in (seconds * (i + 1) / EVALUATIONS for i in range(EVALUATIONS)):
            clock.go()
            while clock.now < mark:
                ids = next(stream)
                model(input_ids=ids, labels=ids).loss.backward()
                step += 1
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if step % UNWATCHED == 0:
                    clock.wait()
            clock.stop()
            curve.append([clock.passed, step, evaluate(model, held_out, size)])
    tokens = step * text.train.shape[1] * size
    found = {"name": name, "lr": lr, "seconds": clock.passed, "steps": step, "tokens": tokens, "curve": curve}
    found["tokens_per_second"] = tokens / clock.passed
    found["epochs"] = tokens / text.train.numel()
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return found


def contend(result: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Adds every contender in turn to the rows of a result with its settings, or to `left_out`, with the reason."""
    text = packed_text(result["batch"][1], result["vocabulary"], result["characters"])
    text = Blocks(*(part.to(device) for part in text))
    for asked, lr in result["contenders"].items():
        name = without_8bit(asked)
        if name != asked:
            result["left_out"][asked] = f"bitsandbytes is not installed: {name} in its place"
        try:
            result["rows"].append(train(_awake_model(text, result, device), name, lr, text, result))
        except ImportError as error:
            result["left_out"][name] = missing(error)
        except torch.OutOfMemoryError:
            result["left_out"][name] = "out of memory"
        yield


def _awake_model(text: Blocks, settings: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """With its first weights, after a first pass."""
    gc.collect()  # the model before
    model = random_model(load_config(settings["model"]), getattr(torch, settings["dtype"]), str(device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ids = text.train[: settings["batch"][0]].long()
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    return model


def table(result: dict[str, Any]) -> str:
    """Markdown: losses at a quarter, half and all of the time."""
    shares = [EVALUATIONS // 4, EVALUATIONS // 2, EVALUATIONS]
    heads = [f"validation loss after {result['seconds'] * share / EVALUATIONS:g} s" for share in shares]
    heads = ["learning rate", *heads, "tokens per second", "passes over the text", "peak memory"]
    lines = [f"| | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for row in result["rows"]:
        losses = [row["curve"][share - 1][2] for share in shares]
        cells = [f"{row['lr']:g}", *("diverged" if loss is None else f"{loss:.3f}" for loss in losses)]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['epochs']:.2f}"]
        cells.append(f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else "-")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    lines += [f"| {name} | {reason} |" + " |" * (len(heads) - 1) for name, reason in result["left_out"].items()]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Validation loss against seconds of training."""
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    seen = {True: 0, False: 0}
    for row in result["rows"]:
        ours = row["name"].startswith("osd_")
        seconds, _, losses = zip(*row["curve"], strict=True)
        values = [float("nan") if loss is None else loss for loss in losses]
        color = OURS_COLOR if ours else PEER_COLOR
        style = styles[seen[ours] % len(styles)]
        # with markers, for a line of one point is none
        axes.plot(seconds, values, color=color, linestyle=style, marker=".", label=row["name"])
        seen[ours] += 1
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation loss")
    axes.set_title(result["title"], loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if result["rows"]:
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md` and `<path>.png`."""
    named(path, ".md").write_text(table(result), encoding="utf-8")
    draw(result, named(path, ".png"))


def main(argv: list[str] | None = None) -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="equal_time_gpu", help="file in experiments/")
    parser.add_argument("--model", help="size of the LLaMA, or a file; writes nothing")
    parser.add_argument("--rank", type=int, help="writes nothing")
    parser.add_argument("--batch", nargs=2, type=int, metavar=("SEQUENCES", "TOKENS"), help="writes nothing")
    parser.add_argument("--seconds", type=float, help="of training; writes nothing")
    parser.add_argument("--characters", type=int, help="of text; writes nothing")
    parser.add_argument("--evaluation_tokens", type=int, help="writes nothing")
    parser.add_argument("--vocabulary", type=int, help="of the tokenizer; writes nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--output_dir", type=Path, help="writes there, whatever was asked for")
    arguments = parser.parse_args(argv)
    experiment = load_experiment(arguments.experiment)
    device = pick_device(arguments.device)
    options = ("model", "rank", "batch", "seconds", "characters", "vocabulary", "evaluation_tokens")
    given = {key: value for key in options if (value := getattr(arguments, key)) is not None}
    settings = {key: value for key, value in experiment.items() if key != "script"} | given
    result: dict[str, Any] = {"environment": describe(device), **settings, "rows": [], "left_out": {}}

    for _ in contend(result, torch.device(device)):
        print(table(result), flush=True)
        if arguments.output_dir or not given:  # after each: what is cut off keeps those before
            save((arguments.output_dir or results_folder(device)) / arguments.experiment, result, render)


if __name__ == "__main__":
    main()
