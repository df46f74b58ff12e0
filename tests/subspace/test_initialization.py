import pytest
import torch

from hf_osd.subspace import choose_init, initial_projection


def decaying(m: int, n: int, power: float) -> torch.Tensor:
    """A matrix with singular values 1 / i^power: gradients of trained models look like power about 0.5 to 1."""
    k = min(m, n)
    U, V = torch.linalg.qr(torch.randn(m, k)).Q, torch.linalg.qr(torch.randn(n, k)).Q
    return (U * torch.arange(1, k + 1) ** -power) @ V.T


def energy(P: torch.Tensor, X: torch.Tensor) -> float:
    return float((P.T @ X).square().sum() / X.square().sum())


@pytest.mark.parametrize("init", ["svd", "randomized_svd", "orthonormal"])
@pytest.mark.parametrize(("shape", "side"), [((40, 90), "left"), ((90, 40), "right"), ((90, 40), "left")])
def test_shape_and_orthonormal_columns(shape: tuple[int, int], side: str, init: str):
    P = initial_projection(torch.randn(shape), side, 7, init, seed=3, dtype=torch.float32)
    assert P.shape == (shape[0] if side == "left" else shape[1], 7) and P.is_contiguous()
    torch.testing.assert_close(P.T @ P, torch.eye(7), atol=1e-5, rtol=0)  # float32 rounding of QR and eigh


@pytest.mark.parametrize("power", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_randomized_svd_captures_the_energy_of_the_exact_one(side: str, power: float):
    G = decaying(300, 500, power)
    X = G if side == "left" else G.T
    exact, randomized = (initial_projection(G, side, 24, init, 0, torch.float32) for init in ("svd", "randomized_svd"))
    # within the 2% that the package promises of its default
    assert energy(randomized, X) > 0.98 * energy(exact, X)


@pytest.mark.parametrize("init", ["randomized_svd", "orthonormal"])
def test_seeded_apart_from_the_global_random_state(init: str):
    G = torch.randn(30, 50)
    state = torch.get_rng_state()
    first = initial_projection(G, "left", 4, init, 5, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first, initial_projection(G, "left", 4, init, 5, torch.float32))
    if init == "orthonormal":
        assert not torch.allclose(first, initial_projection(G, "left", 4, init, 6, torch.float32))


def test_the_default_is_exact_for_small_and_randomized_for_large():
    assert choose_init(512, 1376, 128) == "svd"
    assert choose_init(2048, 5461, 128) == "randomized_svd"
    assert choose_init(2048, 5461, 1024) == "svd"  # a sketch as wide as the matrix saves nothing
    assert choose_init(2048, 5461, 128, "svd") == "svd"
