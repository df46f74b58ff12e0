"""The precision of products that only P sees, which is a setting of the whole process."""

import pytest
import torch
from torch import nn

from hf_osd import OSD
from hf_osd.subspace import precision


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


needs_setting = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"), reason="torch before 2.9"
)


@needs_setting
def test_it_is_set_back_whatever_order_threads_leave_in(monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: True)
    before, X = setting(), torch.randn(32, 32)
    first, second = precision.reduced_precision(X), precision.reduced_precision(X)
    first.__enter__()
    second.__enter__()  # another thread's, within the first
    assert setting() == "bf16"
    first.__exit__(None, None, None)
    assert setting() == "bf16"
    second.__exit__(None, None, None)
    assert setting() == before
    with pytest.raises(KeyError), precision.reduced_precision(X):
        raise KeyError
    assert setting() == before


@needs_setting
@pytest.mark.parametrize(
    "X", [torch.randn(32, 16), torch.randn(32, 32, dtype=torch.float64), torch.ones(32, 32).half()]
)
def test_narrow_products_and_other_precisions_stay(X: torch.Tensor, monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: True)
    with precision.reduced_precision(X):
        assert setting() != "bf16"


@needs_setting
@pytest.mark.parametrize("own", ["none", "ieee", "bf16"])
@pytest.mark.parametrize("outer", ["none", "ieee", "tf32", "bf16"])
def test_the_setting_of_products_is_left_as_it_was(outer: str, own: str, monkeypatch):
    """One that follows that of all operators follows it afterwards, too."""
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: True)
    matmul = torch.backends.mkldnn.matmul
    try:
        torch.backends.fp32_precision, matmul.fp32_precision = outer, own
        with precision.reduced_precision(torch.randn(64, 64)):
            assert matmul.fp32_precision == "bf16"
        assert torch.backends.fp32_precision == outer
        for later in ("none", "ieee", "bf16"):
            torch.backends.fp32_precision = later
            assert matmul.fp32_precision == (later if own == "none" else own)
    finally:
        torch.backends.fp32_precision = matmul.fp32_precision = "none"


def learned(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Share of the gradient's energy outside P, and P's error of orthogonality, after steps on noisy gradients."""
    monkeypatch.setattr(precision, "_keeps_float32", lambda: narrow)
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(288, 288, generator=generator)).Q * torch.arange(1, 289).pow(-0.5)
    W = nn.Parameter(torch.zeros(288, 320))
    optimizer = OSD([{"params": [W], "rank": 128}], lr=2e-3, init="orthonormal")
    for _ in range(30):
        W.grad = U @ torch.randn(288, 320, generator=generator)
        optimizer.step()
    P = optimizer.state[W]["projection"].double()
    Q = torch.linalg.qr(P).Q
    outside = 1 - (Q.mT @ U.double()).square().sum() / U.double().square().sum()
    return float(outside), float((P.mT @ P - torch.eye(128)).norm() / 128**0.5)


def test_p_learns_as_well_from_products_in_bfloat16(monkeypatch):
    (outside, error), (narrow_outside, narrow_error) = learned(False, monkeypatch), learned(True, monkeypatch)
    assert outside != narrow_outside  # or nothing was rounded
    assert abs(narrow_outside - outside) < 0.01 * outside
    assert narrow_error < error + 0.005
