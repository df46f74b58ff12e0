"""The two-sided operator against its definition and autograd, and what operators do with moments when P moves."""

import pytest
import torch

from hf_osd.subspace import SIDES, TwoSided, operator_of
from reference import twin


SHAPES = [(12, 20), (20, 12), (16, 16)]
RANK = 5


def factors(shape: tuple[int, int], orthonormal: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    P, Q = (torch.randn(size, RANK, dtype=torch.float64) for size in shape)
    return (torch.linalg.qr(P).Q, torch.linalg.qr(Q).Q) if orthonormal else (P, Q)


def projection(side: str, shape: tuple[int, int]) -> torch.Tensor:
    P, Q = factors(shape, orthonormal=True)
    return {"left": P, "right": Q, "two_sided": torch.cat([P, Q])}[side]


@pytest.mark.parametrize("shape", SHAPES)
def test_up_is_the_adjoint_of_down(shape: tuple[int, int]):
    op, (P, Q) = TwoSided(shape[0]), factors(shape)
    Z = torch.cat([P, Q])
    A, B = torch.randn(shape, dtype=torch.float64), torch.randn(RANK, RANK, dtype=torch.float64)
    torch.testing.assert_close(op.down(A, Z), P.T @ A @ Q)
    torch.testing.assert_close((op.down(A, Z) * B).sum(), (A * op.up(B, Z)).sum(), rtol=1e-12, atol=1e-12)
    W = torch.randn(shape, dtype=torch.float64)
    expected = W - 0.3 * P @ B @ Q.T
    for rows in (slice(0, 5), slice(5, shape[0])):  # as stochastic rounding takes it
        op.add_up_(W[rows], *op.factors(B, Z, rows), alpha=-0.3)
    torch.testing.assert_close(W, expected)


@pytest.mark.parametrize("lambda_", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_against_autograd(shape: tuple[int, int], lambda_: float):
    op, (P, Q) = TwoSided(shape[0]), factors(shape)
    Z, G = torch.cat([P, Q]), torch.randn(shape, dtype=torch.float64) * 3.7
    inv_norm2, R = 1 / G.square().sum(), op.down(G, Z)
    gP = twin.autograd(lambda X: twin.two_sided_loss(X, Q, G, lambda_), P)
    gQ = twin.autograd(lambda X: twin.two_sided_loss(P, X, G, lambda_), Q)
    gradient = op.pca_gradient(Z, op.correlate(G, R, Z), inv_norm2, lambda_)
    # rounding is about 1e-13 for entries of order 1000
    torch.testing.assert_close(gradient, torch.cat([gP, gQ]), rtol=1e-12, atol=1e-10)
    loss = op.pca_loss(Z, op.gram(R), inv_norm2)
    torch.testing.assert_close(loss, twin.two_sided_loss(P, Q, G, 0.0), rtol=1e-12, atol=0)


def test_top_singular_vectors_of_both_sides_are_stationary():
    G = torch.randn(12, 20, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    op, Z = TwoSided(12), torch.cat([U[:, :RANK], Vh[:RANK].T])
    gradient = op.pca_gradient(Z, op.correlate(G, op.down(G, Z), Z), 1 / G.square().sum(), 0.1)
    assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_correlate_up_is_correlate_of_up(shape: tuple[int, int], side: str):
    op, Z = operator_of(side, shape[0]), projection(side, shape) * 1.3
    D = torch.randn(op.low_rank_shape(*shape, RANK), dtype=torch.float64)
    R = torch.randn_like(D)
    torch.testing.assert_close(op.correlate_up(D, R, Z), op.correlate(op.up(D, Z), R, Z))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_carrying_is_down_of_up_and_keeps_what_stays(shape: tuple[int, int], side: str):
    op, old, new = operator_of(side, shape[0]), projection(side, shape), projection(side, shape)
    D = torch.randn(op.low_rank_shape(*shape, RANK), dtype=torch.float64)
    torch.testing.assert_close(op.carry(D, new, old), op.down(op.up(D, old), new))
    torch.testing.assert_close(op.carry(D, old, old), D)  # P has not moved
    torch.testing.assert_close(op.carry(D, old, old, square=True), D)
    # turned within its span: another D, the same image
    turn = torch.linalg.qr(torch.randn(RANK, RANK, dtype=torch.float64)).Q
    turned = op.carry(D, old @ turn, old)
    assert not torch.allclose(turned, D)
    torch.testing.assert_close(op.up(turned, old @ turn), op.up(D, old))
