"""Weights in 8 bits: the format, and the step that rounds into it."""

import pytest
import torch
from torch import nn

from hf_osd.layers.int8 import PIECE, Int8Weight, quantize_
from hf_osd.optim.step.low_rank import Update
from hf_osd.optim.step.rounding import Rounding, add_to_int8_
from hf_osd.subspace.operators import Left, Right
from reference.nets_in_layers import batch, make


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(m: int = 30, n: int = 17, dtype: torch.dtype = torch.float32) -> Int8Weight:
    return Int8Weight.from_float(torch.randn(m, n, generator=noise()).to(dtype))


def test_rounded_to_nearest():
    W = torch.randn(30, 17, generator=noise())
    W[3] = 0
    own = Int8Weight.from_float(W)
    assert own.int_data.dtype == torch.int8 and own.scale.shape == (30,)
    step = W.abs().amax(1, keepdim=True) / 127
    assert ((own - W).abs() <= step / 2 * 1.0001).all() and (own[3] == 0).all()
    assert torch.equal(own.int_data.abs().amax(1)[W.any(1)], torch.full((29,), 127, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_read_in_half_precision_it_is_known_again_by_its_scales(dtype):
    """Each K s is rounded once to 8 bits or more, so that dividing by s finds K: 127 / 256 < 1 / 2."""
    s = torch.cat([1 + torch.rand(4000, generator=noise()), torch.tensor([1.0, 1.9999999])])
    K = torch.arange(-127, 128, dtype=torch.int8).expand(len(s), -1)
    own = Int8Weight(K, s, dtype)
    assert own.plain().dtype == dtype
    assert torch.equal((own.plain().float() / s[:, None]).round().to(torch.int8), K)
    again = Int8Weight.from_float(own.plain())
    assert again.become_(own) and torch.equal(again.int_data, K) and torch.equal(again.scale, s)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-35])
def test_a_row_of_next_to_nothing_grows_as_any_other(size: float):
    """Its scale is not one whose reciprocal, or whose quotients, are beyond float32."""
    W = torch.randn(6, 17, generator=noise())
    W[3] = size
    own = Int8Weight.from_float(W)
    faded = Int8Weight.from_float(torch.randn(6, 17, generator=noise()))
    for _ in range(30):
        faded.move_(faded.plain() * 1e-5, noise())
    for weight in (own, faded):
        X = torch.randn(6, 17, generator=noise(1))
        weight.move_(X, noise())
        unit = X.abs().amax(1, keepdim=True) / 127
        assert ((weight.plain() - X).abs() <= unit * 1.0001).all()


def test_what_is_not_finite_is_refused():
    for value in (torch.nan, torch.inf):
        p = nn.Parameter(torch.full((4, 3), value))
        with pytest.raises(ValueError, match="w holds nan or infinity"):
            quantize_(p, "w")


def test_another_weight_is_not_taken():
    own, other = weight(), Int8Weight.from_float(torch.randn(30, 17, generator=noise(1)))
    before = own.plain()
    assert not own.become_(other) and torch.equal(own.plain(), before)


def test_a_step_of_nothing_changes_nothing():
    own = weight()
    K, s = own.int_data.clone(), own.scale.clone()
    for _ in range(100):
        own.round_rows_(own.int_data.float(), slice(None), noise(7))
    assert torch.equal(own.int_data, K) and torch.equal(own.scale, s)


def test_decay_scales_alone():
    own = weight()
    K, s = own.int_data.clone(), own.scale.clone()
    own.round_rows_(own.int_data.float() * 0.9, slice(None), noise())
    assert torch.equal(own.int_data, K) and torch.allclose(own.scale, 0.9 * s)


def test_rounding_is_right_in_the_mean():
    """Mean X and variance f (1 - f) of the rounding of k + f, in units of a scale; an odd number of entries."""
    K, s, random, trials = weight().int_data, weight().scale, noise(3), 4000
    K[:, 0] = 127  # the largest, which stays
    shift = torch.rand(30, 17, generator=noise(4))
    shift[:, 0] = 0
    X = (K.double() + shift).float().clamp(-126.5, 127)
    total, squares = torch.zeros(2, 30, 17, dtype=torch.float64)
    for _ in range(trials):
        own = Int8Weight(K.clone(), s.clone(), torch.float32)
        own.round_rows_(X.clone(), slice(None), random)
        total += own.int_data
        squares += (own.int_data - X.double()) ** 2
    f = X.double() - X.double().floor()
    error = (total / trials - X.double()) / (f * (1 - f) / trials).sqrt().clamp(min=1e-9)
    assert error[:, 1:].abs().max() < 5 and abs(error[:, 1:].square().mean() - 1) < 0.15
    assert ((squares / trials).mean() / (f * (1 - f)).mean() - 1).abs() < 0.02


def test_tiny_steps_arrive():
    """1,000 steps of 1 / 1,000 of a quantum: their mean is their sum, which rounding to nearest would lose whole."""
    own, random = Int8Weight(torch.full((200, 65), 50, dtype=torch.int8), torch.ones(200), torch.float32), noise(5)
    own.int_data[:, 0] = 127
    for _ in range(1000):
        X = own.int_data.float()
        X[:, 1:] += 1e-3
        own.round_rows_(X, slice(None), random)
    moved = own.int_data[:, 1:].double() - 50
    assert abs(moved.mean() - 1) < 5 / 12800**0.5 and abs(moved.var() - 1) < 0.1  # a sum of 1,000 rare ones: Poisson


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", [Left(), Right()], ids=["left", "right"])
def test_the_product_of_a_step_arrives_in_the_mean(op, dtype):
    """Of a bfloat16 weight up to the rounding of its factors and their product, 2^-8 of each."""
    own, random, trials = weight(dtype=dtype), noise(6), 2000
    K, s = own.int_data.clone(), own.scale.clone()
    P, D = (torch.randn(30, 4), torch.randn(4, 17)) if op.long_dim else (torch.randn(17, 4), torch.randn(30, 4))
    step = 1e-2 * op.up(D.double(), P.double()) / s[:, None]
    total = torch.zeros(30, 17, dtype=torch.float64)
    for _ in range(trials):
        own.int_data.copy_(K)
        own.scale.copy_(s)
        add_to_int8_(own, op, Update(D, P), 1e-2, Rounding(random, None))
        total += own.int_data * own.scale[:, None].double() / s[:, None]
    error = total / trials - K - step
    assert error.square().mean().sqrt() < 0.5 / trials**0.5 + 2**-8 * step.square().mean().sqrt()
    assert abs((error * step).sum() / step.square().sum()) < 5 * 0.5 / trials**0.5 / step.norm() + 2**-9


def test_what_would_change_it_is_refused():
    own = weight()
    for change in (lambda: own.add_(1), lambda: own.mul_(2), lambda: torch.add(own, 1, out=own)):
        with pytest.raises(RuntimeError, match="would change an int8 weight"):
            change()
    own.copy_(torch.ones(30, 17))
    assert torch.equal(own + 0, torch.ones(30, 17))
    assert type(own.clone()) is Int8Weight and type(own + 1) is torch.Tensor


def test_pieces_of_rows():
    own = Int8Weight.from_float(torch.randn(5, PIECE // 2, generator=noise()))
    assert own.pieces() == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_tensors_of_torchao_are_given_and_taken():
    """The same numbers in the same layout, by their parts; the scales of a bfloat16 one are bfloat16."""
    torchao = pytest.importorskip("torchao.prototype.quantized_training")
    kind = torchao.Int8QuantizedTrainingLinearWeight
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 12))
    theirs = {layer: kind.from_float(layer.weight.detach()) for layer in (net[0], net[2])}
    for layer, W in theirs.items():
        layer.weight = nn.Parameter(Int8Weight(W.int_data, W.scale.float(), torch.float32))
    optimizer = make(net, weight_dtype="int8")
    for layer, W in theirs.items():
        assert torch.equal(layer.weight.int_data, W.int_data) and torch.equal(layer.weight.plain(), W.dequantize())
        assert torch.equal(Int8Weight.from_float(W.dequantize()).int_data, W.int_data)
    held = net[0].weight
    before = held.plain()
    for step in range(3):
        net(batch(step).float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    taken = kind(held.int_data, held.scale)
    assert torch.equal(taken.dequantize(), held.plain()) and not torch.equal(held.plain(), before)
    x = batch(5).float()
    with torch.no_grad():
        assert torch.allclose(nn.functional.linear(x, taken, net[0].bias), net[0](x), atol=1e-5)
