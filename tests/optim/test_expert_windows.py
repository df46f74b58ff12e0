"""Stacks of experts' matrices over several micro-batches in a step, of which each expert has tokens in some."""

import copy

import pytest
import torch
from torch import nn

from hf_osd import OSD


EXPERTS, MICRO, STEPS = 4, 2, 24
RULES = [
    {"subspace": "svd", "update_interval": 4},
    {"subspace": "random", "update_interval": 3},
    {"projection_interval": 3},
    {"subspace": "static"},
    {},
]


def micro_batches(step: int) -> list[torch.Tensor]:
    """Gradients of which each expert has none half of the time, by itself or in the whole step."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for _ in range(MICRO):
        G = torch.randn(EXPERTS, 6, 10, generator=generator, dtype=torch.float64)
        G[torch.rand(EXPERTS, generator=generator) < 0.5] = 0
        found.append(G)
    return found


def make(layerwise: bool, **options) -> tuple[nn.Parameter, OSD]:
    W = torch.randn(EXPERTS, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mode = {"layerwise": True, "gradient_accumulation": True} if layerwise else {}
    p = nn.Parameter(W)
    return p, OSD([p], rank=2, lr=1e-2, **mode, **options)


def run(p: nn.Parameter, optimizer: OSD, steps: range) -> list[torch.Tensor]:
    """Whether P of each expert, or the seed that it is drawn from, has changed, by step."""
    moved = []
    for step in steps:
        before = {key: value.clone() for key, value in optimizer.state[p].items()}
        for G in micro_batches(step):
            p.backward(G)
        optimizer.step()
        optimizer.zero_grad()
        key = next(key for key in ("projection", "projection_seed") if key in optimizer.state[p])
        after = optimizer.state[p][key].reshape(EXPERTS, -1)
        old = before[key].reshape(EXPERTS, -1) if before else torch.zeros_like(after)
        moved.append((after != old).any(1))
    return moved


@pytest.mark.parametrize("options", RULES, ids=str)
def test_p_moves_at_the_steps_of_the_ordinary_mode(options: dict):
    """An expert without tokens in one micro-batch may have some in the next."""
    ordinary, layerwise = (torch.stack(run(*make(mode, **options), range(STEPS))) for mode in (False, True))
    assert ordinary.any(0).all() and torch.equal(ordinary, layerwise)


@pytest.mark.parametrize(
    "options", [{"subspace": "random", "update_interval": 3}, {"subspace": "static", "init": "orthonormal"}], ids=str
)
def test_the_weights_are_those_of_the_ordinary_mode_where_p_asks_no_gradient(options: dict):
    (p, ordinary), (q, layerwise) = (make(mode, **options) for mode in (False, True))
    run(p, ordinary, range(STEPS))
    run(q, layerwise, range(STEPS))
    assert torch.allclose(p, q, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("at", [1, 5, 6, 7])
def test_resuming_is_exact(at: int, options: dict):
    p, whole = make(True, **options)
    run(p, whole, range(12))
    q, first = make(True, **options)
    run(q, first, range(at))
    saved = copy.deepcopy(first.state_dict())
    first.remove()
    second = OSD([q], rank=2, lr=1e-2, layerwise=True, gradient_accumulation=True, **options)
    second.load_state_dict(saved)
    run(q, second, range(at, 12))
    assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("clipping", ["parameter", "previous_norm"])
@pytest.mark.parametrize("accumulation", [False, True])
def test_a_broken_expert_spoils_no_other_where_gradients_are_clipped(accumulation: bool, clipping: str, bad: float):
    p = nn.Parameter(torch.randn(EXPERTS, 6, 10))
    options = {"layerwise_clipping": clipping, "gradient_accumulation": accumulation}
    optimizer = OSD([p], rank=2, lr=1e-2, layerwise=True, max_grad_norm=1.0, **options)
    for step in range(3):  # already in the first: there is no norm of a step before then
        G, before = torch.randn(EXPERTS, 6, 10), p.detach().clone()
        G[2, 0, 0] = bad
        p.backward(G)
        optimizer.step()
        changed = (p != before).flatten(1).any(1)
        assert p.isfinite().all() and changed.tolist() == [True, True, False, True], step
    assert optimizer.state[p]["skipped_steps"].tolist() == [0, 0, 3, 0]


def test_p_made_in_a_step_that_was_skipped_in_the_end_is_the_same_after_a_resume():
    first, second = torch.randn(6, 10), torch.full((6, 10), torch.nan)

    def train(resumed: bool) -> torch.Tensor:
        p = nn.Parameter(torch.ones(6, 10))
        options = {"rank": 2, "lr": 1e-2, "layerwise": True, "gradient_accumulation": True}
        optimizer = OSD([p], **options)
        for step, gradients in enumerate([(first, second), *((-first, G) for G in torch.eye(60).view(60, 6, 10)[:3])]):
            for G in gradients:
                p.backward(G)
            optimizer.step()
            optimizer.zero_grad()
            if resumed and step == 0:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer.remove()
                optimizer = OSD([p], **options)
                optimizer.load_state_dict(saved)
        return p.detach()

    assert torch.equal(train(False), train(True))
