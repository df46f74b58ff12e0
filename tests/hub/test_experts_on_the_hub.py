"""P of experts' stacks: saved, checked, shown, and started from like any other, with experts that have none yet."""

import json

import pytest
import torch
from torch import nn

from hf_osd import OSD
from hf_osd.cli.main import main
from hf_osd.hub import Projection, ProjectionFileError, ProjectionState, projection_bytes
from hf_osd.hub.analysis import orthogonality, share_of_change
from hf_osd.hub.config import CONFIG_NAME
from hf_osd.update_rules import RULES


EXPERTS, M, N, RANK = 3, 96, 160, 48  # moments and P are large enough to be kept in 8 bits
NAME = "layers.0.mlp.experts.gate_up_proj"


def trained(init="auto", steps: int = 3, tokens: int = 2, **options) -> tuple[nn.Parameter, OSD]:
    """The first `tokens` experts have some."""
    p = nn.Parameter(torch.randn(EXPERTS, M, N, generator=torch.Generator().manual_seed(5)))
    optimizer = OSD([{"params": [(NAME, p)], "rank": RANK, "init": init}], lr=1e-3, **options)
    for step in range(steps):
        p.grad = torch.randn(EXPERTS, M, N, generator=torch.Generator().manual_seed(step))
        p.grad[tokens:] = 0
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("rule", RULES)
def test_all_state_goes_to_files_and_back(rule: str, tmp_path):
    p, optimizer = trained(weight_rule=rule)
    saved = ProjectionState.from_optimizer(optimizer, include_moments=True)
    saved.save_pretrained(tmp_path)
    entry = ProjectionState.from_pretrained(tmp_path)[NAME]
    assert entry.shape == (EXPERTS, M, N) and (entry.side, entry.rank) == ("left", RANK)
    held = dict(optimizer.state[p])
    assert torch.equal(entry.projection, held.pop("projection")) and not entry.projection[2].any()
    assert entry.moments.keys() == held.keys() and ProjectionState.from_pretrained(tmp_path).config["step"] == 3
    for name, value in held.items():
        assert entry.moments[name].dtype == value.dtype and torch.equal(entry.moments[name], value)
    size = sum(v.numel() * v.element_size() for v in optimizer.state[p].values())
    assert projection_bytes([entry.shape], RANK, include_moments=True, weight_rule=rule) == size
    assert projection_bytes([entry.shape], RANK) == 4 * EXPERTS * M * RANK


def test_a_run_starts_from_it_and_an_expert_without_p_from_its_gradient():
    state = ProjectionState.from_optimizer(trained()[1])
    p, optimizer = trained(init=state.initial_projections(), steps=1, tokens=EXPERTS, subspace="static")
    P = optimizer.state[p]["projection"]
    assert torch.equal(P[:2], state[NAME].projection[:2])
    torch.testing.assert_close(P[2], torch.linalg.svd(p.grad[2], full_matrices=False)[0][:, :RANK])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [M, N]}, "P of .* has the shape"),
        ({"shape": [EXPERTS + 1, M, N]}, "P of .* has the shape"),
        ({"shape": [1, EXPERTS, M, N]}, r"expected \[m, n\] or \[experts, m, n\]"),
        ({"rank": M + 1}, "larger than its matrix"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict, message: str, tmp_path):
    ProjectionState.from_optimizer(trained()[1]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    config["parameters"][NAME] |= change
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ProjectionFileError, match=message):
        ProjectionState.from_pretrained(tmp_path)


@pytest.mark.parametrize("shape", [(RANK, N), (EXPERTS + 1, RANK, N), (EXPERTS, RANK, N, 1)])
def test_a_moment_of_another_shape_is_refused(shape: tuple[int, ...]):
    P = torch.randn(EXPERTS, M, RANK)
    with pytest.raises(ValueError, match="exp_avg of .* cannot be"):
        ProjectionState({NAME: Projection(P, "left", RANK, (EXPERTS, M, N), {"exp_avg": torch.zeros(shape)})})


@pytest.mark.parametrize("side", ["left", "right"])
def test_analysis_adds_up_the_experts_that_have_a_p(side: str):
    P = torch.linalg.qr(torch.randn(EXPERTS, M if side == "left" else N, RANK)).Q
    P[1] *= 1.5
    P[2] = 0
    change = torch.randn(EXPERTS, M, N)
    change[2] = 0
    entry = Projection(P, side, RANK, (EXPERTS, M, N))
    one = [Projection(P[e], side, RANK, (M, N)) for e in range(2)]
    energy = [float(change[e].square().sum()) for e in range(2)]
    inside = sum(share_of_change(one[e], change[e]) * energy[e] for e in range(2))
    # float32 sums in another order
    assert share_of_change(entry, change) == pytest.approx(inside / sum(energy), rel=1e-5)
    assert orthogonality(P) == pytest.approx((0 + (1.5**2 - 1)) / 2, rel=1e-5)
    assert orthogonality(torch.zeros_like(P)) == 1


def test_the_table(tmp_path, capsys):
    ProjectionState.from_optimizer(trained()[1]).save_pretrained(tmp_path)
    main(["show", str(tmp_path)])
    assert f"{EXPERTS} x {M} x {N}" in capsys.readouterr().out
