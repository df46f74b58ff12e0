import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from hf_osd import OSD
from hf_osd.subspace import OPERATORS, pca_gradient, pca_loss
from reference import twin


def problem(shape: tuple[int, int], side: str, rank: int):
    """A gradient and a P that is far from orthonormal, in float64."""
    op = OPERATORS[side]
    G = torch.randn(shape, dtype=torch.float64) * 3.7
    P = torch.randn(op.projected_size(*shape), rank, dtype=torch.float64)
    return op, G, P, 1 / G.square().sum()


@pytest.mark.parametrize("lambda_", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("side", OPERATORS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_closed_form_equals_autograd(shape: tuple[int, int], side: str, lambda_: float):
    op, G, P, inv_norm2 = problem(shape, side, rank=5)
    X = G if side == "left" else G.T
    R = op.down(G, P)
    gradient = pca_gradient(P, op.correlate(G, R), inv_norm2, lambda_)
    expected = twin.autograd(twin.pca_loss, P, X, lambda_)
    # the required 1e-10; rounding is about 1e-13 for entries of order 100
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
    loss = pca_loss(P, op.gram(R), inv_norm2, lambda_)
    torch.testing.assert_close(loss, twin.pca_loss(P, X, lambda_), rtol=1e-12, atol=0)


def test_top_singular_vectors_are_stationary():
    op, G, _, inv_norm2 = problem((12, 20), "left", rank=5)
    P = twin.top_singular_vectors(G, 5)
    gradient = pca_gradient(P, op.correlate(G, op.down(G, P)), inv_norm2, 0.1)
    assert gradient.abs().max() < 1e-13  # zero but for rounding: why a P made from a gradient is not moved by it


def test_zero_gradient_keeps_everything_finite():
    op, G, P, _ = problem((12, 20), "left", rank=5)
    G.zero_()
    A, inv_norm2 = op.correlate(G, op.down(G, P)), torch.tensor(1e30, dtype=torch.float64)
    gradient = pca_gradient(P, A, inv_norm2, 0.1)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("shape", "side"), [((24, 60), "left"), ((60, 24), "right")])
def test_converges_to_the_planted_subspace(shape: tuple[int, int], side: str):
    """P, started at random, finds the principal subspace of a stream of gradients; scikit-learn's PCA is the judge."""
    rank, steps = 4, 1500
    generator = torch.Generator().manual_seed(1)
    s, long = min(shape), max(shape)
    basis = torch.linalg.qr(torch.randn(s, rank, generator=generator)).Q
    W = torch.nn.Parameter(torch.zeros(shape))
    optimizer = OSD([{"params": [W], "rank": rank, "init": "orthonormal"}], lr=1e-2, alpha=1.0, side=side)
    columns = []
    for step in range(steps):
        X = basis @ torch.randn(rank, long, generator=generator) + 0.05 * torch.randn(s, long, generator=generator)
        columns.append(X if step % 10 == 0 else X[:, :0])
        W.grad = X if side == "left" else X.T.contiguous()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
    pca = PCA(n_components=rank).fit(torch.cat(columns, dim=1).T.numpy())
    P = optimizer.state[W]["projection"].numpy()
    assert np.max(subspace_angles(P, pca.components_.T)) < 0.05  # rad, the required figure
    assert np.linalg.norm(P.T @ P - np.eye(rank)) < 0.1  # held orthonormal by lambda alone


def test_loss_falls_on_a_fixed_gradient():
    G = torch.randn(20, 50)
    W = torch.nn.Parameter(torch.zeros(20, 50))
    optimizer = OSD([{"params": [W], "rank": 4, "init": "orthonormal"}], lr=1e-3)
    optimizer.collect_statistics = True
    losses = []
    for _ in range(200):
        W.grad = G
        optimizer.step()
        losses.append(optimizer.statistics()["pca_loss"])
    best = 1 - torch.linalg.svdvals(G)[:4].square().sum() / G.square().sum()
    assert losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(float(best), abs=0.01)  # Adam's steps of 5e-3 keep it from settling closer
