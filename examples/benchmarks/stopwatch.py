"""Times of functions that take turns, and what one call of them makes the device and the host do."""

import random
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


# Operators that end in values which Python, or the operator itself, waits for: `.item()` and `if tensor:`, comparisons
# to one bool, shapes that depend on values, decompositions that check their own success.
READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_linalg_svd", "_linalg_eigh")

# Operators that compute nothing.
IDLE = ("empty", "new_empty", "promote_types", "profiler::", "detach", "lift_fresh", "resize")


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU between two events around it, which includes its waiting for launches."""
    return laps([call], device)[0]


def laps(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each of several calls, one right after the other: on a GPU nothing waits for it in between."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for call in calls:
            call()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def in_turn(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    prepare: Callable[[], object] = lambda: None,
    budget: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of every call, by name: in each round all of them, in an order drawn anew.

    Whatever else the machine does, and whatever a call leaves in the caches, meets all of them alike.

    Args:
        calls (`dict[str, Callable]`): What to time.
        rounds (`int`): How often.
        device (`torch.device`): Where they work.
        prepare (`Callable`, *optional*): Called before every call, untimed.
        budget (`float`, *optional*): A call that has taken this many seconds in all is not repeated.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, generator = list(calls), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            if sum(times[name]) < budget:
                prepare()
                times[name].append(timed(calls[name], device))
    return times


def waits(call: Callable[[], object], device: torch.device) -> int:
    """How often one call makes the host wait for the device.

    On a GPU as torch's own synchronisation debugging counts it. On a CPU as the number of operators that would wait
    there if all tensors were on the GPU; torch.optim's ordinary AdamW keeps its step number on the CPU, so of its two
    reads for each tensor none waits on a GPU.
    """
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    # Not what a kernel reads within: that of torch's fused AdamW reads its step number on CPUs and not on GPUs.
    return sum(_name(operator) in READS for operator in _operators(call))


def operators(call: Callable[[], object]) -> int:
    """How many operators that compute one call makes, on any device: what its launches on a GPU grow with.

    One that takes lists of tensors counts once.
    """
    return sum(not operator.is_view and not _name(operator).startswith(IDLE) for operator in _operators(call))


def _operators(call: Callable[[], object]) -> list[torch._ops.OpOverload]:
    # what is compiled (torchao's steps) runs as written here, for a compiled function hides its operators
    with torch.compiler.set_stance("force_eager"), _Record() as record:
        call()
    return record.operators


def _name(operator: torch._ops.OpOverload) -> str:
    return operator.overloadpacket._qualified_op_name.removeprefix("aten::")


class _Record(TorchDispatchMode):
    """Keeps the operators that Python, or an operator made of others, calls."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[torch._ops.OpOverload] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> int:
    """How many kernels and graphs one call launches on a GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    names = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")
    return sum(event.name.startswith(names) for event in profiled.events())
