"""Run functions on several gloo processes, started once for many of them."""

import gc
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


TIMEOUT = timedelta(seconds=60)


def run(world_size: int, scenarios: Sequence[Callable[[int, int, Path], None]], folder: Path) -> dict[str, str]:
    """Call each scenario with rank, number of processes and `folder` on every process.

    Returns:
        `dict[str, str]`: By scenario, the traceback of the first process that failed, or an empty text.
    """
    folder.mkdir(exist_ok=True)
    (folder / f"store_{world_size}").unlink(missing_ok=True)  # of an earlier call
    crash = None
    try:
        mp.start_processes(_work, (world_size, scenarios, folder), nprocs=world_size, start_method="forkserver")
    except mp.ProcessExitedException as error:  # as gloo does where a process waits for one that has failed
        crash = error
    results = {}
    for scenario in scenarios:
        texts = [folder / f"{scenario.__name__}_{rank}_of_{world_size}.txt" for rank in range(world_size)]
        said = [path.read_text() if path.exists() else "did not run" for path in texts]
        results[scenario.__name__] = next((text for text in said if text), "")
    if crash is not None and not any(results.values()):
        raise crash
    return results


def _work(rank: int, world_size: int, scenarios: Sequence[Callable], folder: Path) -> None:
    gc.freeze()  # as in `conftest`
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    store = dist.FileStore(str(folder / f"store_{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    for scenario in scenarios:
        torch.manual_seed(0)
        text = ""
        try:
            scenario(rank, world_size, folder)
        except Exception:
            text = traceback.format_exc()
        (folder / f"{scenario.__name__}_{rank}_of_{world_size}.txt").write_text(text)
        if text:  # the processes are not in step any more
            break
    dist.destroy_process_group()
