"""Two processes train as one, exchange r m numbers for a weight, and draw the same P, also where FSDP2 divides W."""

import sys
from pathlib import Path

import pytest
import rso_processes
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from processes import run


@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path: Path):
    scenarios = [rso_processes.two_processes, rso_processes.sharded]
    assert run(2, scenarios, tmp_path) == {"two_processes": "", "sharded": ""}
    (a, state, exchanged), (b, other, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    expected, *_ = rso_processes.train()
    for name, value in expected.items():
        assert torch.equal(a[name], b[name]), name
        # float64: rounding of 1e-16 in the gradients, which Adam's first steps divide by themselves
        torch.testing.assert_close(a[name], value, rtol=1e-9, atol=1e-9)
        divided = torch.load(tmp_path / "sharded0.pt")[name]
        torch.testing.assert_close(divided, value, rtol=1e-9, atol=1e-9)
    for own, others in zip(state, other, strict=True):
        assert own.keys() == others.keys() and all(torch.equal(value, others[key]) for key, value in own.items())
    assert exchanged == 8 * (6 * (40 + 16) + 40 + 16)  # R of two layers, and the biases
