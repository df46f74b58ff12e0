"""An experiment of the long comparison, and what stands for its training."""

import json
import math
from pathlib import Path
from typing import Any

from pretraining_runs import Run


EXPERIMENT: dict[str, Any] = {
    "common": ["--model", "m"],
    "search": {"seeds": [1, 2], "arguments": ["--max_steps", "10"]},
    "long": {"seeds": [1, 2], "save_steps": 5, "arguments": ["--max_steps", "100"]},
    "methods": {
        "a": {"label": "A", "learning_rates": [1, 2, 3], "starts": [{"learning_rate": 1}], "arguments": []},
        "b": {"label": "B", "learning_rates": [1], "arguments": []},
    },
}


def result(loss: float, steps: int) -> dict[str, Any]:
    entries = [{"step": step, "eval_loss": loss, "train_cpu_seconds": 0.5 * step} for step in (steps // 2, steps)]
    entries[1]["train_cpu_seconds"] = 0.1 * steps
    return {
        "eval_loss": loss,
        "perplexity": math.exp(loss),
        "optimizer_state_bytes": 50,
        "adamw_state_bytes": 100,
        "parameters": 10,
        "steps": steps,
        "tokens_seen": 4 * steps,
        "log_history": [{"step": 1, "loss": 5.0}, *entries],
    }


class Runner:
    """Stands in for training: the loss is least at learning rate 2."""

    def __init__(self, steps: int, names: list[str], broken: str = "") -> None:
        self.steps, self.names, self.broken = steps, names, broken

    def __call__(self, run: Run) -> dict[str, Any]:
        if run.method == self.broken:
            raise SystemExit("out of memory")
        self.names.append(f"{self.steps}: {run.name}")
        return result(2 + (run.options[0][1] - 2) ** 2 + run.seed / 10, self.steps)


def keep(work_dir: Path, stage: str, run: Run, loss: float, made: dict[str, Any] | None = None) -> None:
    """A finished run, on disk."""
    folder = work_dir / stage / run.name
    folder.mkdir(parents=True)
    (folder / "command.json").write_text(json.dumps(run.command))
    (folder / "results.json").write_text(json.dumps(result(loss, 100)))
    if made is not None:
        (folder / "made.jsonl").write_text(json.dumps({"from": None, **made}) + "\n")
