"""A stack of experts, whole and divided among processes, that is given the same gradients."""

import math
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from sharded_models import whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hf_osd import OSD
from hf_osd.optim import predicted_state_bytes, state_bytes


ADAFACTOR = {"weight_rule": "adafactor", "projection_sample": 1}
STEPS, RANK, SHAPE = 9, 8, (20, 36)
SAVED_EXPERTS, SAVED = 5, ("adamw", "eight_bit", "restart", "random", "power")
ROWS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sample": {"projection_sample": 2},
    "adafactor": ADAFACTOR,
    "lion": {"weight_rule": "lion", "projection_rule": "adamw"},
    "svd": {"subspace": "svd", "update_interval": 2},
    "restart": {"subspace": "svd", "update_interval": 2, "restart_moments": True},
    "random": {"subspace": "random", "update_interval": 3},
    "cosine": {"subspace": "cosine", "update_interval": 3, "carry_moments": True},
    "power": {"subspace": "power", "residual": "scaled"},
    "sign": {"residual": "sign", "residual_scale": 0.1},
    "left": {"side": "left", "init": "orthonormal"},
    "right": {"side": "right", "init": "randomized_svd"},
    "two_sided": {"side": "two_sided", "residual": "scaled"},
    "rounding": {"stochastic_rounding": True, "dtype": torch.bfloat16},
    "eight_bit": {"weight_rule": "adamw8bit", "shape": (96, 160), "rank": 48},
}


def gradient(step: int, experts: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Experts have tokens in turn, the last one comes late, none has any at one step; one is broken at another."""
    G = torch.randn(experts, *shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    for e in range(experts):
        if step == 4 or (e + step) % 4 == 0 or (e == experts - 1 and step < 2):
            G[e] = 0
    if step == 6:
        G[experts // 2, 3, 5] = float("nan")
    return G.to(dtype)


def make(p: Tensor, rank: int = RANK, **options: Any) -> OSD:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return OSD([{"params": [("experts", p)], "rank": rank}], **{"lr": 1e-2, "weight_decay": 0.1, **options})


def seen(optimizer: OSD) -> dict[str, float]:
    return {name: value for name, value in optimizer.statistics().items() if not math.isnan(value)}


def sharded(X: Tensor, mesh: DeviceMesh, placements: list) -> Any:
    return distribute_tensor(X, mesh, placements, src_data_rank=None)


def assert_same(own: Any, optimizer: OSD, single: Tensor, reference: OSD, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(own.full_tensor(), single.detach(), rtol=0, atol=tolerance)
    for name, value in reference.state[single].items():
        torch.testing.assert_close(whole(optimizer.state[own][name]), value, rtol=1e-6, atol=1e-7)


def compare(
    experts: int, mesh: DeviceMesh, placements: list, exchanges: int | None = None, exact: bool = True, **options: Any
) -> None:
    """Train whole and divided experts with the same gradients, and count a step's exchanges."""
    shape, dtype = options.pop("shape", SHAPE), options.pop("dtype", torch.float32)
    W = torch.randn(experts, *shape, generator=torch.Generator().manual_seed(99)).to(dtype)
    single, own = nn.Parameter(W.clone()), nn.Parameter(sharded(W, mesh, placements))
    reference, optimizer = make(single, **options), make(own, **options)
    assert optimizer.param_groups[0]["sides"] == reference.param_groups[0]["sides"]
    for step in range(STEPS):
        optimizer.collect_statistics = reference.collect_statistics = step % 2 == 0
        single.grad = gradient(step, experts, shape, dtype)
        own.grad = sharded(single.grad, mesh, placements)
        with CommDebugMode() if step == 7 and exchanges is not None else nullcontext() as counts:
            optimizer.step()
        reference.step()
        assert counts is None or counts.get_total_counts() == exchanges, counts.get_comm_counts()
        if step % 2 == 0:
            assert seen(optimizer) == pytest.approx(seen(reference), rel=1e-4, abs=1e-6)
    assert predicted_state_bytes(optimizer) == state_bytes(optimizer)
    if not exact:  # A is summed
        assert_same(own, optimizer, single, reference)
        return
    assert torch.equal(own.full_tensor(), single)
    here = len(optimizer.weight_of(own).geometry.experts)
    assert state_bytes(optimizer) * experts == state_bytes(reference) * here
    for name, value in reference.state[single].items():
        if name != "projection_overdue":
            assert torch.equal(optimizer.state[own][name].full_tensor(), value), name


class Stack(nn.Module):
    """A model that is a stack."""

    def __init__(self, mesh: DeviceMesh | None, dtype: torch.dtype = torch.float32, shape: tuple = SHAPE) -> None:
        super().__init__()
        W = torch.randn(SAVED_EXPERTS, *shape, generator=torch.Generator().manual_seed(99)).to(dtype)
        self.experts = nn.Parameter(W if mesh is None else sharded(W, mesh, [Shard(0)]))

    def train_on(self, optimizer: OSD, steps: range) -> None:
        p: Any = self.experts
        for step in steps:
            p.grad = gradient(step, *p.shape[:1], tuple(p.shape[1:]), p.dtype)
            if isinstance(p, DTensor):
                p.grad = sharded(p.grad, p.device_mesh, list(p.placements))
            optimizer.step()


def made(name: str, mesh: DeviceMesh | None) -> tuple[Stack, OSD]:
    options = dict(ROWS[name])
    model = Stack(mesh, **{key: options.pop(key) for key in ("dtype", "shape") if key in options})
    return model, make(model.experts, **options)
