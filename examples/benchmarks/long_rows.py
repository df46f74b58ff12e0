"""What the long comparison keeps of each method, and how it is written: rows, tables, pictures."""

import json
import math
import statistics
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from compare_pretraining import Method, Setting, row_of, setting_text, tried
from environment import named
from long_plot import draw


MADE = {"commits": "commit", "processors": "processor", "packages": "packages"}  # of a row -> of an environment


@dataclass
class Contender:
    """A method, and what has been found of it so far."""

    search: Method
    long: Method
    walked: dict[Setting, float] = field(default_factory=dict)  # perplexities
    best: Setting | None = None
    short: list[dict[str, Any]] = field(default_factory=list)  # at the best setting, by seed
    results: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)  # what all of its runs were made with

    @property
    def row(self) -> dict[str, Any]:
        """What the result keeps of it, once a long run has finished."""
        row = row_of(self.search, self.walked, self.best, self.results)
        return row | {
            "short_seeds": [result["perplexity"] for result in self.short],
            "parameters": self.results[0]["parameters"],
            "curves": [curve(result) for result in self.results],
            **{key: self._made(what) for key, what in MADE.items()},
        }

    def _made(self, what: str) -> list[Any]:
        told = {json.dumps(start[what], sort_keys=True) for start in self.starts if start.get(what)}
        return [json.loads(text) for text in sorted(told)]


def curve(result: dict[str, Any]) -> list[tuple[int, float]]:
    """Step and validation loss of every evaluation of a run."""
    return [(entry["step"], entry["eval_loss"]) for entry in result["log_history"] if "eval_loss" in entry]


def recalled(contender: Contender, row: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """What a row tells of the runs that it was made of, by stage (`"search"`, `"long"`) and name: all that rows need.

    Raises:
        SystemExit: If the row is of other arguments.
    """
    search, long = contender.search, contender.long
    if row["arguments"] != list(search.arguments) or list(row["best"]) != list(search.grid):
        raise SystemExit(f"{search.name} was measured with other arguments: leave --add out to measure all again.")
    best = tuple(row["best"].values())
    short = {
        search.run(setting, search.seeds[0]).name: {"perplexity": row["perplexity"][setting_text(setting)]}
        for setting in product(*search.grid.values())
        if setting_text(setting) in row["perplexity"]
    }
    short |= {
        search.run(best, seed).name: {"perplexity": found}
        for seed, found in zip(search.seeds, row["short_seeds"], strict=False)
    }
    sizes = {
        key: row[key] for key in ("optimizer_state_bytes", "adamw_state_bytes", "steps", "tokens_seen", "parameters")
    }
    whole = {}
    for seed, found, points in zip(long.seeds, row["seeds"], row["curves"], strict=False):
        entries = [{"step": step, "eval_loss": loss} for step, loss in points]
        whole[long.run(best, seed).name] = sizes | {"perplexity": found, "log_history": entries}
    return {"search": short, "long": whole}


def recalled_starts(row: dict[str, Any], environment: dict[str, Any]) -> list[dict[str, Any]]:
    """What a row tells its runs were made with; what it does not tell yet is the environment of its result."""
    return [{what: found} for key, what in MADE.items() for found in row.get(key, [environment.get(what)])]


def table(result: dict[str, Any]) -> str:
    """Markdown: perplexities, settings, bytes and time of every method that has a long run."""
    rows, seconds = result["rows"], result.get("times", {}).get("seconds_per_step", {})
    lines = [
        "| method | perplexity | short runs | at the setting | the grid | optimizer state | of AdamW's | ms a step |",
        "| --- " * 8 + "|",
    ]
    for row in rows:
        best = ", ".join(f"{option.replace('_', ' ')} {value:g}" for option, value in row["best"].items())
        size, second = row["optimizer_state_bytes"], seconds.get(row["method"])
        lines.append(
            f"| {row['label']} | {_mean(row['seeds'])} | {_mean(row['short_seeds'])} | {best} | {tried(row)} | "
            f"{size / 2**20:.1f} MiB | {size / row['adamw_state_bytes']:.0%} | "
            f"{'-' if second is None else f'{1000 * second:.0f}'} |"
        )
    if rows:
        tokens, parameters = rows[0]["tokens_seen"], rows[0]["parameters"]
        lines += ["", f"{tokens:,} tokens, {tokens / parameters:.1f} for each of {parameters:,} parameters."]
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f} (one seed)" if values else "-"
    if not all(map(math.isfinite, values)):
        return f"{statistics.fmean(values):.2f} ({len(values)} seeds)"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def render(result: dict[str, Any], path: Path) -> None:
    """Writes table and picture of a result."""
    named(path, ".md").write_text(table(result), encoding="utf-8")
    draw(result["rows"], result.get("times", {}).get("seconds_per_step", {}), result["title"], named(path, ".png"))
