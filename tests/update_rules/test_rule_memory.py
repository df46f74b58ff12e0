"""How update rules use memory: work in pieces, and moments in 8 bits or bfloat16."""

import sys

import pytest
import torch
from rule_runs import osd, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_osd import OSD
from hf_osd.optim import state_bytes
from hf_osd.optim.step import full_weight, gradients, rounding
from hf_osd.update_rules import RULES, build_rule, build_storage, require_bitsandbytes


ELEMENTWISE = ["adamw", "adamw8bit", "lion", "lion8bit", "sgd"]


@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_pieces_change_nothing(rule, monkeypatch):
    # 8-bit codes do not show that they were decoded in pieces only where a piece starts at a block.
    shape, options = (67, 71), {"weight_decay": 0.1}
    whole, optimizer = train(osd(rule, **options), shape, steps=20)
    monkeypatch.setattr(full_weight, "PIECE", 512)
    pieces, other = train(osd(rule, **options), shape, steps=20)
    slices = list(full_weight.flat_pieces(pieces, pieces, build_rule(rule).elementwise))
    assert len(slices) == 10 and slices[-1] == slice(4608, 4757)
    # The kernels are elementwise and pieces start at multiples of the vector length.
    assert torch.equal(whole, pieces)
    for name, value in optimizer.state[whole].items():
        assert torch.equal(value, other.state[pieces][name]), name


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.1}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "stochastic_rounding": True}],
    ids=str,
)
def test_adafactor_works_through_large_matrices_by_rows(options, monkeypatch):
    """The same up to the order of sums, a broken gradient included; no float temporary has their size."""
    options = {**options}
    dtype, found = options.pop("dtype", torch.float64), []
    for piece in (1 << 20, 130):
        for module in (full_weight, gradients, rounding):
            monkeypatch.setattr(module, "PIECE", piece)
        p = torch.nn.Parameter(torch.randn(40, 13, generator=torch.Generator().manual_seed(9)).to(dtype))
        optimizer = OSD([{"params": [p]}], lr=1e-2, weight_rule="adafactor", **options)
        for step in range(5):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            if step == 3:
                p.grad[0, 0] = float("nan")
            with Largest() as made:
                optimizer.step()
        assert made.entries < p.numel() or piece > p.numel() or dtype == torch.float64  # of which there are views
        found.append((p.detach(), *optimizer.state[p].values()))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole.double(), parts.double(), rtol=tolerance, atol=tolerance)


class Largest(TorchDispatchMode):
    """The entries of the largest float tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype in (torch.float32, torch.float64) and made._base is None:
            new = all(made is not arg for arg in args)
            self.entries = max(self.entries, made.numel() if new else 0)
        return made


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
def test_bfloat16_moments_take_half_the_bytes_but_for_second_ones_and_stay_close(rule):
    shape = (24, 40)
    p, optimizer = train(osd(rule), shape)
    q, half = train(osd(rule, moment_dtype="bfloat16"), shape)
    counters = 2 * 4  # step and skipped_steps
    narrow = {name: value for name, value in half.state[q].items() if value.ndim and "_sq" not in name}
    assert all(value.dtype == torch.bfloat16 for value in narrow.values())
    moments = state_bytes(optimizer) - counters
    assert state_bytes(half) - counters == moments - sum(2 * value.numel() for value in narrow.values())
    start = train(osd(rule), shape, steps=0)[0]
    relative = ((q - p).norm() / (p - start).norm()).item()
    # bfloat16 keeps 8 bits: a moment is off by up to 2^-9 after each step, and remembers the last 10 or so, with
    # random signs: about 2^-9 sqrt(10) < 2^-7. Lion moves by signs: one that flips, which only entries within that
    # 2^-7 of zero can, costs 2 lr: once in 100 steps for an element is 0.02 of the largest movement, and elements
    # have moved a few times less.
    assert 0 < relative < (2**-4 if rule == "lion" else 2**-6)


def test_storages_of_the_table():
    assert {name for name, entry in RULES.items() if entry.eight_bit} == {"adamw8bit", "lion8bit"}
    for name, entry in RULES.items():
        assert isinstance(build_rule(name), entry.rule)
        moment = build_rule(name).moments((64, 80))[0]
        dtypes = [spec.dtype for spec in build_storage(name).spec(moment.kept("", torch.float32)).values()]
        assert dtypes == ([torch.uint8, torch.float32] if entry.eight_bit else [torch.float32])


@pytest.mark.parametrize(
    "options", [{"weight_rule": "adamw8bit"}, {"weight_rule": "adamw", "projection_rule": "lion8bit", "rank": 4}]
)
def test_without_bitsandbytes_the_message_names_the_way_out(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes.*without `8bit`"):
        require_bitsandbytes()
    p = nn.Parameter(torch.randn(8, 12))
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        OSD([p], **options)
    optimizer = OSD([nn.Parameter(torch.randn(8, 12))])  # the rules in float32 do without it
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1
