"""B A is the best approximation of its rank, in balanced form, and says truly what it keeps."""

import numpy as np
import pytest
import torch

from hf_osd.interop.low_rank import balanced_factors


def matrix(m: int, n: int, decay: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Singular values i^-decay, random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.randn(size, min(m, n), generator=generator, dtype=torch.float64) for size in (m, n))
    values = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -decay
    return (torch.linalg.qr(U).Q * values) @ torch.linalg.qr(V).Q.mT


def energies(dW: torch.Tensor) -> np.ndarray:
    values = np.linalg.svd(dW.numpy(), compute_uv=False) ** 2
    return values / values.sum()


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 100])
def test_it_is_the_truncated_svd(m, n, rank):
    dW, r = matrix(m, n), min(rank, m, n)
    B, A, kept = balanced_factors(dW, rank, None, None, exact=False)
    U, S, Vh = np.linalg.svd(dW.numpy(), full_matrices=False)
    np.testing.assert_allclose((B @ A).numpy(), (U[:, :r] * S[:r]) @ Vh[:r], atol=1e-13)  # float64 rounding
    assert kept == pytest.approx(energies(dW)[:r].sum(), abs=1e-13)
    for gram in (B.mT @ B, A @ A.mT):  # balanced: both are S
        np.testing.assert_allclose(gram.numpy(), np.diag(S[:r]), atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_the_smallest_rank_that_keeps_an_energy(m, n, energy):
    dW = matrix(m, n)
    r = int((np.cumsum(energies(dW)) < energy - 1e-12).sum()) + 1
    B, A, kept = balanced_factors(dW, None, energy, None, exact=False)
    assert (B.shape, A.shape) == ((m, r), (r, n)) and kept >= energy - 1e-12
    assert balanced_factors(dW, None, energy, 3, exact=False)[1].shape[0] == min(r, 3)


def test_a_change_of_low_rank_has_finite_factors():
    dW = torch.outer(torch.ones(6, dtype=torch.float64), torch.arange(9, dtype=torch.float64))
    for change, rank in ((dW, 6), (torch.zeros_like(dW), 1)):
        B, A, kept = balanced_factors(change, rank, None, None, exact=False)
        assert B.float().isfinite().all() and A.float().isfinite().all() and kept == pytest.approx(1)
        np.testing.assert_allclose((B @ A).numpy(), change.numpy(), atol=1e-12)
    assert balanced_factors(dW, None, 0.999999, None, exact=False)[1].shape[0] == 1


@pytest.mark.parametrize(("m", "n"), [(1030, 1050), (1050, 1030)])
def test_large_matrices_are_approximated_and_say_what_they_keep(m, n):
    dW = matrix(m, n, decay=0.5)
    B, A, kept = balanced_factors(dW, 8, None, None, exact=False)
    # 1e-6: the basis is orthonormal to float32
    assert kept == pytest.approx(1 - float((dW - B @ A).square().sum() / dW.square().sum()), abs=1e-6)
    best = balanced_factors(dW, 8, None, None, exact=True)[2]
    steps = torch.arange(1, min(m, n) + 1, dtype=torch.float64)
    assert best == pytest.approx(float((1 / steps[:8]).sum() / (1 / steps).sum()), abs=1e-12)
    assert 0.99 * best < kept < best  # as the docstring says
    again = balanced_factors(dW, 8, None, None, exact=False)
    assert torch.equal(again[0], B) and torch.equal(again[1], A)
