"""Each rule against an independent account of what it does."""

import numpy as np
import pytest
import scipy.fft
import torch
from scipy.linalg import subspace_angles
from torch import Tensor, nn

from hf_osd import OSD
from hf_osd.subspace import Cosine, Importance, PowerIteration, Random, Start
from hf_osd.subspace.cosine import cosine_energies


F64 = torch.float64
SHAPES = {"left": (12, 20), "right": (20, 12)}
both_sides = pytest.mark.parametrize("side", SHAPES)


def start(side: str = "left", rank: int = 4, init: str = "svd", seed: int = 0, steps: int = 0) -> Start:
    return Start(side, rank, init, seed, steps, F64)


def optimizer_of(W: nn.Parameter, subspace: str, rank: int = 4, **options) -> OSD:
    return OSD([{"params": [W], "rank": rank}], lr=1e-3, subspace=subspace, **options)


def projections(shape: tuple[int, int], subspace: str, steps: int, gradient=None, **options) -> list[Tensor]:
    """P after each step."""
    W = nn.Parameter(torch.zeros(shape, dtype=F64))
    optimizer, found = optimizer_of(W, subspace, **options), []
    for _ in range(steps):
        W.grad = torch.randn(shape, dtype=F64) if gradient is None else gradient.clone()
        optimizer.step()
        found.append(optimizer.weight_of(W).P.read().clone())
    return found


def dct_basis(s: int) -> Tensor:
    """Columns q_k: scipy's orthonormal DCT-II is x -> Qᵀ x."""
    return torch.from_numpy(scipy.fft.dct(np.eye(s), type=2, norm="ortho", axis=0)).T.contiguous()


@pytest.mark.parametrize("s", [7, 12, 64])
def test_cosine_columns_are_scipys_and_energies_explicit(s: int):
    Q = dct_basis(s)
    P = Cosine().expand(torch.arange(s), s, s, F64)
    torch.testing.assert_close(P, Q, rtol=0, atol=1e-13)
    torch.testing.assert_close(P.T @ P, torch.eye(s, dtype=F64), rtol=0, atol=1e-13)
    X = torch.randn(s, 700, dtype=F64)  # more columns than are transformed at once
    torch.testing.assert_close(cosine_energies(X, F64), (Q.T @ X).square().sum(1))


@both_sides
def test_cosine_takes_the_best_columns_and_those_that_stay_keep_their_place(side: str):
    rule, G = Cosine(), torch.randn(SHAPES[side], dtype=F64)
    Q = dct_basis(12)
    energies = (Q.T @ (G if side == "left" else G.T)).square().sum(1)
    best = set(energies.topk(4).indices.tolist())
    assert set(rule.make(G, start(side), None).tolist()) == best
    stay, leave = sorted(best)[:2], sorted(set(range(12)) - best)[:2]
    old = torch.tensor([leave[0], stay[1], leave[1], stay[0]])
    new = rule.make(G, start(side), old).tolist()
    assert set(new) == best and (new[1], new[3]) == (stay[1], stay[0])


@both_sides
@pytest.mark.parametrize("init", ["svd", "randomized_svd"])
def test_importance_draws_in_proportion_to_singular_values(side: str, init: str):
    """Without replacement: frequencies against those of numpy's sequential draws, and vectors of the matrix itself."""
    weights, rank, draws = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], dtype=F64), 3, 800
    U, V = (torch.linalg.qr(torch.randn(size, 6, dtype=F64)).Q for size in SHAPES[side])
    G = (U * weights) @ V.T
    basis = U if side == "left" else V
    hits, expected = torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64)
    generator = np.random.default_rng(0)
    for seed in range(draws):
        P = Importance().make(G, start(side, rank, init, seed), None)
        overlap = (basis.T @ P).square()
        torch.testing.assert_close(overlap.sum(0), torch.ones(rank, dtype=F64))
        hits += overlap.sum(1)
        expected[generator.choice(6, rank, replace=False, p=(weights / weights.sum()).numpy())] += 1
    # two samples of a binomial: 4.5 standard deviations of their difference, over 6 frequencies
    tolerance = 4.5 * (2 * 0.25 / draws) ** 0.5
    torch.testing.assert_close(hits / draws, expected / draws, rtol=0, atol=tolerance)
    assert float((hits / draws).max() - (hits / draws).min()) > 5 * tolerance  # not uniform


def test_importance_pairs_the_factors_of_a_two_sided_weight_and_starts_orthonormal_where_asked():
    G = torch.randn(12, 20, dtype=F64)
    P, Q = (projections((12, 20), "importance", 1, G, side="two_sided")[0]).split([12, 20])
    R = P.T @ G @ Q
    assert (R - R.diag().diag()).abs().max() < 1e-12 and R.diagonal().abs().min() > 0
    singular = torch.linalg.svd(G, full_matrices=False)[0]
    random = projections((12, 20), "importance", 1, G, init="orthonormal")[0]
    assert (singular.T @ random).abs().max() < 0.999  # no column is a singular vector


def test_orthonormal_factors_of_a_square_weight_differ():
    P, Q = projections((12, 12), "static", 1, side="two_sided", init="orthonormal")[0].split(12)
    assert (P.T @ Q).abs().max() < 0.999 and not torch.allclose(P, Q)


@pytest.mark.parametrize("distribution", ["orthonormal", "gaussian"])
def test_random_subspaces_favour_no_direction(distribution: str):
    s, rank, draws = 12, 4, 4000
    rule = Random(distribution)
    G, mean, squares = torch.zeros(s, 20, dtype=F64), torch.zeros(s, s, dtype=F64), torch.zeros(s, s, dtype=F64)
    for seed in range(draws):
        P = rule.expand(rule.make(G, start(seed=seed), None), s, rank, F64)
        if distribution == "orthonormal":
            torch.testing.assert_close(P.T @ P, torch.eye(rank, dtype=F64))
        mean += P @ P.T / draws
        squares += (P @ P.T).square() / draws
    # E[P Pᵀ] = r / s I; 5 standard errors of each of 144 entries
    error = (squares - mean.square()).sqrt() / draws**0.5
    assert ((mean - rank / s * torch.eye(s, dtype=F64)).abs() < 5 * error).all()


@pytest.mark.parametrize("side", ["auto", "two_sided"])
def test_random_subspaces_change_every_k_steps_and_come_from_a_seed_of_8_bytes(side: str):
    def run(seed: int, scale: float = 1.0) -> list[Tensor]:
        torch.manual_seed(int(scale))
        options = {"update_interval": 3, "seed": seed, "side": side}
        return projections((12, 12), "random", 7, scale * torch.randn(12, 12, dtype=F64), **options)

    first = run(0)
    changed = [t for t in range(1, 7) if not torch.equal(first[t], first[t - 1])]
    assert changed == [3, 6]
    assert all(
        torch.equal(a, b) for a, b in zip(first, run(0, 3.0), strict=True)
    )  # whatever gradients and global seed
    assert not torch.allclose(first[0], run(1)[0])
    if side == "two_sided":
        assert not torch.allclose(*first[0].split(12))
    W = nn.Parameter(torch.zeros(12, 20))
    optimizer = optimizer_of(W, "random", side=side)
    W.grad = torch.randn(12, 20)
    optimizer.step()
    seeds = optimizer.state[W]["projection_seed"]
    assert seeds.nbytes == (16 if side == "two_sided" else 8) and "projection" not in optimizer.state[W]


def dominant(s: int, long: int) -> Tensor:
    U, V = (torch.linalg.qr(torch.randn(size, min(s, long), dtype=F64)).Q for size in (s, long))
    return (U * 0.6 ** torch.arange(min(s, long), dtype=F64)) @ V.T


@both_sides
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_power_iteration_is_the_qr_of_a_full_size_product(side: str, rule: str):
    """B = rho up(m) + (1 - rho) G, P <- orth(B down(B)ᵀ), with full-size B; m is the momentum before the step."""
    rho, shape = 0.7, SHAPES[side]
    W = nn.Parameter(torch.zeros(shape, dtype=F64))
    P = torch.linalg.qr(torch.randn(12, 4, dtype=F64)).Q
    optimizer = OSD([{"params": [W], "rank": 4, "init": [P]}], subspace="power", mixing=rho, weight_rule=rule)
    m = torch.zeros(4, 20, dtype=F64)
    for _ in range(12):
        W.grad = torch.randn(shape, dtype=F64)
        optimizer.step()
        G = W.grad if side == "left" else W.grad.T
        B = rho * P @ m + (1 - rho) * G
        Q, T = torch.linalg.qr(B @ (P.T @ B).T)
        m = (0.9 * m + 0.1 * P.T @ G) if rule == "adamw" else (0.99 * m + 0.01 * P.T @ G)
        P = Q * T.diagonal().sign()
        torch.testing.assert_close(optimizer.state[W]["projection"], P, rtol=0, atol=1e-10)


@both_sides
@pytest.mark.parametrize(("mixing", "steps"), [(0.0, 60), (0.9, 400)])
def test_power_iteration_finds_the_top_singular_subspace(side: str, mixing: float, steps: int):
    """Of a fixed gradient, started at random, with moments that are carried along."""
    G = dominant(*SHAPES[side])
    options = {"init": "orthonormal", "mixing": mixing, "carry_moments": True}
    P = projections(SHAPES[side], "power", steps, G, **options)[-1]
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    top = U[:, :4] if side == "left" else Vh[:4].T
    assert np.max(subspace_angles(P.numpy(), top.numpy())) < 1e-6
    torch.testing.assert_close(P.T @ P, torch.eye(4, dtype=F64))


def test_power_iteration_keeps_p_where_the_gradient_is_zero():
    rule = PowerIteration()
    assert rule.mixes == 0.9 and not rule.two_sided
    first, *_, last = projections((12, 20), "power", 3, torch.zeros(12, 20, dtype=F64))
    assert torch.equal(first, last)
