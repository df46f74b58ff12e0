"""A state whose layers share P is loaded where some of them have none, or cannot share it, and where it is refused."""

import copy
import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from reference.nets_in_layers import Net, batch, distance, loss_of, make, train


HOLDER, FOLLOWER = "layers.0.weight", "layers.1.weight"


def cleared(net, optimizer):
    train(net, optimizer, range(2))
    optimizer.state.clear()
    train(net, optimizer, [2])


def without_tokens(net, optimizer):
    net(batch(0)[:, :0]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def of_zeros(net, optimizer):
    loss_of(net(torch.zeros_like(batch(0)))).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("before", [cleared, without_tokens, of_zeros])
def test_a_shared_p_that_has_not_started_resumes_exactly(before, distributed: bool):
    net, other = Net(), Net()
    optimizer, second = make(net), make(other)
    before(net, optimizer)
    assert not optimizer.state[net.layers[0].weight]["projection"].any()
    if distributed:
        saved, state = copy.deepcopy(get_state_dict(net, optimizer))
        set_state_dict(other, second, model_state_dict=saved, optim_state_dict=state)
    else:
        other.load_state_dict(net.state_dict())
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(3, 7)), train(other, second, range(3, 7))
    assert distance(net, other) == 0


@pytest.mark.parametrize("partial_load", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_weights_whose_p_is_in_no_state_start_anew(running: bool, partial_load: bool):
    net, other = Net(), Net()
    optimizer, second = make(net), make(other, partial_load=partial_load)
    train(net, optimizer, range(3)), train(other, second, range(3 if running else 0))
    kept = copy.deepcopy(optimizer.state[net.layers[2].weight])
    del optimizer.state[net.layers[0].weight]
    with pytest.warns(UserWarning, match=rf"(?s)1 of 7 parameters .* start anew.*{FOLLOWER} +P of {HOLDER} "):
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = second.state
    assert other.layers[1].weight not in state
    assert all(torch.equal(value, state[other.layers[2].weight][name]) for name, value in kept.items())
    train(other, second, [3])
    P = state[other.layers[0].weight]["projection"]
    assert (P.T @ P - torch.eye(4)).abs().max() < 1e-6 and "projection" not in state[other.layers[1].weight]
    train(other, second, range(4, 6))
    assert state[other.layers[1].weight]["step"] == state[other.layers[0].weight]["step"] == 2


UNLIKE = [{"rank_pattern": {"layers.0": 3}}, {"rank_pattern": {"layers.1": 3}}, {"exclude_modules": ["layers.0"]}]


@pytest.mark.parametrize("options", UNLIKE, ids=str)
def test_layers_that_cannot_share_as_saved_have_a_p_of_their_own(options: dict):
    net, other, third = Net(), Net(), Net()
    optimizer, second = make(net), make(other, partial_load=True, **options)
    train(net, optimizer, range(3))
    with pytest.warns(UserWarning, match="start anew"):
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, second, range(3, 6))
    assert "projection" in second.state[other.layers[1].weight]
    again = make(third, **options)
    third.load_state_dict(other.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(copy.deepcopy(second.state_dict()))
    train(other, second, range(6, 8)), train(third, again, range(6, 8))
    assert distance(other, third) == 0


@pytest.mark.parametrize("options", [{"rank": 3}, {"source": "gradients"}, *UNLIKE], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_that_is_refused_changes_nothing(options: dict, steps: int):
    net, other, third = Net(), Net(), Net()
    optimizer, second, plain = make(net), make(other, **options), make(third, **options)
    train(net, optimizer, range(2)), train(other, second, range(steps)), train(third, plain, range(steps))
    loss_of(other(batch(2))).backward(), loss_of(third(batch(2))).backward()
    with pytest.raises(ValueError, match="saved by another optimizer"):
        second.load_state_dict(optimizer.state_dict())
    second.step(), second.zero_grad(), plain.step(), plain.zero_grad()
    train(other, second, range(3, 6)), train(third, plain, range(3, 6))
    assert distance(other, third) == 0
