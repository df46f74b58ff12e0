"""One training of two intervals, on one process or on each of several under DDP."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_osd.rso import create_rso_model, gradient_bytes, outer_loop, rso_param_groups


STEPS, INTERVAL = 6, 4


def train(rank: int = 0, world_size: int = 1) -> tuple[dict[str, torch.Tensor], int, int]:
    """Weights, bytes that this process has exchanged in a step, and the bytes that were predicted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16)).double()
    create_rso_model(net, 6, interval=INTERVAL, eta=2.0, seed=1)
    optimizer = torch.optim.AdamW(rso_param_groups(net, 0.02, decay_names=[]))
    loop = outer_loop(net)
    assert loop is not None
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
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        x = torch.randn(8, 24, dtype=torch.float64, generator=generator)[rank::world_size]
        loop.before_step(optimizer, step)
        exchanged.clear()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.index == 1
    return net.state_dict(), sum(exchanged), gradient_bytes(net)


def two_processes(rank: int, world_size: int, folder: Path) -> None:
    """Scenario for `processes.run`."""
    torch.save(train(rank, world_size), folder / f"rank{rank}.pt")
