"""Stacks (E, m, n) of experts' matrices against E parameters of their own, bit for bit."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_osd import OSD
from hf_osd.optim import predicted_state_bytes, select, state_bytes
from hf_osd.optim.step.experts import ExpertWeights
from hf_osd.update_rules import RULES


EXPERTS, RANK = 3, 48  # moments of 48 x 160 and P of 96 x 48 are both above the 8-bit threshold of 4096
SHAPES = [(96, 160), (160, 96)]
# which experts have tokens at each step: the last one comes late and pauses, all of them rest once
TOKENS = [{0, 1}, {0}, {0, 1, 2}, {1}, set(), {0, 2}, {0, 1, 2}, {1, 2}]


def gradient(step: int, shape: tuple[int, int] = SHAPES[0], dtype: torch.dtype = torch.float32) -> Tensor:
    G = torch.randn(EXPERTS, *shape, generator=torch.Generator().manual_seed(step)) * (1 + step % 3)
    for e in set(range(EXPERTS)) - TOKENS[step % len(TOKENS)]:
        G[e] = 0
    return G.to(dtype)


def weights(shape: tuple[int, int] = SHAPES[0], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(EXPERTS, *shape, generator=torch.Generator().manual_seed(99)).to(dtype))


def make(p: nn.Parameter, **options) -> OSD:
    return OSD([{"params": [("experts", p)], "rank": RANK}], lr=1e-3, **({"weight_decay": 0.1} | options))


def run(p: nn.Parameter, optimizer: OSD, steps: range) -> None:
    for step in steps:
        p.grad = gradient(step, tuple(p.shape[1:]), p.dtype)
        optimizer.step()


def separate(p: nn.Parameter, **options) -> tuple[list[nn.Parameter], OSD]:
    own = [nn.Parameter(W.clone()) for W in p.detach()]
    groups = [{"params": [(str(e), W)], "rank": RANK} for e, W in enumerate(own)]
    return own, OSD(groups, lr=1e-3, **({"weight_decay": 0.1} | options))


def assert_same(p: nn.Parameter, optimizer: OSD, own: list[nn.Parameter], other: OSD) -> None:
    for e, W in enumerate(own):
        assert torch.equal(p[e], W), e
        assert other.state[W].keys() | {"idle_steps"} == optimizer.state[p].keys()
        for name, value in other.state[W].items():
            stacked = optimizer.state[p][name]
            assert stacked.dtype == value.dtype and torch.equal(stacked[e], value), (e, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_equals_separate_parameters_that_have_no_gradient_without_tokens(rule, shape, dtype):
    p = weights(shape, dtype)
    options = {"weight_rule": rule, "projection_sample": 1}  # whose turns go by all steps
    optimizer = make(p, **options)
    own, other = separate(p, **options)
    for step, experts in enumerate(TOKENS):
        G = gradient(step, shape, dtype)
        p.grad = G
        for e, W in enumerate(own):
            W.grad = G[e].clone() if e in experts else None
        optimizer.step(), other.step()
    assert_same(p, optimizer, own, other)


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("restart", [False, True])
def test_svd_is_renewed_by_each_experts_own_count(interval: int, restart: bool):
    options = {"subspace": "svd", "update_interval": interval, "restart_moments": restart}
    p = weights()
    optimizer = make(p, **options)
    own, other = separate(p, **options)
    for step in range(3 * len(TOKENS)):
        if step == len(TOKENS) + 2:  # what the host knows of the counts is read from the state
            saved, optimizer = copy.deepcopy(optimizer.state_dict()), make(p, **options)
            optimizer.load_state_dict(saved)
        G = gradient(step)
        p.grad = G
        for e, W in enumerate(own):
            W.grad = G[e].clone() if G[e].any() else None
        optimizer.step(), other.step()
    assert_same(p, optimizer, own, other)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_gradient_skips_its_expert_and_is_counted(rule: str, bad: float):
    p = weights()
    optimizer = make(p, weight_rule=rule)
    own, other = separate(p, weight_rule=rule)
    for step in range(6):
        G = gradient(2)  # all have tokens
        if step in (0, 3):
            G[1, 5, 7] = bad
        p.grad = G
        for e, W in enumerate(own):
            W.grad = G[e].clone()
        optimizer.step(), other.step()
    assert_same(p, optimizer, own, other)
    assert optimizer.statistics()["skipped_steps"] == 2


@pytest.mark.parametrize("saved_at", [2, 4, 5])
def test_stochastic_rounding_continues_bit_for_bit(saved_at: int):
    p = weights(dtype=torch.bfloat16)
    optimizer = make(p, stochastic_rounding=True)
    run(p, optimizer, range(saved_at))
    saved, before = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    run(p, optimizer, range(saved_at, 10))
    q = nn.Parameter(before)
    other = make(q, stochastic_rounding=True)
    other.load_state_dict(saved)
    run(q, other, range(saved_at, 10))
    assert torch.equal(p, q)
    idle = [sum(e not in TOKENS[step % len(TOKENS)] for step in range(10)) for e in range(EXPERTS)]
    assert optimizer.state[p]["idle_steps"].tolist() == idle


def test_an_expert_without_tokens_is_neither_counted_nor_observed():
    p = weights()
    optimizer = make(p)
    own, other = separate(p)
    optimizer.collect_statistics = other.collect_statistics = True
    run(p, optimizer, range(2))
    for step in range(2):
        for e, W in enumerate(own):
            W.grad = gradient(step)[e] if e in TOKENS[step] else None
        other.step()
    seen, expected = optimizer.statistics(), other.statistics()
    assert seen["skipped_steps"] == 0
    assert seen["pca_loss"] == pytest.approx(expected["pca_loss"], rel=1e-6)
    run(p, optimizer, range(4, 5))  # nobody has tokens
    assert optimizer.statistics()["skipped_steps"] == 0


@pytest.mark.parametrize("rule", RULES)
def test_continues_bit_for_bit_and_refuses_what_does_not_fit(rule: str):
    p = weights(dtype=torch.bfloat16)
    optimizer = make(p, weight_rule=rule)
    run(p, optimizer, range(2))  # the last expert has not started yet
    saved, before = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    run(p, optimizer, range(2, 8))
    q = nn.Parameter(before)
    other = make(q, weight_rule=rule)
    other.load_state_dict(saved)
    run(q, other, range(2, 8))
    assert torch.equal(p, q)
    assert all(torch.equal(value, other.state[q][name]) for name, value in optimizer.state[p].items())
    saved["state"][0]["projection"] = saved["state"][0]["projection"][:-1]
    with pytest.raises(ValueError, match="experts does not fit"):
        make(q, weight_rule=rule).load_state_dict(saved)


def test_distributed_checkpoint_continues_bit_for_bit():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = weights()

    model = Model()
    optimizer = make(model.experts)
    run(model.experts, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    resumed = copy.deepcopy(model)
    resumed.zero_grad()
    other = make(resumed.experts)
    set_optimizer_state_dict(resumed, other, saved)
    for one, its in ((model, optimizer), (resumed, other)):
        run(one.experts, its, range(3, 6))
    assert torch.equal(model.experts, resumed.experts)


@pytest.mark.parametrize("rule", RULES)
def test_declared_bytes_are_measured_bytes(rule: str):
    p = weights()
    optimizer = make(p, weight_rule=rule)
    declared = predicted_state_bytes(optimizer)
    run(p, optimizer, range(3))
    one = predicted_state_bytes(separate(p[:1], weight_rule=rule)[1])
    assert declared == state_bytes(optimizer) == EXPERTS * (one + 4)  # and `idle_steps`


def test_given_projections_and_those_that_are_not_there_yet():
    P = torch.linalg.qr(torch.randn(EXPERTS, 96, RANK)).Q
    P[2] = 0  # what a saved state has for an expert that had no tokens
    p = weights()
    optimizer = OSD([{"params": [p], "rank": RANK, "init": [P]}], subspace="static")
    run(p, optimizer, range(2))
    assert torch.equal(optimizer.state[p]["projection"], P)
    p.grad = gradient(2)
    optimizer.step()
    started = optimizer.state[p]["projection"]
    assert torch.equal(started[:2], P[:2])
    torch.testing.assert_close(started[2], torch.linalg.svd(p.grad[2], full_matrices=False)[0][:, :RANK])
    assert not optimizer._given_projections
    with pytest.raises(ValueError, match=r"shape \(3, 96, 48\), got shape \(96, 48\)"):
        OSD([{"params": [p], "rank": RANK, "init": [P[0]]}])


def test_random_starts_differ_between_experts():
    p = weights()
    optimizer = make(p, init="orthonormal", subspace="static")
    run(p, optimizer, range(2, 3))
    weight, P = optimizer.weight_of(p), optimizer.state[p]["projection"]
    assert isinstance(weight, ExpertWeights) and weight.geometry.projection_shape == (96, RANK)
    assert weight.geometry.matrices == EXPERTS
    torch.testing.assert_close(P.mT @ P, torch.eye(RANK).expand(EXPERTS, -1, -1), atol=1e-5, rtol=0)
    assert not torch.allclose(P[0], P[1]) and not torch.allclose(P[1], P[2])


def test_nothing_is_read_back_once_all_have_started(monkeypatch):
    p = weights()
    optimizer = make(p)
    run(p, optimizer, range(3))

    def refuse(*_, **__):
        raise AssertionError("a value was read from the device")

    for name in ("__bool__", "__int__", "__float__", "item", "tolist"):
        monkeypatch.setattr(Tensor, name, refuse)
    for step in range(3, len(TOKENS)):  # some have no tokens
        p.grad = gradient(step)
        optimizer.step()


def test_a_full_rank_warns_with_the_size_of_one_matrix():
    with pytest.warns(UserWarning, match="not below min.* for 1 matrices"):
        OSD([{"params": [nn.Parameter(torch.randn(20, 8, 12))], "rank": 8}])


@pytest.mark.parametrize("ending", ["Experts", "NaiveMoe"])
def test_stacks_are_found_in_classes_of_every_release(ending: str):
    kind = type(f"Some{ending}", (nn.Module,), {})
    model = nn.Module()
    model.layers = nn.ModuleList([kind()])
    model.layers[0].gate_up_proj = nn.Parameter(torch.randn(3, 12, 20))
    assert list(select(model).projected) == ["layers.0.gate_up_proj"]
