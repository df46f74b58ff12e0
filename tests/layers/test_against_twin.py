"""100 steps of a net with prepared layers against a readable twin that has gradients and recorded inputs."""

import copy

import pytest

from reference.activations_twin import ActivationsTwin
from reference.nets_in_layers import Net, batch, distance, loss_of, make, train


SHARED = [["layers.0", "layers.1"], ["layers.2"]]
SIGNS = {"residual": "sign", "residual_scale": 0.5, "residual_sample": 3}


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(
    ("every", "options", "own"),
    [
        (1, {}, {}),
        (4, {}, {}),
        (4, SIGNS, {"signs": 0.5, "sample": 3}),
        (4, {**SIGNS, "residual_sample": 100}, {"signs": 0.5, "sample": 100}),
        (4, {**SIGNS, "scale": 0.8}, {"signs": 0.5, "sample": 3, "scale": 0.8}),
        (4, {**SIGNS, "residual_sample": 1, "scale": "auto"}, {"signs": 0.5, "sample": 1, "scale": "auto"}),
    ],
)
def test_a_hundred_steps(batches, every, options, own):
    net = Net()
    plain, optimizer = copy.deepcopy(net), make(net, projection_sample=every, **options)
    net(batch(0))
    sketches = {group[0]: optimizer._layers.layers[group[0] + ".weight"].input.P.clone() for group in SHARED}
    optimizer.zero_grad()
    twin = ActivationsTwin(plain, SHARED, sketches, {"layers.2"}, every=every, **own)
    train(net, optimizer, range(100), batches)
    for step in range(100):
        for x in batch(step).chunk(batches):
            (loss_of(plain(x)) * len(x) / 3).backward()
        twin.step()
    assert distance(net, plain) < 1e-9
    for group in SHARED:
        P = optimizer.state[net.get_submodule(group[0]).weight]["projection"]
        assert (P - twin.P[group[0]]).abs().max() < 1e-9
    start = Net()
    assert all((a - b).abs().max() > 0.1 for a, b in zip(net.parameters(), start.parameters(), strict=False))
