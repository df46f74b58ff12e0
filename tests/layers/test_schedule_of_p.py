"""When P of an input moves, is made anew, and of which tokens it learns: by the steps of whoever uses it."""

import copy

import pytest
import torch

from reference.nets_in_layers import Net, batch, distance, loss_of, make, train


def steps_at_which_p_changed(net: Net, optimizer, steps: range) -> list[int]:
    changed = []
    for step in steps:
        shared = net.layers[0].osd.input
        before = None if shared is None else shared.P.clone()
        train(net, optimizer, range(step, step + 1))
        if before is None or not torch.equal(before, net.layers[0].osd.input.P):
            changed.append(step)
    return changed


@pytest.mark.parametrize("subspace", ["online_pca", "power"])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_p_moves_at_every_interval(interval: int, subspace: str):
    """Step 0 observes, and P starts; its own count, from 0 on, is that of the steps after."""
    net = Net()
    optimizer = make(net, subspace=subspace, projection_interval=interval)
    assert steps_at_which_p_changed(net, optimizer, range(12)) == [0, *range(1, 12, interval)]


@pytest.mark.parametrize("frozen", [0, 1, None])
def test_p_goes_on_while_the_one_that_holds_it_is_frozen(frozen: int | None):
    """Also the parts of the tokens take turns, and P is drawn anew."""
    for options, expected in (
        ({"projection_interval": 2}, [0, 1, 3, 5, 7]),
        ({"subspace": "random", "update_interval": 3}, [2, 5, 8]),
    ):
        net = Net()
        optimizer = make(net, **options)
        changed = steps_at_which_p_changed(net, optimizer, range(1))
        if frozen is not None:
            net.layers[frozen].requires_grad_(False)
        changed += steps_at_which_p_changed(net, optimizer, range(1, 9))
        assert [step for step in changed if step or "subspace" not in options] == expected
    net, turns = Net(), []
    optimizer = make(net)
    train(net, optimizer, range(1))
    if frozen is not None:
        net.layers[frozen].requires_grad_(False)
    for step in range(1, 6):
        turns.append(net.layers[0].osd.input.turn)
        train(net, optimizer, range(step, step + 1))
    assert turns == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    "options",
    [{}, {"projection_interval": 3}, {"subspace": "power"}, {"subspace": "random", "update_interval": 3}],
    ids=str,
)
@pytest.mark.parametrize("broken", [0, 1, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_with_a_broken_step_resumes_exactly(frozen: bool, broken: int, options):
    net = Net()
    optimizer = make(net, **options)
    for step in range(5):
        (loss_of(net(batch(step))) * (float("nan") if step == broken else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 and frozen:
            net.layers[0].requires_grad_(False)
    other = Net()
    other.load_state_dict(net.state_dict())
    resumed = make(other, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.layers[0].requires_grad_(not frozen)
    train(net, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    assert distance(net, other) == 0 and distance(net, Net()) > 1e-3
