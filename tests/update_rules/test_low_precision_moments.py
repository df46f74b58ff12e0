"""Moments in 8 and 16 bits do what those in float32 do: zero stays zero, and what grew can fall."""

import pytest
import torch
from torch import nn

from hf_osd import OSD
from hf_osd.update_rules import build_storage
from hf_osd.update_rules.blockwise import _code_by_place, code_book, decode, encode


EIGHT_BIT = ["adamw8bit", "lion8bit"]


@pytest.mark.parametrize("shape", [(50, 96), (12, 384), (9, 576), (32, 256), (4, 5000)])
@pytest.mark.parametrize("signed", [True, False])
def test_a_zero_is_kept_as_zero(shape: tuple[int, int], signed: bool):
    """bitsandbytes 0.50.2 on the CPU: a zero beside larger values comes back as 2e-5 of the largest of its block."""
    from hf_osd.update_rules import Moment

    storage, kept = build_storage("adamw8bit"), Moment("m", shape, signed).kept("", torch.float32)
    state = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in storage.spec(kept).items()}
    assert state["m"].dtype == torch.uint8
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs()
    X[::2] = 0
    X[:, 1::3] = 0
    _, stored = storage.load(state, kept, None)
    storage.store(stored, X, torch.tensor(False))
    value, _ = storage.load(state, kept, None)
    assert torch.equal(value == 0, X == 0)
    # half the widest step of the dynamic map, of the largest value of a block
    torch.testing.assert_close(value, X, rtol=0, atol=0.03 * float(X.max()))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("largest", [1e-38, 1e-40, 1e-44])
def test_blocks_below_the_smallest_normal_number(largest: float, signed: bool):
    X = torch.rand(512, generator=torch.Generator().manual_seed(0)) * largest
    X[256:] = 0
    value = decode(*encode(X, signed, 256), signed, 256)
    assert not value[256:].any() and (value - X).abs().max() <= 0.03 * largest + 1e-45


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_device_makes_no_other_codes(device: str):
    X = torch.randn(512, generator=torch.Generator().manual_seed(0))
    expected = encode(X, True, 256)
    code_book.cache_clear(), _code_by_place.cache_clear()
    with torch.device(device):
        assert all(map(torch.equal, encode(X, True, 256), expected))


@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("rule", EIGHT_BIT)
def test_rows_without_a_gradient_never_move(rule: str, rank: int | None):
    """Embeddings of tokens that never occur. With a rank the rows of R, which is on the right here."""
    W = nn.Parameter(torch.randn(300, 96))
    before, used = W.detach().clone(), torch.arange(0, 300, 3)
    optimizer = OSD([W], lr=1e-2, weight_rule=rule, rank=rank)
    for _ in range(100):
        W.grad = torch.zeros(300, 96)
        W.grad[used] = torch.randn(len(used), 96)
        optimizer.step()
    idle = torch.ones(300, dtype=torch.bool)
    idle[used] = False
    assert torch.equal(W[idle], before[idle]) and not torch.equal(W[used], before[used])


def test_second_moments_fall_when_gradients_do():
    """10,000 steps, of whose last nine tenths the gradients are 100 times smaller: steps are those of float32."""
    moved = {}
    for dtype in (None, "bfloat16"):
        p = nn.Parameter(torch.zeros(16, 16))
        optimizer = OSD([p], lr=1.0, moment_dtype=dtype)
        generator, distances = torch.Generator().manual_seed(0), []
        for step in range(10_000):
            p.grad = torch.randn(p.shape, generator=generator) * (1 if step < 1000 else 0.01)
            p.data.zero_()
            optimizer.step()
            distances.append(p.detach().abs().mean())
        moved[dtype] = torch.stack(distances)
    for part in (slice(500, 1000), slice(3000, 5000), slice(9000, 10_000)):
        # a first moment in bfloat16 rounds by 1/512 in the mean square
        assert moved["bfloat16"][part].mean() == pytest.approx(float(moved[None][part].mean()), rel=0.01)


@pytest.mark.parametrize("options", [{"weight_rule": "adafactor"}, {"weight_rule": "sgd", "momentum": 0.0}])
def test_without_a_moment_to_narrow_the_option_is_refused(options: dict):
    with pytest.raises(ValueError, match="`moment_dtype` of .* has no effect with weight_rule="):
        OSD([nn.Parameter(torch.zeros(8, 12))], moment_dtype="bfloat16", **options)


def test_second_moments_that_were_saved_in_bfloat16_are_read():
    """As versions wrote them that rounded them."""
    p, q = (nn.Parameter(torch.zeros(16, 16)) for _ in range(2))
    optimizer, other = (OSD([W], moment_dtype="bfloat16") for W in (p, q))
    p.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg_sq"] = saved["state"][0]["exp_avg_sq"].bfloat16()
    other.load_state_dict(saved)
    state = other.state[q]
    assert state["exp_avg_sq"].dtype == torch.float32 and state["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(state["exp_avg_sq"], saved["state"][0]["exp_avg_sq"].float())
