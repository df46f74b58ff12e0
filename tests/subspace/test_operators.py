import pytest
import torch

from hf_osd.subspace import OPERATORS, choose_side, effective_rank


SHAPES = [(12, 20), (20, 12), (16, 16)]
RANK = 5


@pytest.mark.parametrize("side", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_up_is_the_adjoint_of_down(side: str, shape: tuple[int, int]):
    op = OPERATORS[side]
    A = torch.randn(shape, dtype=torch.float64)
    P = torch.randn(op.projected_size(*shape), RANK, dtype=torch.float64)
    B = torch.randn(op.low_rank_shape(*shape, RANK), dtype=torch.float64)
    assert op.down(A, P).shape == B.shape and op.up(B, P).shape == A.shape
    # <down(A), B> = <A, up(B)>; equal up to the rounding of a few hundred float64 products
    torch.testing.assert_close((op.down(A, P) * B).sum(), (A * op.up(B, P)).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_from_the_low_rank_gradient(side: str, shape: tuple[int, int]):
    op = OPERATORS[side]
    G = torch.randn(shape, dtype=torch.float64)
    X = G if side == "left" else G.T
    P = torch.randn(X.shape[0], RANK, dtype=torch.float64)
    R = op.down(G, P)
    torch.testing.assert_close(op.gram(R), P.T @ X @ X.T @ P)
    torch.testing.assert_close(op.correlate(G, R), X @ X.T @ P)
    W = torch.randn(shape, dtype=torch.float64)
    expected = W - 0.3 * op.up(R, P)
    op.add_up_(W, R, P, alpha=-0.3)
    torch.testing.assert_close(W, expected)


def test_side_and_rank_conventions():
    assert [choose_side(*shape) for shape in SHAPES] == ["left", "right", "right"]
    assert choose_side(3, 100, "right") == "right" and choose_side(100, 3, "left") == "left"
    assert effective_rank(8, 100, 5) == 5 and effective_rank(8, 9, 100) == 8
