"""The conformance table: every row of `conformance.ROWS` through every invariant that an optimizer here must keep."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conformance import (
    EIGHT_BIT,
    ROWS,
    SAVED_AT,
    STEPS,
    assert_same,
    backward,
    gradients,
    make,
    options_of,
    run,
    shapes_of,
    state_of,
    weights,
)
from torch import nn

from hf_osd import OSD
from hf_osd.layers.int8 import Int8Weight
from hf_osd.optim import predicted_state_bytes, state_bytes
from hf_osd.optim.options.general import RESIDUALS
from hf_osd.optim.options.rules import rules_of
from hf_osd.optim.step import projection
from hf_osd.subspace import SIDES, SUBSPACES
from hf_osd.subspace.random import DISTRIBUTIONS
from hf_osd.update_rules import RULES


every_row = pytest.mark.parametrize("row", ROWS)


def test_the_rows_have_every_entry_of_every_axis():
    def values(option: str, default: object) -> set:
        return {options_of(row).get(option, default) for row in ROWS}

    assert values("subspace", None) > SUBSPACES.keys() and len(values("subspace", None)) == len(SUBSPACES) + 1
    assert values("side", "auto") == {"auto", *SIDES} and values("weight_rule", "adamw") == RULES.keys()
    assert values("residual", "none") == set(RESIDUALS)
    assert values("distribution", "orthonormal") == set(DISTRIBUTIONS)
    carried = {options_of(row)["subspace"] for row in ROWS if "carry_moments" in options_of(row)}
    assert carried == values("subspace", None) - {"static"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_row
def test_dtypes_shapes_gradients_and_declared_bytes(row: str, dtype: torch.dtype):
    params = weights(row, dtype)
    optimizer = make(row, params)
    before, declared = [p.detach().clone() for p in params], predicted_state_bytes(optimizer)
    assert state_bytes(optimizer) == 0
    run(params, optimizer, range(STEPS))
    for p, start, G in zip(params, before, gradients(STEPS - 1, params), strict=True):
        assert p.dtype == dtype and p.shape == start.shape and p.isfinite().all() and not torch.equal(p, start)
        assert torch.equal(p.grad, G)
    assert state_bytes(optimizer) == declared
    asked = {getattr(torch, name) for name in {"bfloat16", "int8"}.intersection(map(str, options_of(row).values()))}
    dtypes = set()
    for state in state_of(optimizer):
        assert all(type(value) is torch.Tensor for value in state.values())
        dtypes |= {value.dtype for value in state.values()}
    assert dtypes - {torch.float32, torch.int64, torch.uint8} == asked  # whatever the weights' own
    assert (torch.uint8 in dtypes) == (row in EIGHT_BIT)
    json.dumps([{**group, "params": None} for group in optimizer.param_groups])


@every_row
def test_a_zero_gradient_changes_nothing_before_the_first_and_breaks_nothing_after(row: str):
    params = weights(row)
    optimizer = make(row, params, weight_decay=0.0)
    start = [p.detach().clone() for p in params]
    run(params, optimizer, range(2), change=lambda G: G.zero_())
    for p, old, state in zip(params, start, state_of(optimizer), strict=True):
        assert torch.equal(p, old) and not any(value.any() for value in state.values())
    run(params, optimizer, range(2))
    run(params, optimizer, range(2, 6), change=lambda G: G.zero_())
    run(params, optimizer, range(6, STEPS))
    for p, old, state in zip(params, start, state_of(optimizer), strict=True):
        assert p.isfinite().all() and not torch.equal(p, old)
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_row
def test_a_broken_gradient_is_skipped_bit_for_bit(row: str, bad: float):
    params = weights(row)
    optimizer = make(row, params)

    def spoil(G: torch.Tensor) -> None:
        G[5, 7] = bad

    run(params, optimizer, range(1), change=spoil)  # before there is a P
    assert all(not value.any() for state in state_of(optimizer) for k, value in state.items() if k != "skipped_steps")
    run(params, optimizer, range(2))
    for step in (3, 4):  # with the three before it, at a refresh, and at a step like others
        before = copy.deepcopy(([p.detach() for p in params], state_of(optimizer)))
        run(params, optimizer, range(step, step + 1), change=spoil)
        for p, old, state, old_state in zip(params, before[0], state_of(optimizer), before[1], strict=True):
            assert torch.equal(p, old)
            assert state["skipped_steps"] == old_state["skipped_steps"] + 1
            changed = [name for name in old_state if not torch.equal(state.get(name, torch.empty(0)), old_state[name])]
            assert changed == ["skipped_steps"] and state.keys() <= {*old_state, "projection_overdue"}
    run(params, optimizer, range(5, STEPS))
    assert all(p.isfinite().all() for p in params)


@every_row
def test_is_deterministic_apart_from_the_global_random_state(row: str):
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        params = weights(row)
        optimizer = make(row, params)
        run(params, optimizer, range(STEPS))
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((params, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_row
def test_continues_bit_for_bit_from_a_file(row: str, dtype: torch.dtype, tmp_path: Path):
    params = weights(row, dtype)
    optimizer = make(row, params)
    run(params, optimizer, range(SAVED_AT))
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    run(params, optimizer, range(SAVED_AT, STEPS))
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    others = [nn.Parameter(value) for value in saved["weights"]]
    other = make(row, others)
    other.load_state_dict(saved["optimizer"])
    run(others, other, range(SAVED_AT, STEPS))
    assert_same((params, optimizer), (others, other))


@every_row
def test_a_start_after_a_resume_is_the_start_without_one(row: str):
    """What is random depends on the steps so far: skipped ones count, whoever has counted them."""
    runs = []
    for resumed in (False, True):
        params = weights(row)
        optimizer = make(row, params)
        run(params, optimizer, range(2), change=lambda G: G.fill_(float("nan")))
        if resumed:
            saved, optimizer = copy.deepcopy(optimizer.state_dict()), make(row, params)
            optimizer.load_state_dict(saved)
        run(params, optimizer, range(2, 6))
        runs.append((params, optimizer))
    assert_same(*runs)


@every_row
def test_copies_and_pickles_continue_alike(row: str):
    params = weights(row)
    optimizer = make(row, params)
    run(params, optimizer, range(SAVED_AT))
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    run(params, optimizer, range(SAVED_AT, STEPS))
    for other in copies:
        others = other.param_groups[0]["params"]
        run(others, other, range(SAVED_AT, STEPS))
        assert_same((params, optimizer), (others, other))


@every_row
def test_layerwise_steps_are_the_ordinary_ones(row: str):
    runs = []
    for layerwise in (False, True):
        params = weights(row)
        optimizer = make(row, params, layerwise=layerwise)
        for step in range(STEPS):
            backward(params, step)
            optimizer.step()
            optimizer.zero_grad()
        runs.append((params, optimizer))
    assert_same(*runs)


@every_row
def test_modes_that_would_not_be_exact_are_refused_and_others_work(row: str):
    options = options_of(row)
    rule = rules_of(make(row, weights(row)).param_groups[0]).subspace
    whole = options.get("residual", "none") != "none" or options.get("side") == "two_sided"
    modes = {
        "accumulation": ({"layerwise": True, "gradient_accumulation": True}, whole or rule.mixes),
        "clipping": ({"layerwise": True, "max_grad_norm": 0.1, "layerwise_clipping": "parameter"}, bool(rule.mixes)),
    }
    for given, refused in modes.values():
        params = weights(row)
        if refused:
            with pytest.raises(
                ValueError, match="is not for parameter group 0: .*(Leave one of them out|Give residual=none)"
            ):
                make(row, params, **given)
            continue
        optimizer = make(row, params, **given)
        losses = []
        for _ in range(STEPS):
            losses.append(backward(params, 0))
            optimizer.step()
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("row", [row for row in ROWS if row not in EIGHT_BIT and not row.startswith("power")])
def test_layerwise_clipping_is_clipping(row: str):
    runs, norm = [], 0.05
    for layerwise in (False, True):
        params = weights(row, torch.float64)
        mode = {"layerwise": True, "max_grad_norm": norm, "layerwise_clipping": "parameter"} if layerwise else {}
        optimizer = make(row, params, **mode)
        for step in range(STEPS):
            backward(params, step)
            if not layerwise:
                for p in params:
                    assert nn.utils.clip_grad_norm_([p], norm) > norm
            optimizer.step()
            optimizer.zero_grad()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        # the sum of squares before and after a multiplication; in the row of low precision that may decide a rounding
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3 if "low_precision" in row else 1e-9)


@every_row
def test_stacked_experts_are_matrices_of_their_own(row: str, monkeypatch: pytest.MonkeyPatch):
    # a step without tokens is one, by which a P in bfloat16 or int8 is rounded by other random numbers
    monkeypatch.setattr(projection, "round_into_", lambda P, X, noise: P.copy_(X))
    monkeypatch.setattr(Int8Weight, "move_", lambda P, X, noise: P.copy_(X))
    (shape, _), rank = shapes_of(row)
    experts = 3
    stack = nn.Parameter(torch.randn(experts, *shape, generator=torch.Generator().manual_seed(5)))
    own = [nn.Parameter(W.clone()) for W in stack.detach()]
    options = options_of(row)
    if options.get("subspace", "online_pca") == "online_pca" and options.get("side") != "two_sided":
        options["projection_sample"] = 1  # whose turns go by all steps
    optimizer, other = (OSD([{"params": params, "rank": rank}], lr=1e-2, **options) for params in ([stack], own))
    for e, W in enumerate(own):  # what is random depends on the position
        weight = other.weight_of(W)
        weight.P.geometry = replace(weight.geometry, seed=optimizer.weight_of(stack).experts[e].geometry.seed)
    for step in range(STEPS):
        (G,) = gradients(step, [stack])
        if step in (1, 4):
            G[step % experts] = 0  # no tokens
        stack.grad = G
        for e, W in enumerate(own):
            W.grad = G[e].clone() if G[e].any() else None
        optimizer.step(), other.step()
    for e, W in enumerate(own):
        assert torch.equal(stack[e], W)
        for name, value in other.state[W].items():
            assert torch.equal(optimizer.state[stack][name][e], value), name


@every_row
def test_the_loss_falls(row: str):
    params = weights(row)
    optimizer = make(row, params, weight_decay=0.0)
    losses = []
    for step in range(60):
        losses.append(backward(params, step))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@every_row
def test_nothing_is_read_back_in_a_step_without_refresh(row: str, monkeypatch: pytest.MonkeyPatch):
    params = weights(row)
    optimizer = make(row, params)
    run(params, optimizer, range(SAVED_AT))

    def read_back(*_, **__):
        raise AssertionError("a step read a tensor back to the host")

    prepared = gradients(SAVED_AT, params)  # at the step after this one P is renewed
    names = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, read_back)
    for p, G in zip(params, prepared, strict=True):
        p.grad = G
    optimizer.step()
