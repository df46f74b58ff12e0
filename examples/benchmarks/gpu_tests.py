"""Runs the tests that need a GPU (`pytest -m gpu`), and keeps what each gave.

Writes results/<device>/gpu_tests.json and .md after each test, so that a run that is cut off keeps those before. Its
exit code is pytest's: 0 where none failed. Without a GPU all are skipped, as are those that need a library which is
missing.

    python examples/benchmarks/gpu_tests.py
    python examples/benchmarks/gpu_tests.py --tests tests/optim/test_osd_gpu.py
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from environment import OPTIONAL, describe, missing, named, pick_device, results_folder, save


ROOT = Path(__file__).parents[2]


class Recorder:
    """A plugin of pytest that makes a row of every test.

    Args:
        path (`Path`): Of the result, without an ending.
        environment (`dict`): Where it is made.
    """

    def __init__(self, path: Path, environment: dict[str, object]):
        self.path = path
        self.result: dict[str, Any] = {"environment": environment, "rows": []}

    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Called for each of them before: what fails for want of an optional library is skipped."""
        error = call.excinfo.value if call.excinfo else None
        if isinstance(error, ImportError):
            cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
            if (cause.name or "").partition(".")[0] in OPTIONAL:
                try:
                    pytest.skip(missing(cause))
                except pytest.skip.Exception:
                    call.excinfo = pytest.ExceptionInfo.from_current()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for setup, call and teardown of each: what passes counts by its call, all else at once."""
        if report.when == "call" or not report.passed:
            reason = ""
            if report.skipped and isinstance(report.longrepr, tuple):
                reason = report.longrepr[2].removeprefix("Skipped: ")
            elif report.failed:
                reason = str(report.longrepr).strip().splitlines()[-1]
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason}
            self.result["rows"].append(row)
            save(self.path, self.result, render, quiet=True)


def marked_files() -> list[Path]:
    """The files with such tests: collecting all the others takes as long as these run."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: how many passed, and those that did not."""
    outcomes = [row["outcome"] for row in rows]
    found = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped") if kind in outcomes)
    lines = [f"{found or 'no test ran'}, in {sum(row['seconds'] for row in rows):.0f} s", ""]
    others = [row for row in rows if row["outcome"] != "passed"]
    if others:
        lines += ["| test | | |", "| --- | --- | --- |"]
        lines += [
            f"| {row['test'].removeprefix('tests/')} | {row['outcome']} | {_cell(row['reason'])} |" for row in others
        ]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:200]


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`."""
    named(path, ".md").write_text(table(result["rows"]), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", nargs="+", type=Path, help="files (default: all with such tests)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--output_dir", type=Path, help="default: results/<device>/")
    arguments = parser.parse_args(argv)
    device = pick_device(arguments.device)
    path = (arguments.output_dir or results_folder(device)).absolute() / "gpu_tests"
    files = [str(file.absolute()) for file in arguments.tests or marked_files()]
    recorder = Recorder(path, describe(device))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = ["-m", "gpu", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-q", "-p", "no:cacheprovider"]
    options.append("--continue-on-collection-errors")
    code = int(pytest.main([*options, *files], plugins=[recorder]))
    print("\n".join(reversed(table(recorder.result["rows"]).splitlines())))  # how many passed comes last
    return code


if __name__ == "__main__":
    sys.exit(main())
