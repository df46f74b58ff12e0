"""What an allocator was asked for while something ran: the truth that estimates of memory are held against.

On the CPU from torch.profiler, which sees every allocation, those inside operators included; on a GPU from the
allocator's own counters.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function


MARK = "allocations: "


class Phase(NamedTuple):
    """Bytes allocated and not freed, at the start and the end of a phase, and the most in between."""

    start: int
    end: int
    peak: int


@contextmanager
def counted(device: str) -> Iterator[tuple[Callable[[str], AbstractContextManager], dict[str, Phase]]]:
    """Gives `phase(name)`, a context for each part (not nested), and what was seen in them, to be read afterwards."""
    gc.collect()  # what goes in between would be missing
    found: dict[str, Phase] = {}
    if device == "cuda":
        yield lambda name: _cuda_phase(name, found), found
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield lambda name: record_function(MARK + name), found
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    times, sizes, live = [], [], 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        times.append(event.start_ns())
        sizes.append(live)
    time, size = torch.tensor([0, *times]), torch.tensor([0, *sizes])
    for event in events:
        if event.name().startswith(MARK):
            start, end = (int(torch.searchsorted(time, t, right=True)) for t in (event.start_ns(), event.end_ns()))
            part = size[start - 1 : end]
            found[event.name().removeprefix(MARK)] = Phase(int(part[0]), int(part[-1]), int(part.max()))


@contextmanager
def _cuda_phase(name: str, found: dict[str, Phase]) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    found[name] = Phase(start, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
