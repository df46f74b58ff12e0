"""Small sets of P, and whether two of them are the same."""

import torch

from hf_osd.hub import Projection, ProjectionState


def projection(m=6, n=10, rank=3, side="left", dtype=torch.float32, seed=0, **moments):
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(m if side == "left" else n, rank, generator=generator).to(dtype)
    return Projection(P, side, rank, (m, n), moments)


def some_state(seed=0, count=4):
    entries = {f"layers.{i}.weight": projection(side=("left", "right")[i % 2], seed=seed + i) for i in range(count)}
    return ProjectionState(entries, {"weight_rule": "adamw", "lambda": 0.1, "step": seed})


def assert_same(one: ProjectionState, other: ProjectionState):
    assert list(one) == list(other) and one.config == other.config
    for name, entry in one.items():
        got = other[name]
        assert (got.side, got.rank, got.shape, got.holder) == (entry.side, entry.rank, entry.shape, entry.holder)
        assert got.moments.keys() == entry.moments.keys()
        pairs = [(entry.projection, got.projection), *((v, got.moments[k]) for k, v in entry.moments.items())]
        for before, after in pairs:
            assert after.dtype == before.dtype and torch.equal(after, before)
