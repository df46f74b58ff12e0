"""The one runner of the benchmarks: lists experiments, runs one, or draws tables and pictures of results again.

An experiment is experiments/<name>.json, which names its script; what it gave is results/<device>/<name>.json, with
the environment and the commit inside, and the table and picture beside it are made from that file alone. A script
without settings (`ddp_exchange`, `gpu`, ...) is an experiment by its own name. Arguments after the name
are the script's.

    python examples/benchmarks/run.py                                # what there is
    python examples/benchmarks/run.py step_time                      # run it
    python examples/benchmarks/run.py step_time_gpu --device cuda
    python examples/benchmarks/run.py --draw                         # all tables and pictures again
    python examples/benchmarks/run.py --draw step_time               # those of one experiment, of every device
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from environment import EXPERIMENTS, RESULTS, named


HERE = Path(__file__).parent


def experiments() -> dict[str, str]:
    """The script of every experiment, by the experiment's name."""
    found = {file.stem: script_of(json.loads(file.read_text())) for file in sorted(EXPERIMENTS.glob("*.json"))}
    alone = [file.stem for file in sorted(HERE.glob("*.py")) if 'if __name__ == "__main__"' in file.read_text()]
    return found | {name: name for name in alone if name not in {"run", *found.values()}}


def script_of(experiment: dict) -> str:
    """The script that an experiment names, or that its form tells."""
    return experiment.get("script") or ("compare_finetuning" if "tasks" in experiment else "compare_pretraining")


def experiment_of_result(name: str) -> str | None:
    """The experiment that gave results/<device>/<name>.json; `None` for what no benchmark here made.

    A result of the same experiment in another form, reduced or on other data, has more at the end of its name.
    """
    fitting = [other for other in experiments() if name == other or name.startswith(other + "_")]
    return max(fitting, key=len, default=None)


def script_of_result(name: str) -> str | None:
    """The script that made a result, likewise."""
    experiment = experiment_of_result(name)
    return experiments()[experiment] if experiment else None


def redraw(file: Path, script: ModuleType, folder: Path | None = None) -> list[Path]:
    """Writes table and picture of a result again.

    Args:
        file (`Path`): results/<device>/<name>.json.
        script (`ModuleType`): What measured it.
        folder (`Path`, *optional*): Where to; defaults to beside the result.

    Returns:
        `list[Path]`: What was written.
    """
    result, path = json.loads(file.read_text()), (folder or file.parent) / file.stem
    before = {other: other.stat().st_mtime_ns for other in path.parent.glob(file.stem + "*")}
    if hasattr(script, "render"):
        script.render(result, path)
    else:  # scripts with a table, and a picture of the rows
        named(path, ".md").write_text(script.table(result["rows"]), encoding="utf-8")
        if hasattr(script, "draw"):
            title = json.loads((EXPERIMENTS / f"{file.stem}.json").read_text())["title"]
            script.draw(result["rows"], title, named(path, ".png"))
    after = path.parent.glob(file.stem + "*")
    return [other for other in after if other != file and before.get(other) != other.stat().st_mtime_ns]


def draw(names: list[str]) -> None:
    """Draws these results, or those of these experiments, or all, on every device."""
    files = [file for file in sorted(RESULTS.glob("*/*.json")) if script_of_result(file.stem)]
    asked = [file for file in files if not names or {file.stem, experiment_of_result(file.stem)} & set(names)]
    drawn = {name for file in asked for name in (file.stem, experiment_of_result(file.stem))}
    if unknown := [name for name in names if name not in drawn]:
        raise SystemExit(
            f"There is no result of {', '.join(unknown)}; known: {', '.join(file.stem for file in files)}."
        )
    for file in asked:
        written = redraw(file, importlib.import_module(str(script_of_result(file.stem))))
        print(f"{file.parent.name}/{file.stem}: {', '.join(other.name for other in written)}")


def main(argv: list[str] | None = None) -> int:
    """List, run or draw."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--list"]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    known = experiments()
    if name == "--list":
        results = {file: experiment_of_result(file.stem) for file in sorted(RESULTS.glob("*/*.json"))}
        for experiment, script in known.items():
            made = [f"{file.parent.name}/{file.stem}" for file, maker in results.items() if maker == experiment]
            print(f"{experiment:28} {script + '.py':26} {', '.join(made) or '-'}")
        return 0
    if name == "--draw":
        draw(rest)
        return 0
    if name not in known:
        raise SystemExit(f"There is no experiment {name}; known: {', '.join(known)}.")
    script = known[name]
    command = [sys.executable, str(HERE / f"{script}.py"), *([name] if name != script or _has_file(name) else [])]
    return subprocess.run([*command, *rest], check=False).returncode


def _has_file(name: str) -> bool:
    return (EXPERIMENTS / f"{name}.json").is_file()


if __name__ == "__main__":
    sys.exit(main())
