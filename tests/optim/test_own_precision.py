"""A step is the same wherever it is called: inside autocast, and whatever the default device is."""

import pytest
import torch
from conformance import ROWS, assert_same, backward, gradients, make, run, weights
from torch import Tensor, nn

from hf_osd import OSD
from hf_osd.subspace.initialization import INITS


AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("row", ROWS)
def test_autocast_changes_no_step(row: str):
    params, others = weights(row), weights(row)
    optimizer, other = make(row, params), make(row, others)
    for step in range(4):
        run(params, optimizer, range(step, step + 1))
        for p, G in zip(others, gradients(step, others), strict=True):
            p.grad = G
        with AUTOCAST:
            other.step()
    assert_same((params, optimizer), (others, other))


@pytest.mark.parametrize("row", ["online_pca", "online_pca_scaled", "svd", "random", "cosine_right_carry"])
@pytest.mark.parametrize("clipping", [{}, {"max_grad_norm": 0.1, "layerwise_clipping": "parameter"}])
def test_autocast_changes_no_layerwise_step(row: str, clipping: dict):
    """The graph is made outside, so that gradients are the same ones."""

    def trained(inside: bool) -> tuple[list[nn.Parameter], OSD]:
        params = weights(row)
        optimizer = make(row, params, layerwise=True, **clipping)
        for step in range(4):
            losses = [(p * G).sum() for p, G in zip(params, gradients(step, params), strict=True)]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                sum(losses).backward()
                optimizer.step()
        return params, optimizer

    assert_same(trained(False), trained(True))


def test_autocast_goes_on_after_a_step():
    params = weights("online_pca")
    optimizer = make("online_pca", params)
    with AUTOCAST:
        backward(params, 0)
        optimizer.step()
        assert (params[0] @ params[1]).dtype == torch.bfloat16


@pytest.mark.parametrize(("subspace", "init"), [("online_pca", init) for init in INITS] + [
    (name, "auto") for name in ("random", "cosine", "importance", "power")
])  # fmt: skip
def test_the_default_device_changes_nothing(subspace: str, init: str):
    def trained(device: str) -> Tensor:
        W = nn.Parameter(torch.ones(520, 530))
        with torch.device(device):
            optimizer = OSD([W], lr=1e-2, rank=6, subspace=subspace, init=init)
            for step in range(2):
                W.grad = torch.randn(W.shape, generator=torch.Generator("cpu").manual_seed(step), device="cpu")
                optimizer.step()
        return W.detach()

    assert torch.equal(trained("cpu"), trained("meta"))
