"""E[P Pᵀ] = I for both ways of drawing P, and what is logged of such a P is what is logged of one of length 1."""

import pytest
import torch
from torch import nn

from hf_osd import OSD, Start
from hf_osd.subspace.random import DISTRIBUTIONS, Random


N, R = 12, 5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_of_p_pt_is_the_identity(distribution: str):
    rule, draws = Random(distribution=distribution, unbiased=True), 4000
    codes = [rule.make(torch.empty(0), Start("right", R, "auto", 1, k, torch.float64), None) for k in range(draws)]
    mean = sum((P := rule.expand(code, N, R, torch.float64)) @ P.mT for code in codes) / draws
    # An entry of P Pᵀ has a standard deviation of at most sqrt(2/r) = 0.63; of the mean of 4000, 0.01: five of them.
    assert (mean - torch.eye(N, dtype=torch.float64)).abs().max() < 0.05
    square = torch.stack([rule.expand(code, N, R, torch.float64) for code in codes]).square().mean()
    assert abs(square.item() * R - 1) < 0.02  # entries have variance 1/r, the paper's


@pytest.mark.parametrize("side", ["left", "right", "two_sided"])
def test_statistics_do_not_depend_on_the_length_of_p(side: str):
    def seen(unbiased: bool) -> dict[str, float]:
        torch.manual_seed(0)
        W = nn.Parameter(torch.randn(N, 2 * N, dtype=torch.float64))
        optimizer = OSD([{"params": [W], "rank": R}], subspace="random", side=side, unbiased=unbiased)
        optimizer.collect_statistics = True
        W.grad = torch.randn(N, 2 * N, dtype=torch.float64)
        optimizer.step()
        return optimizer.statistics()

    found = seen(unbiased=True)
    assert found == pytest.approx(seen(unbiased=False), abs=1e-12)
    assert 0 < found["pca_loss"] < 1 and found["orthogonality"] < 1e-12
