"""Layerwise mode in loops of one's own: the same steps as the ordinary mode's, whatever the graph."""

import copy

import pytest
import torch
from layerwise_nets import Net, assert_equal, inputs, optimizer_of, pair, train
from torch import nn

from hf_osd import OSD


@pytest.mark.parametrize("given", [{}, {"reentrant": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_and_weights_used_twice_are_stepped_once(dtype: torch.dtype, given: dict):
    assert_equal(*pair(dtype=dtype, given=given))


def test_stochastic_rounding_draws_the_same():
    assert_equal(*pair(dtype=torch.bfloat16, stochastic_rounding=True))


def test_reentrant_checkpoints_of_a_shared_weight_are_refused_and_work_with_accumulation():
    model = Net()
    optimizer = optimizer_of(model, layerwise=True)
    with pytest.raises(ValueError, match=r"arrived twice before `step\(\)`.*gradient_accumulation=True"):
        train(model, optimizer, range(1), reentrant=True)
    ordinary, layerwise = Net(), Net()
    fixed = {"subspace": "static", "init": "orthonormal"}
    train(ordinary, optimizer_of(ordinary, "osd_sgd", **fixed), range(3), reentrant=True)
    own = optimizer_of(layerwise, "osd_sgd_layerwise", gradient_accumulation=True, **fixed)
    train(layerwise, own, range(3), reentrant=True)
    assert_equal(ordinary, layerwise, atol=1e-6)  # sums in another order, of steps of 1e-2


def test_autocast():
    models = Net(), Net()
    for model, layerwise in zip(models, (False, True), strict=True):
        optimizer = optimizer_of(model, layerwise=layerwise)
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(inputs(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(*models)


def test_compiled_models():
    models = Net(), Net()
    for model, layerwise in zip(models, (False, True), strict=True):
        optimizer = optimizer_of(model, layerwise=layerwise)
        train(torch.compile(model, backend="aot_eager"), optimizer, range(3))
    assert_equal(*models)


def test_gradients_are_gone_as_soon_as_they_are_used():
    model = Net()
    optimizer = optimizer_of(model, layerwise=True)
    model(inputs(0)).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {1}
    optimizer.step()  # without a gradient nothing happens
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {1}


@pytest.mark.parametrize("clipping", ["parameter", "previous_norm"])
def test_clipping_against_torch(clipping: str):
    max_norm, ordinary, layerwise = 0.02, Net(torch.float64), Net(torch.float64)
    # below the rank of a gradient of five samples: beyond it, P_0 would be any basis of the rest
    a = optimizer_of(ordinary, "osd_sgd", rank=4)
    b = optimizer_of(layerwise, "osd_sgd_layerwise", rank=4, max_grad_norm=max_norm, layerwise_clipping=clipping)
    previous, norms = None, []
    for step in range(5):
        ordinary(inputs(step, torch.float64)).backward()
        total = nn.utils.get_total_norm([p.grad for p in ordinary.parameters()])
        for p in ordinary.parameters():
            if clipping == "parameter" or previous is None:
                nn.utils.clip_grad_norm_([p], max_norm)
            else:
                nn.utils.clip_grads_with_norm_([p], max_norm, previous)
        previous = total
        layerwise(inputs(step, torch.float64)).backward()
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(b.grad_norm, total, rtol=1e-12, atol=0)
        norms.append(float(total))
    assert min(norms) > max_norm  # every step was clipped
    assert_equal(ordinary, layerwise, atol=1e-12)  # float64: P's gradient is that of G / ||G||, whose norm rounds


def test_clipping_does_not_change_the_share_that_is_observed():
    seen, P = [], torch.linalg.qr(torch.randn(12, 4)).Q
    G = torch.randn(12, 20)
    for mode in ({}, {"layerwise": True, "max_grad_norm": 0.1, "layerwise_clipping": "parameter"}):
        W = nn.Parameter(torch.zeros(12, 20))
        optimizer = OSD([{"params": [W], "rank": 4, "init": [P]}], **mode)
        optimizer.collect_statistics = True
        (W * G).sum().backward()
        optimizer.step()
        seen.append(optimizer.statistics()["pca_loss"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-5) and 0.4 < seen[0] < 0.9


def test_the_previous_norm_is_saved_and_a_broken_one_forgotten():
    model = Net()
    options = {"max_grad_norm": 0.02, "layerwise_clipping": "previous_norm"}
    optimizer = optimizer_of(model, "osd_sgd_layerwise", **options)
    train(model, optimizer, range(2))
    before = float(optimizer.grad_norm)
    saved = copy.deepcopy(optimizer.state_dict())
    other_model = copy.deepcopy(model)
    other = optimizer_of(other_model, "osd_sgd_layerwise", **options)
    other.load_state_dict(saved)
    assert "clip_norm2" in saved["param_groups"][0] and other.param_groups[0]["clip_norm2"] is None
    for which, own in ((model, optimizer), (other_model, other)):
        (which(inputs(2)) * float("inf")).backward()
        own.step()
        assert not own.grad_norm.isfinite()
        assert float(own.stream.clipping.before2.sqrt()) == pytest.approx(before)
        train(which, own, range(3, 5))
    assert_equal(model, other_model)


def test_a_broken_gradient_clips_no_other_parameter_to_nothing():
    """Neither at this step nor, where it was the first, at the next one, which has no norm to be clipped by."""
    model = Net()
    optimizer = optimizer_of(model, "osd_sgd_layerwise", weight_decay=0.0, max_grad_norm=0.02)
    before = [p.detach().clone() for p in model.parameters()]
    weight = model.layers[2].weight
    for step in range(2):
        loss = model(inputs(step))
        (loss + weight.sum() * float("nan") if step == 0 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        for p, q in zip(model.parameters(), before, strict=True):
            assert p.isfinite().all() and torch.equal(p, q) == (p is weight and step == 0)


def test_a_broken_gradient_skips_its_parameter_in_a_window_too():
    models = Net(), Net()
    optimizers = (
        optimizer_of(models[0], "osd_sgd", init="orthonormal"),
        optimizer_of(models[1], "osd_sgd_layerwise", init="orthonormal", gradient_accumulation=True),
    )
    for model, optimizer in zip(models, optimizers, strict=True):
        before = [p.detach().clone() for p in model.parameters()]
        weight = model.layers[2].weight
        for broken in (False, True, False):
            model(inputs(0)).backward()
            if broken:  # only this one's gradient
                (weight.sum() * float("nan")).backward()
        optimizer.step()
        assert optimizer.state[weight]["skipped_steps"] == 1
        for p, q in zip(model.parameters(), before, strict=True):
            assert p.isfinite().all() and torch.equal(p, q) == (p is weight)
    assert_equal(*models, atol=1e-6)


@pytest.mark.parametrize("subspace", [{"subspace": "svd", "update_interval": 2}, {"subspace": "online_pca"}])
def test_windows_of_one_micro_batch_are_ordinary_steps(subspace: dict):
    """Then no sum is taken, and P sees what it sees in ordinary mode."""
    ordinary, layerwise = Net(), Net()
    train(ordinary, optimizer_of(ordinary, **subspace), range(6))
    own = optimizer_of(layerwise, layerwise=True, gradient_accumulation=True, **subspace)
    train(layerwise, own, range(6))
    assert_equal(ordinary, layerwise)


def test_accumulation_makes_p_from_the_first_micro_batch_and_moves_it_by_the_mean():
    """Against the definition: A is the sum of G_i R_iᵀ of one block, over the sum of ||G_i||²."""
    from hf_osd.subspace import pca_gradient

    W = nn.Parameter(torch.randn(12, 30, dtype=torch.float64))
    options = {"rank": 4, "lr": 1e-2, "weight_rule": "sgd", "momentum": 0.0, "init": "orthonormal"}
    optimizer = OSD([W], layerwise=True, gradient_accumulation=True, **options)
    for window in range(2):  # P_0 moves from the second window on as from the first: it was made from no gradient
        grads = [torch.randn(12, 30, dtype=torch.float64) for _ in range(3)]
        state = optimizer.state[W]
        P = state["projection"].clone() if state else None
        before = W.detach().clone()
        for G in grads:
            (W * G).sum().backward()
        optimizer.step()
        if P is None:
            continue
        R = sum(P.T @ G for G in grads)
        torch.testing.assert_close(W.detach(), before - 1e-2 * P @ R, rtol=0, atol=1e-12)
        energy = sum(G.square().sum() for G in grads)
        b = slice(30 * window // 4, 30 * (window + 1) // 4)  # a quarter, the same of all micro-batches
        gP = pca_gradient(P, 4 * sum(G[:, b] @ (P.T @ G[:, b]).T for G in grads), 1 / energy, 0.1)
        torch.testing.assert_close(state["projection"], P - 5 * 1e-2 * gP, rtol=0, atol=1e-12)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_stacks_of_experts(rule: str, micro: int):
    """Each expert by itself, with steps in which it has no tokens; micro-batches that others have none in."""
    fixed = {"weight_rule": rule, "lr": 1e-2, "rank": 4, "weight_decay": 0.1}
    fixed |= {"subspace": "static", "init": "orthonormal"} if micro > 1 else {}
    W0 = torch.randn(3, 12, 20, dtype=torch.float64)
    stacks = [nn.Parameter(W0.clone()) for _ in range(2)]
    modes = ({}, {"layerwise": True, "gradient_accumulation": micro > 1})
    optimizers = [OSD([W], **fixed, **mode) for W, mode in zip(stacks, modes, strict=True)]
    for step in range(6):
        for i in range(micro):
            G = torch.randn(3, 12, 20, dtype=torch.float64)
            G[[step % 3, (step + i) % 3]] = 0  # the second expert of the two rests in one micro-batch only
            for W in stacks:
                (W * G).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    # no rounding without sums; float64 with them
    torch.testing.assert_close(*stacks, rtol=0, atol=0 if micro == 1 else 1e-10)
    a, b = (optimizer.state[W] for optimizer, W in zip(optimizers, stacks, strict=True))
    assert all(torch.equal(a[name], b[name]) for name in ("step", "skipped_steps", "idle_steps"))
    assert a["idle_steps"].sum() > 0 and a["step"].min() > 0


def test_zero_grad_forgets_a_window():
    model = Net()
    optimizer = optimizer_of(model, layerwise=True, gradient_accumulation=True)
    before = [p.detach().clone() for p in model.parameters()]
    model(inputs(0)).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
