"""A run that is killed, during saving too, resumes from its last complete checkpoint and ends as if nothing was."""

import gc
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from resumed_runs import make_trainer

from hf_osd import last_complete_checkpoint


KILLS = 20
LONGEST_LIFE = 8  # steps
LONGEST_WAIT = 120  # seconds: a life takes one or two, the first one ten more
STEPS = KILLS * (LONGEST_LIFE + 50)  # out of reach: a kill comes some milliseconds, not 50 steps, after its sign


def live(folder: Path, steps: int, save_steps: int) -> None:
    """Train from the last checkpoint on; where it saves after every step, most of the time goes into that."""
    gc.freeze()  # as in `conftest`
    options = {"max_steps": steps, "save_steps": save_steps, "save_total_limit": 3, "lr_scheduler_type": "constant"}
    trainer = make_trainer(folder, "osd_adamw8bit", torch.bfloat16, **options)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) is not None)
    torch.save(trainer.model.state_dict(), folder / "end.pt")


def start(folder: Path, steps: int, save_steps: int = 1) -> multiprocessing.Process:
    # The server has imported everything: a life lasts a second, not ten. Forks of this process would share tqdm's lock
    # too, which nobody gives back where its holder is killed.
    process = multiprocessing.get_context("forkserver").Process(
        target=live, args=(folder, steps, save_steps), daemon=True
    )
    process.start()
    return process


def end(process: multiprocessing.Process) -> None:
    process.join(LONGEST_WAIT)
    assert process.exitcode == 0, f"did not train to its end: {process.exitcode}"


def newest_checkpoint(folder: Path) -> int:
    """Of complete ones and torn ones."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def wait_for(folder: Path, step: int, process: multiprocessing.Process) -> None:
    """Until the folder of this step's checkpoint is there, which is when its save begins."""
    deadline = time.monotonic() + LONGEST_WAIT
    while newest_checkpoint(folder) < step:
        assert process.is_alive(), f"died by itself with {process.exitcode}"
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {LONGEST_WAIT} s"
        time.sleep(0.004)  # a save takes ten times as long


@pytest.mark.distributed
def test_twenty_kills_lose_nothing(tmp_path: Path):
    killed, clock = tmp_path / "killed", random.Random(0)
    killed.mkdir()
    reached, torn = [], 0
    for _ in range(KILLS):
        process = start(killed, STEPS)
        wait_for(killed, newest_checkpoint(killed) + clock.randint(2, LONGEST_LIFE), process)
        time.sleep(clock.choice([0, clock.uniform(0, 0.05)]))  # within a save, or anywhere in a step
        assert process.is_alive(), f"died by itself with {process.exitcode}"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        newest = newest_checkpoint(killed)
        complete = last_complete_checkpoint(killed)
        reached.append(int(complete.rsplit("-", 1)[1]) if complete else 0)
        torn += newest > reached[-1]
    assert reached == sorted(reached) and reached[-1] > 0
    assert torn > 0, "no kill hit a save: the test shows nothing"
    steps = reached[-1] + 3
    end(start(killed, steps))
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    end(start(undisturbed, steps, save_steps=steps))
    left, right = torch.load(killed / "end.pt"), torch.load(undisturbed / "end.pt")
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("content", [None, "", '{"global_step": 2', "[]"])
def test_a_checkpoint_without_its_last_file_is_not_complete(tmp_path: Path, content: str | None):
    for step in (1, 2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    torn = tmp_path / "checkpoint-10" / "trainer_state.json"
    torn.unlink() if content is None else torn.write_text(content)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path / "checkpoint-1") is None
