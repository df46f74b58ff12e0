"""One training of two intervals, on one process or on each of several under DDP."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hf_osd


STEPS, INTERVAL = 6, 4


def train(rank: int = 0, world_size: int = 1) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]], int]:
    """Weights, the optimizer's state, and the bytes that this process has exchanged in the last backward pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16)).double()
    optimizer = hf_osd.create_osd_optimizer(net, "rso_adamw", lr=0.02, rank=6, update_interval=INTERVAL, seed=1)
    exchanged: list[int] = []
    model: nn.Module = net
    if world_size > 1:
        torch.manual_seed(rank)  # P must not come from the process' own generator
        model = DistributedDataParallel(net)

        def exchange(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            exchanged.append(bucket.buffer().nbytes)
            work = dist.all_reduce(bucket.buffer().div_(world_size), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        model.register_comm_hook(None, exchange)
    run_steps(model, optimizer, rank, world_size, exchanged.clear)
    return net.state_dict(), list(optimizer.state_dict()["state"].values()), sum(exchanged)


def run_steps(
    model: nn.Module, optimizer: hf_osd.OSD, rank: int, world_size: int, before: Callable = lambda: None
) -> None:
    """All steps on this process's part of each batch."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        x = torch.randn(8, 24, dtype=torch.float64, generator=generator)[rank::world_size]
        before()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def two_processes(rank: int, world_size: int, folder: Path) -> None:
    """Scenario for `processes.run`."""
    torch.save(train(rank, world_size), folder / f"rank{rank}.pt")


def sharded(rank: int, world_size: int, folder: Path) -> None:
    """Scenario: FSDP2 divides the weights, and all draw the same P."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16)).double()
    fully_shard(net, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = hf_osd.create_osd_optimizer(net, "rso_adamw", lr=0.02, rank=6, update_interval=INTERVAL, seed=1)
    torch.manual_seed(rank)
    run_steps(net, optimizer, rank, world_size)
    weights = {name: p.detach().full_tensor() for name, p in net.named_parameters()}
    torch.save(weights, folder / f"sharded{rank}.pt")
