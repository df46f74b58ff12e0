"""A state that is emptied, popped or exchanged between steps: moments and P start anew, as with torch's optimizers."""

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_osd import OSD


Reset = Callable[[OSD], object]
RESETS: dict[str, Reset] = {
    "clear": lambda optimizer: optimizer.state.clear(),
    "defaultdict": lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
    "dict": lambda optimizer: setattr(optimizer, "state", {}),
    "pop": lambda optimizer: [optimizer.state.pop(p) for p in list(optimizer.state)],
    "inner": lambda optimizer: [entries.clear() for entries in optimizer.state.values()],
}
ROWS = {
    "online_pca": {},
    "random": {"subspace": "random", "update_interval": 3},
    "lion_scaled": {"weight_rule": "lion", "residual": "scaled"},
    "layerwise": {"layerwise": True},
}


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(12, 20), (20, 12), (3, 12, 20), (7,)]]


def make_optimizer(params: list[nn.Parameter], **options) -> OSD:
    return OSD([{"params": params[:3], "rank": 4}, {"params": params[3:]}], lr=1e-2, **options)


def run(params: list[nn.Parameter], optimizer: OSD, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        sum((p * torch.randn(p.shape, generator=generator)).sum() for p in params).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("row", ROWS)
def test_training_goes_on_as_with_a_new_optimizer(row: str, reset: str):
    params = make_params()
    optimizer = make_optimizer(params, **ROWS[row])
    run(params, optimizer, range(4))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    RESETS[reset](optimizer)
    run(params, optimizer, range(4, 8))
    other = make_optimizer(others, **ROWS[row])
    run(others, other, range(4, 8))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        state, expected = optimizer.state[p], other.state[q]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_one_parameter_starts_anew_and_the_others_go_on():
    params, others = make_params(), make_params()
    optimizer, other = make_optimizer(params), make_optimizer(others)
    run(params, optimizer, range(3)), run(others, other, range(3))
    optimizer.state.pop(params[0])
    run(params, optimizer, range(3, 5)), run(others, other, range(3, 5))
    assert optimizer.state[params[0]]["step"] == 2 and optimizer.state[params[0]]["projection"].any()
    assert not torch.equal(params[0], others[0])
    assert all(torch.equal(p, q) for p, q in zip(params[1:], others[1:], strict=True))


def test_a_checkpoint_with_steps_and_no_p_starts_p():
    """As was written by versions that stepped with a P of zero after a reset."""
    params, others = make_params(), make_params()
    optimizer, other = make_optimizer(params), make_optimizer(others)
    run(params, optimizer, range(3))
    saved = optimizer.state_dict()
    saved["state"][0]["projection"].zero_()
    other.load_state_dict(saved)
    before = others[0].detach().clone()
    run(others, other, range(3, 4))
    assert other.state[others[0]]["projection"].any() and not torch.equal(before, others[0])


def test_the_tensors_of_a_state_may_be_exchanged():
    """Between devices and back, as frameworks that offload do: the same training."""
    params, others = make_params(), make_params()
    optimizer, other = make_optimizer(params), make_optimizer(others)
    for step in range(6):
        run(params, optimizer, range(step, step + 1)), run(others, other, range(step, step + 1))
        for p in params:
            for name, value in optimizer.state[p].items():
                optimizer.state[p][name] = value.clone()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_an_entry_of_somebody_else_stays_where_it_is():
    """Wrappers such as schedule-free's keep their own beside ours."""
    params, others = make_params(), make_params()
    optimizer, other = make_optimizer(params), make_optimizer(others)
    for p in params:
        optimizer.state[p]["z"] = p.detach().clone()
    run(params, optimizer, range(4)), run(others, other, range(4))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q) and optimizer.state[p].keys() == {"z"} | other.state[q].keys()


@pytest.mark.parametrize("row", ROWS)
def test_a_state_that_is_dropped_is_freed(row: str):
    params = make_params()
    optimizer = make_optimizer(params, **ROWS[row])
    run(params, optimizer, range(3))
    references = [weakref.ref(value) for entries in optimizer.state.values() for value in entries.values()]
    assert len(references) >= 20
    optimizer.state.clear()
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_a_given_p_is_used_once(caplog):
    """After a reset P starts from the gradient, and a line says so."""
    params = make_params()
    given = [torch.linalg.qr(torch.randn(12, 4)).Q for _ in range(2)]
    optimizer = OSD([{"params": params[:2], "rank": 4, "init": given}], lr=1e-2)
    run(params[:2], optimizer, range(2))
    optimizer.state.clear()
    with caplog.at_level("WARNING", logger="hf_osd"):
        run(params[:2], optimizer, range(2, 4))
    assert [record.getMessage() for record in caplog.records].count(
        "parameter 0 starts P anew: the P given as `init` was used."
    ) == 1
    assert all(optimizer.state[p]["step"] == 2 and optimizer.state[p]["projection"].any() for p in params[:2])
