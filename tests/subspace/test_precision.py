"""The precision of products that only P sees, which is a setting of the whole process."""

import pytest
import torch

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
