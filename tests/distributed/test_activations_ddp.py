"""`source="activations"` under DDP is one process on the global batch, and bit for bit the same on every process."""

import contextlib
import copy
import sys
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from hf_osd.layers.int8 import Int8Weight
from reference.nets_in_layers import N, Net, Other, batch, distance, loss_of, make


sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))  # for `ddp_exchange`

STEPS = 8


class Wrapped(nn.Module):
    """A model inside of another, as some trainers have it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def share(x):
    """This process's part of a global batch of two micro-batches for each of two processes."""
    return x.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else x


def large_batch(step):
    return torch.cat([batch(10 * step + i) for i in range(4)])


def trained(wrap=lambda net: net, parts=1, reset_after=None, **options):
    torch.manual_seed(0)
    net = Net()
    if dist.is_initialized():
        with torch.no_grad():  # DDP gives all processes the weights of the first
            for p in net.parameters():
                p.add_(dist.get_rank())
    optimizer = make(net, **options)
    model = wrap(net)
    for step in range(STEPS):
        pieces = share(large_batch(step)).chunk(parts)
        for i, x in enumerate(pieces):
            last = i == parts - 1 or not isinstance(model, DistributedDataParallel)
            with contextlib.nullcontext() if last else model.no_sync():
                (loss_of(model(x)) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == reset_after:
            optimizer.state.clear()
    return net, optimizer


OPTIONS = [{}, {"projection_sample": 1}, {"subspace": "power"}, {"subspace": "random", "update_interval": 3}]
OPTIONS += [{"reset_after": 3}, {"residual": "sign", "residual_sample": 3}]
INT8 = {"weight_dtype": "int8", "projection_dtype": "int8", "optim": "osd_sgd"}


def same_everywhere(net, optimizer):
    tensors = [*net.state_dict().values()]
    tensors += [value for p in optimizer.state for value in optimizer.state[p].values()]
    for tensor in tensors:
        first = tensor.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor)


def as_one_process(rank: int, world_size: int, folder: Path) -> None:
    for number, options in enumerate(OPTIONS):
        for parts, wrap in ((1, DistributedDataParallel), (2, lambda net: DistributedDataParallel(Wrapped(net)))):
            net, optimizer = trained(wrap, parts, **options)
            same_everywhere(net, optimizer)
            whole = Net()
            whole.load_state_dict(torch.load(folder / f"net_{number}.pt"))
            assert distance(net, whole) < 1e-9  # the same tokens are seen: 4 divides each process's part


def int8(rank: int, world_size: int, folder: Path) -> None:
    """A rounding off one process's weights, whose sums are of another order; the same bits on both."""
    for wrap in (DistributedDataParallel, lambda net: DistributedDataParallel(Wrapped(net))):
        net, optimizer = trained(wrap, **INT8)
        same_everywhere(net, optimizer)
        whole = Net()
        whole.load_state_dict(torch.load(folder / "int8.pt"))
        steps = [W.scale.max().item() for W in net.parameters() if isinstance(W, Int8Weight)]
        assert len(steps) == 3 and distance(net, whole) < 2 * max(steps)


def experts(layers, x):
    """Each process calls a layer of its own, and one that both do."""
    own = "a" if dist.get_rank() == 0 else "b"
    return layers["c"](x) + layers[own](x)


def conditional(rank: int, world_size: int, folder: Path) -> None:
    net = Other(experts, a=nn.Linear(N, 24), b=nn.Linear(N, 24), c=nn.Linear(N, 24))
    optimizer = make(net)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    model = DistributedDataParallel(net, find_unused_parameters=True)
    for step in range(4):
        loss_of(model(share(large_batch(step)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    same_everywhere(net, optimizer)
    assert all(not torch.equal(start[name], value) for name, value in net.state_dict().items())


def used_otherwise(rank: int, world_size: int, folder: Path) -> None:
    def forward(layers, x):
        return layers["a"](x) @ layers["a"].weight + layers["b"](x)

    net = Other(forward, a=nn.Linear(N, 24), b=nn.Linear(N, N))
    optimizer = make(net)
    model = DistributedDataParallel(net)
    loss_of(model(share(large_batch(0)))).backward()
    with pytest.raises(ValueError, match="exclude_modules"):
        optimizer.step()


def evaluation_on_one_process(rank: int, world_size: int, folder: Path) -> None:
    net = Net()
    optimizer = make(net)
    if rank == 0:
        with torch.no_grad():
            net(batch(0))
    model = DistributedDataParallel(net)
    loss_of(model(share(large_batch(0)))).backward()
    optimizer.step()
    same_everywhere(net, optimizer)


def a_pass_with_gradients_before_ddp(rank: int, world_size: int, folder: Path) -> None:
    """Such as a sanity check: it must not let DDP take the weights, whose gradients never come."""
    net = Net()
    optimizer = make(net)
    net(batch(rank))
    model = DistributedDataParallel(net)
    for step in range(4):
        loss_of(model(share(large_batch(step)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    same_everywhere(net, optimizer)
    assert distance(net, Net()) > 1e-3


def called_on_one_process_first(rank: int, world_size: int, folder: Path) -> None:
    def forward(layers, x):
        y = layers["a"](x)
        return y + layers["b"](x + 1) if rank == 0 or forward.step else y

    net = Other(forward, a=nn.Linear(N, 24), b=nn.Linear(N, 24))
    optimizer = make(net)
    model = DistributedDataParallel(net, find_unused_parameters=True)
    for forward.step in range(4):
        loss_of(model(share(large_batch(forward.step)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    same_everywhere(net, optimizer)


def join_is_refused(rank: int, world_size: int, folder: Path) -> None:
    net = Net()
    optimizer = make(net)
    model = DistributedDataParallel(net)
    with pytest.raises(ValueError, match="`Join`.*as many batches"), Join([model]):
        loss_of(model(share(large_batch(0)))).backward()
        optimizer.step()


def resumed(rank: int, world_size: int, folder: Path) -> None:
    """By `load_state_dict` and by `torch.distributed.checkpoint`, whose template is made before the first pass."""
    for by_checkpoint in (False, True):
        wrapped: list[nn.Module] = []
        net, optimizer = trained(lambda net: wrapped.append(DistributedDataParallel(net)) or wrapped[0])  # noqa: B023
        saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer) if by_checkpoint else optimizer.state_dict())
        other = Net()
        other.load_state_dict(net.state_dict())
        second = make(other)
        model = DistributedDataParallel(other)
        if by_checkpoint:
            get_optimizer_state_dict(model, second)
            set_optimizer_state_dict(model, second, saved)
        else:
            second.load_state_dict(saved)
        for stepped, trainer in ((wrapped[0], optimizer), (model, second)):
            for step in range(STEPS, STEPS + 3):
                loss_of(stepped(share(large_batch(step)))).backward()
                trainer.step()
                trainer.zero_grad()
        same_everywhere(other, second)
        assert distance(net, other) == 0, (by_checkpoint, distance(net, other))


def bytes_on_the_wire(rank: int, world_size: int, folder: Path) -> None:
    """A step exchanges what the benchmark counts, in the precision of the weights."""
    from ddp_exchange import exchanged_bytes

    for dtype in (torch.float64, torch.bfloat16):
        net = Net().to(dtype)
        optimizer = make(net)
        model = DistributedDataParallel(net)
        seen: list[int] = []
        original = dist.all_reduce

        def counted(X: torch.Tensor, *args, **kwargs):
            seen.append(X.nbytes)  # noqa: B023
            return original(X, *args, **kwargs)  # noqa: B023

        def exchange(group, bucket: dist.GradBucket):
            work = dist.all_reduce(bucket.buffer().div_(world_size), group=group, async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        model.register_comm_hook(None, exchange)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", counted)
            for step in range(3):
                seen.clear()
                loss_of(model(share(large_batch(step)).to(dtype))).backward()
                optimizer.step()
                optimizer.zero_grad()
        # R of three layers, A and ||x||² of two inputs, two biases and a norm
        numbers = 4 * (28 + 28 + 16) + 4 * (N + 28) + 2 + 28 + 16 + 2 * 16
        assert sum(seen) == exchanged_bytes(optimizer, net)[0] == numbers * dtype.itemsize
        same_everywhere(net, optimizer)


SCENARIOS = [as_one_process, int8, conditional, used_otherwise, evaluation_on_one_process]
SCENARIOS += [a_pass_with_gradients_before_ddp, called_on_one_process_first, join_is_refused, resumed]
SCENARIOS += [bytes_on_the_wire]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("activations")
    for number, options in enumerate(OPTIONS):
        torch.save(trained(**options)[0].state_dict(), folder / f"net_{number}.pt")
    torch.save(trained(**INT8)[0].state_dict(), folder / "int8.pt")
    return processes.run(2, SCENARIOS, folder)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(scenario, results):
    assert not results[scenario], results[scenario]
