"""A rank that is given for all parameters: as frameworks call an optimizer's class."""

import pytest
import torch
from torch import nn

from hf_osd import OSD


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"subspace": "svd"}, {"residual": "scaled"}])
@pytest.mark.parametrize("named", [False, True])
def test_the_rank_of_the_optimizer_is_for_what_is_a_matrix(options, named: bool):
    """Frameworks call `Class(model.parameters(), **options)`, or with groups of their own."""

    def run(groups) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 8))
        rank, made = groups([*model.named_parameters()] if named else [*model.parameters()])
        optimizer = OSD(made, lr=0.1, rank=rank, **options)
        for _ in range(3):
            model(torch.randn(5, 1, 4, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [tuple(p.shape) for p in model.parameters() if "projection" in optimizer.state[p]] == [
            (12, 16),
            (8, 12),
        ]
        optimizer.load_state_dict(optimizer.state_dict())
        return [*model.parameters()]

    def is_matrix(entry) -> bool:
        return (entry[1] if named else entry).ndim == 2

    def apart(params):
        matrices = {"params": [p for p in params if is_matrix(p)], "rank": 3, "seed": 0}
        return None, [matrices, {"params": [p for p in params if not is_matrix(p)]}]

    def decayed(params):  # as Trainer groups them: vectors alone in a group, the convolution beside matrices
        vectors = [p for p in params if (p[1] if named else p).ndim < 2]
        return 3, [{"params": [p for p in params if not any(p is q for q in vectors)]}, {"params": vectors}]

    alone = run(apart)
    for groups in (lambda params: (3, params), decayed):
        for p, q in zip(run(groups), alone, strict=True):
            torch.testing.assert_close(p, q)


def test_a_group_that_is_added_has_the_rank_of_the_optimizer_for_its_matrices():
    optimizer = OSD([parameter(8, 12)], rank=4)
    optimizer.add_param_group({"params": [parameter(9), parameter(12, 9)]})
    optimizer.add_param_group({"params": [parameter(9)]})
    for shape in ((9,), (0, 9)):
        with pytest.raises(ValueError, match="cannot be projected"):
            optimizer.add_param_group({"params": [parameter(*shape)], "rank": 2})
    assert [group["rank"] for group in optimizer.param_groups] == [4, 4, None]


def test_a_given_projection_is_for_the_matrices_of_a_group():
    params = [("a", parameter(8, 12)), ("bias", parameter(8)), ("b", parameter(12, 9))]
    P = {"a": torch.eye(8)[:, :2], "b": torch.eye(9)[:, :2]}
    for init in (P, list(P.values())):
        optimizer = OSD(params, rank=2, init=init, alpha=0.0)
        for _, p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert all(torch.equal(optimizer.state[p]["projection"], P[name]) for name, p in params if name in P)
