"""Compiled models and blocks: as many graphs as without prepared layers, and P learns what it learns uncompiled."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from reference.nets_in_layers import N, batch, distance, loss_of, make, train


class Block(nn.Module):
    """Two layers that share their input, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(N, 28), nn.Linear(N, 28), nn.Linear(28, N)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)) * self.gate(x))


class Blocks(nn.Module):
    """Some of them, with checkpoints if asked for."""

    def __init__(self, depth: int = 3, checkpoints: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.checkpoints = nn.ModuleList([Block() for _ in range(depth)]), checkpoints
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return x


def whole(net: nn.Module, backend: object) -> object:
    return torch.compile(net, backend=backend, fullgraph=True)


def by_blocks(net: Blocks, backend: object) -> object:
    for block in net.blocks:
        block.compile(backend=backend, fullgraph=True)
    return net


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture
def backend():
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("way", [whole, by_blocks])
@pytest.mark.parametrize(("batches", "options"), [(1, {}), (3, {}), (3, {"residual": "sign", "residual_sample": 3})])
def test_a_compiled_model_is_the_model(way, checkpoints, batches, options, backend):
    """Whatever P's turn, and whatever was seen before in the same step."""
    net = Blocks(checkpoints=checkpoints)
    plain = copy.deepcopy(net)
    train(plain, make(plain, **options), range(10), batches)  # before: the other one would wait for its first step
    train(way(net, backend), make(net, **options), range(10), batches)
    assert distance(net, plain) < 1e-12
    assert 1 <= backend.frame_count <= 2


@pytest.mark.parametrize("way", [whole, by_blocks])
def test_as_many_graphs_as_with_gradients(way):
    """However many blocks, steps and accumulated batches there are, with an evaluation now and then."""
    graphs = {}
    for source in ("gradients", "activations"):
        torch.compiler.reset()
        net, backend = Blocks(depth=12), CompileCounterWithBackend("aot_eager")
        optimizer, model = make(net, source=source), way(net, backend)
        for step in range(9):
            train(model, optimizer, [step], batches=3 if step % 2 else 1)
            if step % 3 == 2:
                with torch.no_grad():
                    model(batch(step))
        graphs[source] = backend.frame_count
    assert 1 <= graphs["activations"] <= graphs["gradients"]


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_input_is_learned_from_once(compiled, checkpoints, backend):
    """However many layers share it, and however often it is computed."""
    net = Blocks(depth=1)
    optimizer = make(net, projection_sample=1)
    train(net, optimizer, range(2))
    net.checkpoints = checkpoints
    x = batch(2)
    loss_of((whole(net, backend) if compiled else net)(x)).backward()
    assert backend.frame_count == compiled
    first = optimizer._layers.layers["blocks.0.up.weight"].input
    assert torch.allclose(first.energy, x.square().sum())
    assert torch.allclose(first.A, x.reshape(-1, N).mT @ (x.reshape(-1, N) @ first.P))


def test_a_compiled_part_of_what_is_accumulated(backend):
    """As much is learned of it as of the rest."""
    net = Blocks()
    plain = copy.deepcopy(net)
    for first, second in ((plain, plain), (net, whole(net, backend))):
        optimizer = make(first)
        for step in range(6):
            for own, x in ((first, batch(step)), (second, batch(10 + step))):
                loss_of(own(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(net, plain) < 1e-12
    assert backend.frame_count == 1


def test_layers_that_are_called_later(backend):
    """They meet their input in a compiled function."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c, self.late = nn.Linear(N, N), nn.Linear(N, N), nn.Linear(N, N), False
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            z = torch.sin(x)
            return self.a(x).tanh() + (self.b(z) * self.c(z) if self.late else 0)

    net = Late()
    plain = copy.deepcopy(net)
    for own, model in ((plain, plain), (net, whole(net, backend))):
        optimizer = make(own)
        for late in (False, True):
            own.late = late
            train(model, optimizer, range(3))
    assert distance(net, plain) < 1e-12
    assert 1 <= backend.frame_count <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype, backend):
    net = Blocks().float()
    plain = copy.deepcopy(net)
    for own, model in ((plain, plain), (net, whole(net, backend))):
        optimizer = make(own)
        for step in range(4):
            with torch.autocast("cpu", dtype):
                y = model(batch(step).float())
            loss_of(y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(net, plain) < 1e-6
    assert backend.frame_count == 1
