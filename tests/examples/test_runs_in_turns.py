"""Timed runs take turns: all have begun, and one works at a time."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest


sys.path[:0] = [str(Path(__file__).parents[2] / "examples" / "benchmarks")]

import pretraining_runs  # noqa: E402
from pretraining_runs import Run, in_turns  # noqa: E402


def work(program: str, command: list[str], log: Path) -> None:
    if program == "broken":
        raise SystemExit(1)
    begun = time.process_time()
    while time.process_time() < begun + 0.3:
        sum(range(1000))
    Path(command[command.index("--output_dir") + 1], "results.json").write_text(json.dumps({"of": program}))


@pytest.fixture
def signals(monkeypatch) -> list[tuple[int, int]]:
    """Those that are sent, in their order."""
    sent: list[tuple[int, int]] = []
    real = pretraining_runs._signal

    def note(process: multiprocessing.Process, number: int) -> None:
        sent.append((process.pid, number))
        real(process, number)

    monkeypatch.setattr(pretraining_runs, "_signal", note)
    monkeypatch.setattr(pretraining_runs, "_train", work)
    monkeypatch.setattr(pretraining_runs, "PROCESSES", multiprocessing.get_context("fork"))
    return sent


def runs() -> list[Run]:
    return [Run(name, (("learning_rate", 1.0),), 1, (), name) for name in ("a", "broken", "b")]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork beside torch's threads
def test_one_works_at_a_time_and_a_broken_one_stops_no_other(tmp_path: Path, signals: list[tuple[int, int]]):
    in_turns(runs(), tmp_path, seconds=0.05)
    found = {run.method: pretraining_runs.finished(run, tmp_path) for run in runs()}
    assert found == {"a": {"of": "a"}, "broken": None, "b": {"of": "b"}}
    assert [number for _, number in signals[:3]] == [signal.SIGSTOP] * 3  # before any has a turn
    working: int | None = None
    for pid, number in signals[3:]:
        if number == signal.SIGCONT and working is not None:  # the one before has ended in its turn
            with pytest.raises(ProcessLookupError):
                os.kill(working, 0)
        assert number == signal.SIGCONT or pid == working
        working = pid if number == signal.SIGCONT else None
    turns = [sum(sent == (pid, signal.SIGCONT) for sent in signals) for pid, _ in signals[:3]]
    assert turns[1] == 1 and min(turns[0], turns[2]) > 1
    before = len(signals)
    in_turns([run for run in runs() if run.method != "broken"], tmp_path)
    assert len(signals) == before  # those that have finished are not made again


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_what_breaks_off_leaves_none_behind(tmp_path: Path, signals: list[tuple[int, int]], monkeypatch):
    note = pretraining_runs._signal

    def interrupted(process: multiprocessing.Process, number: int) -> None:
        if len(signals) == 4:
            raise KeyboardInterrupt
        note(process, number)

    monkeypatch.setattr(pretraining_runs, "_signal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_turns(runs(), tmp_path, seconds=0.05)
    for pid in {pid for pid, _ in signals}:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and any(child.pid == pid for child in multiprocessing.active_children()):
            time.sleep(0.01)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
