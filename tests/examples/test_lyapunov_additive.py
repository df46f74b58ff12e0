import pytest
import torch

from hf_osd.subspace import OPERATORS
from lyapunov_additive import Additive


SHAPES = [(12, 20), (20, 12), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_up_is_the_adjoint_of_down(shape: tuple[int, int]):
    m, n = shape
    P, Q = (torch.randn(size, size, dtype=torch.float64) for size in shape)
    X, G = torch.randn(2, m, n, dtype=torch.float64)
    assert Additive.down(G, P, Q).shape == Additive.up(X, P, Q).shape == (m, n)
    # <down(G), X> = <G, up(X)>; equal up to the rounding of a few thousand float64 products
    torch.testing.assert_close(
        (Additive.down(G, P, Q) * X).sum(), (G * Additive.up(X, P, Q)).sum(), rtol=1e-12, atol=1e-10
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_up_and_down_against_their_matrices(shape: tuple[int, int]):
    m, n = shape
    P, Q = (torch.randn(size, size, dtype=torch.float64) for size in shape)
    X = torch.randn(m, n, dtype=torch.float64)
    # vec(P X + X Q) = (P ⊗ I + I ⊗ Qᵀ) vec(X), row by row; `down` is its transpose
    matrix = torch.kron(P, torch.eye(n, dtype=P.dtype)) + torch.kron(torch.eye(m, dtype=P.dtype), Q.T.contiguous())
    torch.testing.assert_close(Additive.up(X, P, Q).flatten(), matrix @ X.flatten())
    torch.testing.assert_close(Additive.down(X, P, Q).flatten(), matrix.T @ X.flatten())


def test_without_q_it_is_the_left_side_at_full_rank():
    P, G = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, 20, dtype=torch.float64)
    none = torch.zeros(20, 20, dtype=torch.float64)
    torch.testing.assert_close(Additive.down(G, P, none), OPERATORS["left"].down(G, P))
    torch.testing.assert_close(Additive.up(G, P, none), OPERATORS["left"].up(G, P))
