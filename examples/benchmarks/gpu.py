"""Everything that wants a GPU, in one command of at most eight minutes on one card, without a network.

Each part is a process of its own with a time limit of its own, and writes its result as it goes: a part that fails or
runs out of time is told by name at the end, keeps what it has, and does not stop the others. What needs a library that
is missing is left out, by name: by the part's own table, or as a part. Writes results/<card>/<part>.json with tables
and pictures beside it, and gpu.json and .md: what became of each part.

Needs: torch with CUDA, transformers, accelerate, matplotlib, pytest. More is compared with bitsandbytes, galore-torch,
apollo-torch, torchao, peft and datasets.

    python examples/benchmarks/run.py gpu                                     # or `make gpu`, which installs first
    python examples/benchmarks/run.py gpu --only step_time_gpu gpu_tests
    python examples/benchmarks/run.py gpu --device cpu --reduced              # tiny, anywhere: does it run?
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from environment import OPTIONAL, added, describe, named, pick_device, results_folder, save


ROOT = Path(__file__).parents[2]
SECONDS = 480  # of all parts together
REDUCED_SECONDS = 120  # of each, on whatever machine


@dataclass(frozen=True)
class Part:
    """One experiment of those that `run.py` knows.

    Attributes:
        name (`str`): The experiment.
        seconds (`int`): Its time limit; it may use what those before it left of theirs, too.
        reduced (`tuple[str, ...]`): Arguments that make it tiny.
        needs (`str`): What it cannot do without, beside torch and transformers.
    """

    name: str
    seconds: int
    reduced: tuple[str, ...]
    needs: str = "matplotlib"


# The most important first: what is cut off keeps what is done. `equal_time_gpu` trains five times for 40 seconds.
PARTS = (
    Part("gpu_tests", 40, ("--tests", "tests/optim/test_osd_gpu.py"), "pytest"),
    Part("equal_time_gpu", 235, ("--model", "500k", "--rank", "8", "--batch", "2", "32", "--seconds", "0.2",
                                 "--characters", "200000", "--vocabulary", "300",
                                 "--evaluation_tokens", "64")),
    Part("layerwise_memory_gpu", 75, ("--model", "llama_500k", "--sequence", "16", "--steps", "2", "--runs",
                                       "osd_adamw8bit_layerwise:rank=8", "osd_adamw8bit:rank=8,source=activations"),
         "accelerate"),
    Part("step_time_gpu", 65, ("--cases", "500k:8:2")),
    Part("training_step_gpu", 40, ("--cases", "500k:8:1", "--batch", "1", "16")),
    Part("projection_time_gpu", 25, ("--shapes", "64x96", "--ranks", "8", "--rounds", "2")),
)  # fmt: skip


def command(part: Part, arguments: argparse.Namespace) -> list[str]:
    """What runs a part."""
    output = ["--output_dir", str(arguments.output_dir.absolute())] if arguments.output_dir else []
    reduced = part.reduced if arguments.reduced else ()
    runner = str(Path(__file__).with_name("run.py"))
    return [sys.executable, runner, part.name, "--device", arguments.device, *reduced, *output]


def surroundings() -> dict[str, str]:
    """Environment variables of the parts: one card, no network, this package wherever it is installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": card, "HF_HUB_OFFLINE": "1"}


def run_part(asked: list[str], seconds: float, log: Path) -> int | None:
    """Exit code of a process; `None` where it ran out of time and was ended, with all that it had started."""
    with log.open("w") as file:
        process = subprocess.Popen(
            asked, stdout=file, stderr=file, cwd=ROOT, env=surroundings(), start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def outcome(part: Part, limit: float, arguments: argparse.Namespace, folder: Path, logs: Path) -> dict[str, Any]:
    """Runs a part: a row of the result."""
    row: dict[str, Any] = {"part": part.name, "status": "left out", "seconds": 0.0, "limit": limit, "reason": ""}
    if find_spec(part.needs) is None:
        return row | {"reason": f"{part.needs} is not installed"}
    log, result = logs / f"{part.name}.log", named(folder / part.name, ".json")
    before = result.stat().st_mtime_ns if result.is_file() else None
    started = time.monotonic()
    code = run_part(command(part, arguments), limit, log)
    row["seconds"] = time.monotonic() - started
    if code == 0:
        return row | {"status": "done"}
    written = result.is_file() and result.stat().st_mtime_ns != before
    kept = f"; what it had measured is in {result.name}" if written else ""
    if code is None:
        return row | {"status": "out of time", "reason": f"stopped after {limit:g} s{kept}"}
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return row | {"status": "failed", "reason": f"{lines[-1] if lines else f'exit code {code}'}{kept}"}


def table(result: dict[str, Any]) -> str:
    """Markdown: what became of each part, and where its tables are."""
    lines = ["| part | | seconds | of at most | |", "| --- | --- | --- | --- | --- |"]
    for row in result["rows"]:
        name = f"[{row['part']}]({row['part']}.md)" if row["status"] == "done" else row["part"]
        reason = row["reason"].replace("|", "\\|")[:300]
        lines.append(f"| {name} | {row['status']} | {row['seconds']:.0f} | {row['limit']:.0f} | {reason} |")
    environment = result["environment"]
    lines += ["", f"On {environment.get('card', environment['device'])}, commit {environment['commit']}. "]
    lines[-1] += f"Not installed: {', '.join(environment['missing']) or 'nothing that is compared with'}."
    return "\n".join(lines) + "\n"


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`."""
    named(path, ".md").write_text(table(result), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the parts, tell what became of each; 0 where none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="NAME", help="some parts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    parser.add_argument("--reduced", action="store_true", help="tiny shapes; written to runs/gpu_reduced")
    parser.add_argument("--limit", type=float, help="seconds for each part, instead of its own limit")
    parser.add_argument("--output_dir", type=Path, help="default: results/<card>/")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.reduced:
        parser.error("--device cpu would take days at full size: add --reduced.")
    pick_device(arguments.device)
    work = arguments.output_dir or ROOT / "runs" / ("gpu_reduced" if arguments.reduced else "gpu")
    if arguments.reduced:
        arguments.output_dir = work
    folder, logs = arguments.output_dir or results_folder(arguments.device), work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    missing = [name for name in OPTIONAL if find_spec(name) is None]
    result: dict[str, Any] = {"environment": describe(arguments.device) | {"missing": missing}, "rows": []}
    parts = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    earlier = added(folder / "gpu", result, ("part",))["rows"] if arguments.only else []
    earlier = [row for row in earlier if row["part"] not in arguments.only]
    spare = 0.0
    for number, part in enumerate(parts, 1):
        print(f"[{number}/{len(parts)}] {part.name} ...", end=" ", flush=True)
        limit = arguments.limit or (REDUCED_SECONDS if arguments.reduced else part.seconds + spare)
        try:
            row = outcome(part, limit, arguments, folder, logs)
        except KeyboardInterrupt:
            print(f"cut off. What was measured is in {folder}")
            return 130
        result["rows"].append(row)
        spare = max(0.0, limit - row["seconds"])
        save(folder / "gpu", result | {"rows": earlier + result["rows"]}, render, quiet=True)
        print(f"{row['status']} after {row['seconds']:.0f} s", row["reason"][:300], flush=True)
    print(f"\n{table(result)}\nResults: {folder}\nWhat the parts said: {logs}")
    return int(any(row["status"] in ("failed", "out of time") for row in result["rows"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a part with all that it started, too
    sys.exit(main())
