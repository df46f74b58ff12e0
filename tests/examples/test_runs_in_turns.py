"""Timed runs take turns: all have begun, and one works at a time."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
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
def signals(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    """Those that are sent, in their order; none may go on while another works."""
    sent: list[tuple[int, int]] = []
    working: set[int] = set()
    real = pretraining_runs._signal

    def note(process: multiprocessing.Process, number: int) -> None:
        sent.append((process.pid, number))
        if number == signal.SIGCONT:
            assert not any(map(alive, working))
            working.add(process.pid)
        real(process, number)
        if number == signal.SIGSTOP:
            working.discard(process.pid)

    monkeypatch.setattr(pretraining_runs, "_signal", note)
    monkeypatch.setattr(pretraining_runs, "_train", work)
    monkeypatch.setattr(pretraining_runs, "PROCESSES", multiprocessing.get_context("fork"))
    yield sent
    for child in multiprocessing.active_children():
        child.kill()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def runs() -> list[Run]:
    return [Run(name, (("learning_rate", 1.0),), 1, (), name) for name in ("a", "broken", "b")]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork beside torch's threads
def test_one_works_at_a_time_and_a_broken_one_stops_no_other(tmp_path: Path, signals: list[tuple[int, int]]):
    in_turns(runs(), tmp_path, seconds=0.05)
    found = {run.method: pretraining_runs.finished(run, tmp_path) for run in runs()}
    assert found == {"a": {"of": "a"}, "broken": None, "b": {"of": "b"}}
    assert [number for _, number in signals[:3]] == [signal.SIGSTOP] * 3  # before any has a turn
    turns = [sum(sent == (pid, signal.SIGCONT) for sent in signals) for pid, _ in signals[:3]]
    assert turns[1] >= 1 and min(turns[0], turns[2]) > 1  # it breaks when it has begun, which may take a turn or two
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
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(child.pid == pid for child in multiprocessing.active_children()):
            time.sleep(0.01)
        assert not alive(pid)
