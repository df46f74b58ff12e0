"""What a step does to state and weights, besides being right."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_osd import OSD
from hf_osd.optim import predicted_state_bytes, state_bytes
from hf_osd.optim.osd import osd_of
from hf_osd.optim.step.geometry import ProjectedGeometry
from hf_osd.update_rules import RULES


SHAPE, RANK = (96, 160), 48  # moments of 48 x 160 and P of 96 x 48 are both above the 8-bit threshold of 4096


def make(rule: str = "adamw", dtype: torch.dtype = torch.float32, **options) -> tuple[nn.Parameter, nn.Parameter, OSD]:
    W, b = nn.Parameter(torch.randn(SHAPE).to(dtype)), nn.Parameter(torch.randn(160).to(dtype))
    groups = [{"params": [("W", W)], "rank": RANK}, {"params": [("b", b)]}]
    return W, b, OSD(groups, lr=1e-3, weight_rule=rule, **options)


def give_gradients(*params: nn.Parameter, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(W: nn.Parameter, b: nn.Parameter, optimizer: OSD, steps: range) -> None:
    for step in steps:
        give_gradients(W, b, seed=step)
        optimizer.step()


def same_state(a: OSD, b: OSD) -> bool:
    left, right = a.state_dict()["state"], b.state_dict()["state"]
    return left.keys() == right.keys() and all(
        left[i].keys() == right[i].keys()
        and all(left[i][k].dtype == right[i][k].dtype and torch.equal(left[i][k], right[i][k]) for k in left[i])
        for i in left
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_continues_bit_for_bit_from_a_state_dict(rule: str, dtype: torch.dtype):
    W, b, optimizer = make(rule, dtype)
    run(W, b, optimizer, range(4))
    saved, weights = copy.deepcopy(optimizer.state_dict()), (W.detach().clone(), b.detach().clone())
    run(W, b, optimizer, range(4, 8))
    W2, b2, other = make(rule, dtype)
    with torch.no_grad():
        W2.copy_(weights[0]), b2.copy_(weights[1])
    other.load_state_dict(saved)
    before = {k: v.clone() for k, v in saved["state"][0].items()}
    run(W2, b2, other, range(4, 8))
    assert torch.equal(W, W2) and torch.equal(b, b2) and same_state(optimizer, other)
    assert all(torch.equal(before[k], saved["state"][0][k]) for k in before)  # the loaded dict is not stepped


@pytest.mark.parametrize("rule", RULES)
def test_float32_projection_and_codes_survive_bfloat16_weights(rule: str):
    W, b, optimizer = make(rule, torch.bfloat16)
    run(W, b, optimizer, range(2))
    other = make(rule, torch.bfloat16)[2]
    other.load_state_dict(optimizer.state_dict())
    dtypes = {name: value.dtype for name, value in next(iter(other.state.values())).items()}
    assert dtypes["projection"] == torch.float32 and torch.bfloat16 not in dtypes.values()
    if RULES[rule].eight_bit:
        assert dtypes["exp_avg"] == dtypes["projection_exp_avg"] == torch.uint8


@pytest.mark.parametrize("rule", RULES)
def test_deepcopy_and_pickle_continue_alike(rule: str):
    W, b, optimizer = make(rule)
    run(W, b, optimizer, range(3))
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    run(W, b, optimizer, range(3, 5))
    for other in copies:
        W2, b2 = (group["params"][0] for group in other.param_groups)
        run(W2, b2, other, range(3, 5))
        assert torch.equal(W, W2) and torch.equal(b, b2) and same_state(optimizer, other)


def test_given_projections_survive_a_copy_made_before_the_first_step():
    P = torch.linalg.qr(torch.randn(96, RANK)).Q
    W = nn.Parameter(torch.randn(SHAPE))
    optimizer = OSD([{"params": [W], "rank": RANK, "init": [P]}], subspace="static")
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (W2,) = other.param_groups[0]["params"]
        give_gradients(W2)
        other.step()
        assert torch.equal(other.state[W2]["projection"], P)
        assert not other._given_projections  # P is in the state now, and only there


@pytest.mark.parametrize("rule", RULES)
def test_state_is_flat_tensors_and_groups_are_primitives(rule: str, tmp_path):
    W, b, optimizer = make(rule)
    run(W, b, optimizer, range(2))
    state_dict = optimizer.state_dict()
    assert all(isinstance(v, torch.Tensor) for entries in state_dict["state"].values() for v in entries.values())
    torch.save(state_dict, tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)  # as transformers loads it
    other = make(rule)[2]
    other.load_state_dict(loaded)
    assert same_state(optimizer, other)


@pytest.mark.parametrize("rule", RULES)
def test_declared_bytes_are_measured_bytes(rule: str):
    W, b, optimizer = make(rule)
    assert state_bytes(optimizer) == 0  # nothing before the first step
    declared = predicted_state_bytes(optimizer)
    run(W, b, optimizer, range(2))
    assert state_bytes(optimizer) == declared


@pytest.mark.parametrize("shape", [SHAPE, (3, *SHAPE)])
def test_a_random_p_is_counted_though_its_seed_is_all_that_is_saved(shape: tuple[int, ...]):
    held = {}
    for subspace in ("svd", "random"):
        W = nn.Parameter(torch.randn(shape))
        optimizer = OSD([{"params": [W], "rank": RANK}], subspace=subspace)
        declared = predicted_state_bytes(optimizer)
        W.grad = torch.randn(shape)
        optimizer.step()
        held[subspace] = state_bytes(optimizer)
        assert held[subspace] == declared
    assert held["random"] == held["svd"] + 8 * (shape[0] if len(shape) == 3 else 1)


def test_bytes_follow_the_formula():
    """For s = min(m, n): two moments of r x max(m, n), P of s x r and its two moments, and counters."""
    (m, n), r = SHAPE, RANK
    elements = 2 * r * n + 3 * m * r
    counters = 3 * 4  # step, skipped_steps, projection_step
    blocks = 2 * -(-r * n // 256) + 2 * -(-m * r // 256)
    expected = {
        "adamw": 4 * elements + counters,
        "adamw8bit": 2 * r * n + (4 + 2) * m * r + 4 * blocks + counters,
        "lion": 4 * (r * n + 2 * m * r) + counters,
    }
    for rule, size in expected.items():
        for shape in (SHAPE, SHAPE[::-1]):
            optimizer = OSD([{"params": [nn.Parameter(torch.zeros(shape))], "rank": RANK}], weight_rule=rule)
            assert predicted_state_bytes(optimizer) == size
    bf16 = {"projection_dtype": "bfloat16", "moment_dtype": "bfloat16"}
    optimizer = OSD([{"params": [nn.Parameter(torch.zeros(SHAPE))], "rank": RANK}], **bf16)
    assert (
        predicted_state_bytes(optimizer) == 2 * (r * n + m * r) + 4 * (r * n + 2 * m * r) + counters
    )  # second moments stay wide


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_gradient_changes_nothing(rule: str, bad: float):
    W, b, optimizer = make(rule, weight_decay=0.1)
    run(W, b, optimizer, range(3))
    before = copy.deepcopy((optimizer.state_dict()["state"], W.detach(), b.detach()))
    give_gradients(W, b, seed=7)
    W.grad[5, 7] = bad
    b.grad[3] = bad
    optimizer.step()
    after = (optimizer.state_dict()["state"], W.detach(), b.detach())
    for index, entries in before[0].items():
        for name, value in entries.items():
            assert torch.equal(value, after[0][index][name]) != (name == "skipped_steps"), name
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])
    assert optimizer.statistics()["skipped_steps"] == 2
    run(W, b, optimizer, range(8, 10))
    assert W.isfinite().all() and b.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_the_first_gradients_may_be_broken_or_zero(rule: str):
    W, b, optimizer = make(rule)
    start = W.detach().clone()
    give_gradients(W, b)
    W.grad.fill_(float("nan"))
    optimizer.step()
    W.grad = torch.zeros_like(W)
    optimizer.step()
    assert torch.equal(W, start) and float(optimizer.state[W]["step"]) == 0
    run(W, b, optimizer, range(2))
    assert not torch.equal(W, start) and optimizer.state[W]["projection"].isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_gradient_leaves_p_finite(rule: str):
    W, b, optimizer = make(rule)
    run(W, b, optimizer, range(2))
    W.grad = torch.zeros_like(W)
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[W]["projection"].isfinite().all() and W.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_dtype_shape_and_gradient_are_preserved(rule: str):
    for dtype in (torch.float32, torch.bfloat16):
        W, b, optimizer = make(rule, dtype)
        for step in range(3):
            give_gradients(W, b, seed=step)
            gradient = W.grad.clone()
            optimizer.step()
            assert torch.equal(W.grad, gradient) and W.dtype == dtype and W.shape == SHAPE


def test_a_parameter_without_gradient_stays_inert():
    W, b, optimizer = make()
    give_gradients(b)
    optimizer.step()
    assert W not in optimizer.state
    assert not any(value.any() for value in optimizer.state_dict()["state"][0].values())


def test_loading_a_state_that_does_not_fit_changes_nothing():
    W, b, optimizer = make()
    run(W, b, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["projection"] = saved["state"][0]["projection"][:, :-1]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="W does not fit"):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(before["state"][0][k], optimizer.state[W][k]) for k in before["state"][0])


def test_closure_and_add_param_group():
    W, b, optimizer = make()
    X = torch.randn(8, 96)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (X @ W + b).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    V = nn.Parameter(torch.randn(30, 20))
    optimizer.add_param_group({"params": [("V", V)], "rank": 6, "lr": 1e-2, "side": "right"})
    give_gradients(V)
    optimizer.step()
    geometry = optimizer.weight_of(V).geometry
    assert isinstance(geometry, ProjectedGeometry) and geometry.side == "right" and geometry.name == "V"
    assert optimizer.state[V]["projection"].shape == (20, 6)


def test_an_optimizer_is_found_inside_accelerates_wrapper():
    p = nn.Parameter(torch.zeros(4))
    osd, other = OSD([p]), torch.optim.SGD([p])
    wrapped, other_wrapped = Accelerator(cpu=True).prepare(osd, other)
    assert osd_of(osd) is osd_of(wrapped) is osd and wrapped is not osd
    assert osd_of(other) is osd_of(other_wrapped) is osd_of(None) is None
