"""A run is the list of its rho: kilobytes, of which the weights are made again bit for bit."""

import copy
import logging

import pytest
import torch
from nets import Net, ids
from torch import nn

from hf_osd.hub.checks import ProjectionFileError
from hf_osd.subzero import SubZero, SubZeroLog, replay
from reference.tiny_models import tiny_llama


def run(net: nn.Module, steps: int = 7, **options) -> SubZero:
    optimizer = SubZero(net, lr=1e-2, **{"rank": 4, "update_interval": 3, "weight_decay": 0.1, "queries": 2} | options)
    tokens = torch.randint(64, (2, 8))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        loss = (lambda: net(input_ids=tokens, labels=tokens).loss) if hasattr(net, "config") else None
        optimizer.step(loss or (lambda: net.loss(ids())))
    return optimizer


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_is_bit_for_bit_the_run(dtype: torch.dtype, tmp_path, caplog):
    base = tiny_llama().to(dtype)
    net = copy.deepcopy(base)
    optimizer = run(net)
    path = SubZeroLog.from_optimizer(optimizer).save_pretrained(tmp_path)
    assert path.stat().st_size < 10_000 and not same(net, base)
    again = copy.deepcopy(base)
    with caplog.at_level(logging.WARNING, "hf_osd"):
        replay(again, tmp_path)
    assert same(again, net) and "rounding" not in caplog.text
    with pytest.raises(ValueError, match="not those that the run started from"):
        replay(again, tmp_path)
    with pytest.raises(ValueError, match="The run trained .* this model has"):
        replay(copy.deepcopy(base).double(), tmp_path)
    log = SubZeroLog.from_pretrained(tmp_path)
    log.lr.mul_(1 + 1e-3)
    with caplog.at_level(logging.WARNING, "hf_osd"):
        replay(copy.deepcopy(base), log)
    assert "differ from the run's by rounding (0.0" in caplog.text
    log.rho[3] *= 3
    told = pytest.raises(ValueError, match="they were changed beside it, or it drew otherwise")
    with told if dtype == torch.float32 else caplog.at_level(logging.WARNING, "hf_osd"):
        replay(copy.deepcopy(base), log)
    assert dtype == torch.float32 or "they were changed beside it, or it ran on another machine" in caplog.text


def test_a_state_goes_on_bit_for_bit_and_other_options_are_refused():
    whole, net = Net(), Net()
    run(whole, 7)
    first = run(net, 4)
    saved = copy.deepcopy(first.state_dict())
    optimizer = SubZero(net, lr=1.0, rank=4, update_interval=3, weight_decay=0.1, queries=2, seed=9)
    optimizer.forward(lambda: net.loss(ids())).backward()
    with pytest.warns(UserWarning, match=r"restored: seed=0 \(checkpoint\) instead of 9"):
        optimizer.load_state_dict(saved)  # which drops what no step was made of
    for step in range(4, 7):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step(lambda: net.loss(ids()))
    assert same(whole, net)
    again = Net()
    replay(again, SubZeroLog.from_optimizer(optimizer))
    assert same(again, net)
    other = SubZero(net, rank=5)
    with pytest.raises(ValueError, match="was saved with .*rank=4"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match="none of SubZero's"):
        other.load_state_dict(torch.optim.SGD(net.parameters()).state_dict())
    same_options = {"rank": 4, "update_interval": 3, "queries": 2}
    with pytest.raises(ValueError, match="saved with other matrices in subspaces"):
        SubZero(net, target_modules=["up"], weight_decay=0.1, **same_options).load_state_dict(saved)
    for weight_decay in (0.0, 0.1):  # another number of groups, or of parameters in them
        net.norm.requires_grad_(weight_decay == 0)
        with pytest.raises(ValueError, match="This state is of other parameters"):
            SubZero(net, weight_decay=weight_decay, **same_options).load_state_dict(saved)


@pytest.mark.parametrize("content", [b"", b"\x10" + bytes(40)], ids=["empty", "garbage"])
def test_other_files_are_refused(content: bytes, tmp_path):
    with pytest.raises(ProjectionFileError, match="missing"):
        SubZeroLog.from_pretrained(tmp_path)
    (tmp_path / "subzero_log.safetensors").write_bytes(content)
    with pytest.raises(ProjectionFileError, match="no safetensors file"):
        SubZeroLog.from_pretrained(tmp_path)
