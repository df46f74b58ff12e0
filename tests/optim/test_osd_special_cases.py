"""Settings in which OSD must equal something else."""

import pytest
import torch
from galore_torch import GaLoreAdamW
from torch import nn

from hf_osd import OSD, create_osd_optimizer
from hf_osd.hub import ProjectionState
from hf_osd.update_rules import RULES


@pytest.mark.filterwarnings("ignore:.rank. is not below min")
@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
@pytest.mark.parametrize("rule", RULES)
def test_with_the_identity_as_projection_every_rule_is_its_base(rule: str, shape: tuple[int, int]):
    W0 = torch.randn(shape)
    projected, full = nn.Parameter(W0.clone()), nn.Parameter(W0.clone())
    group = {"params": [projected], "rank": min(shape), "init": [torch.eye(min(shape))]}
    a = OSD([group], lr=1e-3, weight_rule=rule, subspace="static", weight_decay=0.1)
    b = OSD([full], lr=1e-3, weight_rule=rule, weight_decay=0.1)
    for _ in range(20):
        projected.grad = torch.randn(shape)
        full.grad = projected.grad.clone()
        a.step(), b.step()
    # products with the identity are exact; the order of the last additions differs, and W - lr weight_decay W is not
    # rounded like (1 - lr weight_decay) W, by 3e-8 of entries up to 4 at each step
    torch.testing.assert_close(projected, full, rtol=0, atol=4e-6)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_subspace_svd_is_galore(shape: tuple[int, int]):
    """Against galore-torch over three refreshes of P, with a learning rate schedule and weight decay."""
    W0 = torch.randn(shape)
    ours, theirs = nn.Parameter(W0.clone()), nn.Parameter(W0.clone())
    a = OSD([{"params": [ours], "rank": 4}], lr=1e-2, subspace="svd", update_interval=7, scale=0.25, eps=1e-12)
    group = {"params": [theirs], "rank": 4, "update_proj_gap": 7, "scale": 0.25, "proj_type": "std"}
    b = GaLoreAdamW([group], lr=1e-2, betas=(0.9, 0.999), eps=1e-12, no_deprecation_warning=True)
    for t in range(20):
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - t / 40)
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    # rounding of float32; galore-torch adds eps to the uncorrected root of the second moment, hence an eps of nearly 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_refresh_happens_at_multiples_of_the_interval_only():
    W = nn.Parameter(torch.randn(12, 30))
    optimizer = OSD([{"params": [W], "rank": 4}], subspace="svd", update_interval=5)
    changed, last = [], None
    for t in range(12):
        W.grad = torch.randn(12, 30)
        optimizer.step()
        P = optimizer.state[W]["projection"].clone()
        if last is not None and not torch.equal(P, last):
            changed.append(t)
        last = P
    assert changed == [5, 10]


def test_refresh_keeps_its_rhythm_after_loading():
    torch.manual_seed(3)
    stream = [torch.randn(12, 30) for _ in range(12)]

    def run(reload_at: int | None) -> torch.Tensor:
        W = nn.Parameter(torch.zeros(12, 30))
        optimizer = OSD([{"params": [W], "rank": 4}], subspace="svd", update_interval=5)
        for t, G in enumerate(stream):
            if t == reload_at:
                fresh = OSD([{"params": [W], "rank": 4}], subspace="svd", update_interval=5)
                fresh.load_state_dict(optimizer.state_dict())
                optimizer = fresh
            W.grad = G if t != 3 else G * float("nan")  # skipped steps count for the rhythm
            optimizer.step()
        return W.detach()

    assert torch.equal(run(None), run(7))


def test_nothing_of_the_size_of_the_weight_is_allocated():
    """The largest allocation in a step is smaller than the weight (P, R and what is r x r are not)."""
    from torch.profiler import ProfilerActivity, profile

    m, n, r = 256, 512, 8
    W = nn.Parameter(torch.randn(m, n))
    W.grad = torch.randn(m, n)
    optimizer = OSD([{"params": [W], "rank": r}], weight_decay=0.1)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert 0 < largest <= 4 * 2 * r * n  # two of R's size at once in one operator, 32 times below W's 4 m n


def test_no_autograd_and_no_reading_back_in_a_step(monkeypatch: pytest.MonkeyPatch):
    W = nn.Parameter(torch.randn(24, 40))
    b = nn.Parameter(torch.randn(40))
    optimizer = OSD([{"params": [W], "rank": 4}, {"params": [b]}], weight_decay=0.1)

    def step() -> None:
        W.grad, b.grad = torch.randn(24, 40), torch.randn(40)
        optimizer.step()

    step()

    def read_back(*_):
        raise AssertionError("a step read a tensor back to the host")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, read_back)
    monkeypatch.setattr(torch.autograd, "grad", read_back)
    step()
    assert not optimizer.state[W]["projection"].requires_grad


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_moments_are_carried_where_p_moves_by_its_momentum_alone(shape: tuple[int, int]):
    """P's optimizer moves it in a step with a gradient of zero as well, and the moments must follow."""
    W = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = OSD([W], lr=1e-2, rank=4, carry_moments=True)
    for _ in range(3):
        W.grad = torch.randn(shape, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[W]
    P, M = state["projection"].clone(), state["exp_avg"].clone()
    W.grad = torch.zeros_like(W)
    optimizer.step()
    turn = state["projection"].T @ P @ torch.linalg.inv(P.T @ P)
    assert not torch.equal(state["projection"], P)
    expected = 0.9 * (turn @ M if shape[0] < shape[1] else M @ turn.T)
    torch.testing.assert_close(state["exp_avg"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((30, 12), {}),
        ((12, 30), {}),
        ((12, 30), {"side": "two_sided", "init": "orthonormal"}),
        ((3, 30, 12), {"weight_rule": "lion"}),
        ((120, 80), {"residual": "sign", "residual_scale": 0.5}),
    ],
    ids=["right", "left", "two_sided", "experts", "sign"],
)
def test_with_scale_auto_first_updates_have_the_size_of_adamws(shape: tuple[int, ...], options: dict, tmp_path):
    W = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    before, lr = W.detach().clone(), 1e-3
    optimizer = OSD([{"params": [("W", W)], "rank": 5}], lr=lr, scale="auto", **options)
    W.grad = torch.randn_like(W)
    optimizer.step()
    size = ((W - before) / lr).square().mean(dim=(-2, -1)).sqrt()
    signs = options.get("residual_scale", 0)  # all but orthogonal to the inside
    expected, rtol = torch.full_like(size, (1 + signs**2) ** 0.5), 0.02 if signs else 1e-5
    torch.testing.assert_close(size, expected, rtol=rtol, atol=0)  # eps, and P's own orthogonality
    ProjectionState.from_optimizer(optimizer).save_pretrained(tmp_path)
    assert ProjectionState.from_pretrained(tmp_path).config["scale"] == "auto"


def test_scale_auto_reaches_layers_and_goes_by_the_rank_that_there_is():
    net = nn.Sequential(nn.Linear(20, 8, bias=False), nn.Linear(8, 3, bias=False)).double()
    with pytest.warns(UserWarning, match="not below min"):
        optimizer = create_osd_optimizer(
            net, rank=6, lr=0.01, target_modules=["0", "1"], scale="auto", source="activations"
        )
    for _ in range(2):  # the first step starts P
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.zero_grad()
        net(torch.randn(16, 20, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(((p - old) / 0.01).square().mean().sqrt().item(), 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("subspace", "steps"), [("online_pca", 1), ("svd", 3)])
def test_two_sided_steps_from_fresh_singular_vectors_do_not_hang_on_rounding(subspace: str, steps: int):
    """R is diagonal then: what AdamW makes of the sign of its rounding is no part of the step."""
    Gs, W0 = [torch.randn(24, 40) for _ in range(steps)], torch.randn(24, 40)
    further = {"update_interval": 2, "restart_moments": True} if subspace == "svd" else {}
    ends = []
    for error in (0.0, 1e-6):
        W = nn.Parameter(W0.clone())
        optimizer = OSD([W], lr=1e-2, rank=6, side="two_sided", subspace=subspace, **further)
        for G in Gs:
            W.grad = G * (1 + error * torch.randn_like(G))
            optimizer.step()
        ends.append(W.detach() - W0)
    assert torch.cosine_similarity(ends[0].flatten(), ends[1].flatten(), dim=0) > 0.999


def test_a_projected_matrix_of_another_shape_is_refused():
    W = nn.Parameter(torch.randn(40, 64))
    optimizer = OSD([W], lr=1e-3, rank=8)
    W.grad = torch.randn(40, 64)
    optimizer.step()
    W.grad, W.data = None, torch.randn(48, 64)
    W.grad = torch.randn(48, 64)
    with pytest.raises(ValueError, match=r"has become \(48, 64\), and its state is of \(40, 64\)"):
        optimizer.step()
