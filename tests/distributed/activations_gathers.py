"""Scenarios of `source="activations"` with P divided: what is gathered, and when, where passes differ."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from activations_divided import inputs, make_net, make_optimizer
from activations_training import TOLERANCE, make
from sharded_models import assert_same_weights, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from hf_osd import OSD
from hf_osd.layers import wholes


class Region(nn.Module):
    """A block with a checkpoint inside, in which a process may call no layer; k may have the input of other blocks."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.skip = False

    def forward(self, x: Tensor, other: Tensor | None) -> Tensor:
        return x + checkpoint(self.inner, x, x if other is None else other, use_reentrant=False)

    def inner(self, x: Tensor, other: Tensor) -> Tensor:
        return x.tanh() / 2 if self.skip else self.o(self.q(x).tanh() * self.k(other)).tanh()


class Chain(nn.Module):
    """Blocks, whose k may have one input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Region() for _ in range(4)), nn.Linear(24, 6)
        self.crosses = False

    def forward(self, x: Tensor) -> Tensor:
        other = x.square()
        for block in self.blocks:
            x = block(x, other if self.crosses else None)
        return self.head(x)


def make_chains() -> tuple[Chain, Chain, OSD, OSD]:
    """On one process and divided, and their optimizers."""
    torch.manual_seed(0)
    single = Chain().double()
    sharded = copy.deepcopy(single)
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    return single, sharded, *(make(net, target_modules="all-linear", rank=4) for net in (single, sharded))


def recomputed_on_some_processes(rank: int, world: int, folder: Path):
    """A checkpoint is computed once more, and P gathered for it, where some processes call none of its layers."""
    single, sharded, reference, optimizer = make_chains()
    sharded.set_reduce_scatter_unused_params(True)
    for step in range(5):
        for i in range(world):
            single.blocks[1].skip = skip = step >= 2 and i == step % world
            single(inputs(step, i, world).nan_to_num(posinf=1.0)).square().mean().div(world).backward()
            if i == rank:
                sharded.blocks[1].skip = skip
                sharded(inputs(step, i, world).nan_to_num(posinf=1.0).requires_grad_()).square().mean().backward()
        for own in (reference, optimizer):
            own.step()
            own.zero_grad()
    assert_same_weights(sharded, single, TOLERANCE)
    sharded.blocks[0].forward = lambda x, other: x + sharded.blocks[2].q(x)
    with pytest.raises(ValueError, match="divide_projection=False"):  # for no other process may come by
        sharded(inputs(0, rank, world))


def freed_and_gathered_once(rank: int, world: int, folder: Path):
    """A pass gathers once what blocks have in common; nothing is left of one that is broken off, or alone."""
    single, sharded, reference, optimizer = make_chains()
    single.crosses = sharded.crosses = True
    gathered: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        gather = wholes.Gather
        patch.setattr(wholes, "Gather", lambda parts, dtype: gathered.extend(parts) or gather(parts, dtype))
        for step in range(3):
            single(inputs(step, 0, 1)).square().mean().backward()
            gathered.clear()
            loss = sharded(inputs(step, rank, world)).square().mean()
            forward = len(gathered)
            loss.backward()
            for own in (reference, optimizer):
                own.step()
                own.zero_grad()
    assert_same_weights(sharded, single, TOLERANCE)
    assert len(set(optimizer.layers.inputs())) == forward == 9  # of q and o in four blocks, and of k
    assert len(gathered) == 2 * forward  # once more in the backward pass
    units = optimizer.layers.meeting.wholes._units.values()
    for _ in range(2):
        sharded(inputs(0, rank, world))
        assert not any(unit.here for unit in units)
    sharded.blocks[1].o.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sharded(inputs(0, rank, world))
    assert not any(unit.here for unit in units)


def where_autocast_is_off(rank: int, world: int, folder: Path):
    """P is gathered in float32 for blocks that compute in it, although where they are called autocast is on."""
    nets = [make_net(torch.float32) for _ in range(2)]
    before = whole(nets[0].blocks[0].k.weight.detach()).clone()
    for net, way in zip(nets, (True, False), strict=True):
        for block in net.blocks:
            block.forward = torch.autocast("cpu", enabled=False)(block.forward)
        optimizer = make_optimizer(net, divide_projection=way)
        for step in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = net(inputs(step, rank, world).float(), step).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    p, q = (whole(net.blocks[0].k.weight.detach()) for net in nets)
    assert (p - q).norm() < 1e-4 * (p - before).norm()
