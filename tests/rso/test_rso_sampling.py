"""E[P Pᵀ] = I for both ways of drawing P, and P depends on its seed and numbers only."""

import pytest
import torch

from hf_osd.rso.sampling import SAMPLINGS, sample


N, R = 12, 5


def draw(sampling: str, interval: int = 0, matrix: int = 0, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return sample((N, R), sampling, seed, interval, matrix, dtype, torch.device("cpu"))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_mean_of_p_pt_is_the_identity(sampling: str):
    draws = 4000
    mean = sum((P := draw(sampling, k)) @ P.mT for k in range(draws)) / draws
    # An entry of P Pᵀ has a standard deviation of at most sqrt(2/r) = 0.63; of the mean of 4000, 0.01: five of them.
    assert (mean - torch.eye(N, dtype=torch.float64)).abs().max() < 0.05


def test_orthonormal_columns_have_norm_sqrt_n_over_r():
    P = draw("orthonormal")
    torch.testing.assert_close(P.mT @ P, N / R * torch.eye(R, dtype=P.dtype), atol=1e-13, rtol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_entry_has_variance_one_over_r(sampling: str):
    P = torch.stack([draw(sampling, k) for k in range(1000)])
    # 60,000 entries: the relative error of their variance is sqrt(2/60000) = 0.6% for independent ones
    assert abs(P.square().mean().item() * R - 1) < 0.03


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_p_is_drawn_from_its_numbers_only(sampling: str):
    P = draw(sampling, 3, 1, seed=7)
    torch.manual_seed(99)
    assert torch.equal(P, draw(sampling, 3, 1, seed=7))
    before = torch.get_rng_state()
    others = [draw(sampling, 1, 3, seed=7), draw(sampling, 3, 1, seed=8), draw(sampling, 4, 1, seed=7)]
    assert torch.equal(before, torch.get_rng_state())  # nobody else's random numbers change
    assert all((P - other).abs().max() > 0.1 for other in others)


def test_low_precision_is_rounded_single_precision():
    single = draw("gaussian", dtype=torch.float32)
    assert torch.equal(draw("gaussian", dtype=torch.bfloat16), single.bfloat16())
