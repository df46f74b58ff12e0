"""P in 8 bits: what is kept, when floats of it are there, how it moves, and what others get of it."""

import copy

import torch
from live_floats import Floats
from torch import nn

from hf_osd import OSD, ProjectionState
from hf_osd.layers.int8 import Int8Weight
from hf_osd.optim import predicted_state_bytes, state_bytes
from hf_osd.optim.step import movement
from reference.nets_in_layers import Net, batch, distance, loss_of, make, train


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def projections(net: nn.Module, optimizer: OSD) -> dict[str, torch.Tensor]:
    """Of all weights that hold one, in the precision of the computation."""
    held = [name for name, p in net.named_parameters() if "projection" in optimizer.state.get(p, {})]
    return {name: optimizer.weight_of(net.get_parameter(name)).P.read() for name in held}


def test_one_byte_an_entry_and_floats_of_one_p_at_a_time(monkeypatch):
    """Between uses there are none, and however many P there are, as many floats are there at once."""
    monkeypatch.setattr(movement, "STACK_LIMIT", 0)
    n, m, rank, most = 40, 56, 6, set()
    for count in (3, 6):
        layers = [nn.Linear(n, m, dtype=torch.bfloat16) for _ in range(count)]
        net = nn.ModuleList(layers)
        optimizer = make(net, projection_dtype="int8", projection_optim="sgd", momentum=0.0, rank=rank)
        xs = [torch.randn(7, n, dtype=torch.bfloat16, generator=noise(i)) for i in range(count)]
        for step in range(3):
            with Floats({n * rank}) as forward:
                loss = sum(layer(x).square().mean() for layer, x in zip(layers, xs, strict=True))
            with Floats({n * rank}) as backward:
                loss.backward()
            with Floats({n * rank}) as whole_step:
                optimizer.step()
            assert backward.most == 0 and (step == 0 or (forward.most, forward.count()) == (1, 0))
            optimizer.zero_grad()
        assert whole_step.count() == 0
        most.add(whole_step.most)
        for layer in layers:
            state = optimizer.state[layer.weight]
            P = {name: value for name, value in state.items() if name.startswith("projection") and value.ndim}
            assert {name: value.nbytes for name, value in P.items()} == {
                "projection": n * rank,
                "projection_scale": 4 * n,
            }
        assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
    assert len(most) == 1, most


def test_a_step_is_that_of_a_float_p_up_to_one_rounding():
    net, options = Net(), {"projection_weight_decay": 0.1, "alpha": 20.0}
    optimizer = make(net, projection_dtype="int8", **options)
    train(net, optimizer, range(3))
    plain = copy.deepcopy(net)
    given = {name: P.clone() for name, P in projections(net, optimizer).items()}
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["projection_dtype"] = None
    for state in saved["state"].values():
        if "projection" in state:
            state["projection"] = state["projection"] * state.pop("projection_scale")[:, None]
    twin = make(plain, **options)
    twin.load_state_dict(saved)
    assert all(torch.equal(P, given[name]) for name, P in projections(plain, twin).items())
    scales = {name: optimizer.state[net.get_parameter(name)]["projection_scale"].clone() for name in given}
    train(net, optimizer, [3])
    train(plain, twin, [3])
    assert distance(net, plain) < 1e-12  # by the P of before
    for name, P in projections(plain, twin).items():
        moved = projections(net, optimizer)[name]
        state = optimizer.state[net.get_parameter(name)]
        off = (moved - P).abs() / torch.maximum(scales[name], state["projection_scale"])[:, None]
        assert 0.05 < off.max() <= 1.0001 and (moved != given[name]).any()
        assert (state["projection"].abs().amax(1) == 127).all()


def test_steps_far_below_a_unit_arrive_in_the_mean():
    """1,000 steps of 1 / 1,000 of a unit, which rounding to nearest would lose; a row's largest entry, too."""
    X = torch.randn(300, 64, generator=noise())
    P = Int8Weight.from_float(X)
    start, unit, random = P.plain(), P.scale.clone()[:, None], noise(1)
    direction = torch.where(torch.rand(X.shape, generator=noise(2)) < 0.5, -1.0, 1.0)
    for _ in range(1000):
        P.move_(P.plain() + direction * unit * 1e-3, random)
    arrived = (P.plain() - start) * direction / unit
    assert abs(arrived.mean() - 1) < 5 / X.numel() ** 0.5 * 1.1
    assert abs(arrived.var() - 1) < 0.15  # of 1,000 rare steps of a unit


def test_a_movement_of_nothing_changes_no_bit():
    """Also of rows of zeros, and in float64."""
    for dtype in (torch.float32, torch.float64):
        X = torch.randn(50, 9, generator=noise(), dtype=dtype)
        X[3] = 0
        P = Int8Weight.from_float(X)
        K, s = P.int_data.clone(), P.scale.clone()
        for seed in range(20):
            P.move_(P.plain(), noise(seed))
        assert torch.equal(P.int_data, K) and torch.equal(P.scale, s)


def test_it_is_read_in_the_precision_that_is_asked_for():
    """Each entry rounded once; in whichever way it is used, its floats are."""
    K, s = torch.randint(-127, 128, (30, 8), dtype=torch.int8, generator=noise()), torch.rand(30, generator=noise())
    P = Int8Weight(K, s, torch.int8)
    exact = K.double() * s.double()[:, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert type(P.to(dtype)) is torch.Tensor and P.to(dtype).dtype == dtype
        assert torch.equal(P.to(dtype), (K * s[:, None]).to(dtype))
    assert torch.equal(P.to("cpu", copy=True), exact.float()) and P.to("cpu", copy=True).dtype == torch.float32
    assert torch.equal(torch.stack([P, P]), exact.float().expand(2, -1, -1))
    P.copy_(exact * 2)
    assert torch.allclose(P.to(torch.float64), exact * 2, atol=float(s.max()))


def test_p_stays_about_orthonormal():
    """Rounding pushes P off, and the orthogonality term of Eq. 6 back: no further the longer it lasts."""
    errors = {}
    for dtype in ("int8", "float32"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64))
        optimizer = make(net, projection_dtype=dtype, rank=16, lr=2e-3)
        mix, found = torch.randn(64, 64, generator=noise()), []
        for step in range(150):
            x = torch.randn(32, 64, generator=noise(step)) @ mix
            optimizer.collect_statistics = step % 50 == 49
            (net(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 49:
                found.append(optimizer.statistics()["orthogonality"])
        errors[dtype] = found
    print(errors)
    assert max(errors["int8"]) < max(errors["float32"]) + 0.05, errors
    assert errors["int8"][-1] < 1.5 * errors["int8"][0] + 0.02, errors


def test_what_is_exported_is_plain_and_can_be_given():
    net = Net()
    optimizer = make(net, projection_dtype="int8")
    train(net, optimizer, range(3))
    state = ProjectionState.from_optimizer(optimizer, include_moments=True)
    for name, P in projections(net, optimizer).items():
        own = state[name].projection
        assert type(own) is torch.Tensor and own.dtype == P.dtype and torch.equal(own, P)
        assert state[name].moments and "projection_scale" not in state[name].moments
    again = Net()
    other = make(again, projection_dtype="int8", init=state.initial_projections())
    loss_of(again(batch(0))).backward()
    other.step()
    for name, P in projections(again, other).items():
        assert (P - state[name].projection).abs().max() < 0.1
    assert other.state[again.layers[2].weight]["projection"].dtype == torch.int8


def test_stacks_of_experts_are_given_theirs():
    stack = nn.Parameter(torch.randn(3, 20, 12))
    given = torch.linalg.qr(torch.randn(3, 12, 4)).Q
    given[1] = 0  # one that had no tokens yet
    optimizer = OSD([{"params": [("W", stack)], "rank": 4}], lr=1e-3, init={"W": given}, projection_dtype="int8")
    P = optimizer.state_dict()["state"][0]
    read = P["projection"] * P["projection_scale"][..., None]
    assert ((read - given).abs() <= given.abs().amax(2, keepdim=True) / 254 * 1.001).all()
    assert torch.equal(optimizer.weight_of(stack).projection, read)


def test_a_broken_input_changes_no_bit():
    net = Net()
    optimizer = make(net, weight_dtype="int8", projection_dtype="int8")
    train(net, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    loss_of(net(batch(3) * float("nan"))).backward()
    for p in net.parameters():
        p.grad = None if p.grad is None or not p.grad.isfinite().all() else p.grad
    optimizer.step()
    for index, state in before.items():
        for name in state.keys() & {"projection", "projection_scale"}:
            assert torch.equal(optimizer.state_dict()["state"][index][name], state[name])
