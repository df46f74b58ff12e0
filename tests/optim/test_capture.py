"""Steps in CUDA graphs, as far as a CPU can show: a recorded step, repeated, is what all steps after it would be.

A recording is of operators with the very tensors that they were given, as a graph's kernels have their addresses; what
the host has put in, numbers and decisions, stays in it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import hf_osd
from hf_osd import OSD
from hf_osd.optim.options.table import refuse_baked_lr
from hf_osd.optim.step.capture import check_capture
from hf_osd.subspace import OnlinePCA, precision
from hf_osd.update_rules import RULES


RANK = 8
# left, right and both blocks of unequal size; 8-bit moments begin at 4096 entries
SHAPES = [(24, 43), (41, 24), (520, 24), (2, 24, 40), (7,)]
ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recording(TorchDispatchMode):
    """Operators as they run, of which none may tell the host a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert ASKS.isdisjoint(func.tags), f"{func} asks the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        now: dict[int, Tensor] = {}  # by the tensor that was there when it was recorded

        def current(x: Any) -> Any:
            return now.get(id(x), x)

        for func, args, kwargs, out in self.calls:
            new = func(*tree_map(current, args), **tree_map(current, kwargs))
            now |= {id(x): y for x, y in zip(tree_leaves(out), tree_leaves(new), strict=True) if isinstance(x, Tensor)}


class Trained:
    """Parameters whose gradients stay where they are, as those that a graph reads."""

    def __init__(self, lr: Callable[[], Any] = lambda: torch.tensor(2.0**-9), dtype=torch.float64, **options: Any):
        generator = torch.Generator().manual_seed(1)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        groups = [{"params": self.params[:-1], "rank": RANK}, {"params": self.params[-1:]}]
        self.optimizer = OSD([group | {"lr": lr()} for group in groups], weight_decay=0.1, **options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 32)

    def arrive(self, step: int) -> None:
        """The gradients of a step: one of them is broken at 6, one expert has no tokens at 7 and 8."""
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(self.params):
            p.grad.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
            if step == 6 and i in (0, 4):
                p.grad[..., 3] = torch.inf
            if step in (7, 8) and i == 3:
                p.grad[1] = 0

    def tensors(self) -> list[Tensor]:
        return [*self.params, *(value for p in self.params for value in self.optimizer.state[p].values())]

    def run(self, steps: range, step: Callable[[], Any] | None = None) -> None:
        for number in steps:
            self.arrive(number)
            (step or self.optimizer.step)()
            self.schedule.step()

    def record(self, monkeypatch) -> Recording:
        """A step, recorded and not made."""
        before, recording = [X.clone() for X in self.tensors()], Recording()
        with monkeypatch.context() as patch, recording:
            for reads in ("tolist", "numpy", "item"):  # of a tensor on the CPU without an operator
                patch.setattr(Tensor, reads, None)
            self.optimizer.step()
        for X, value in zip(self.tensors(), before, strict=True):
            X.data.copy_(value)
        return recording


OPTIONS: dict[str, dict[str, Any]] = {
    **{rule: {"weight_rule": rule} for rule in RULES},
    "scaled": {"residual": "scaled"},
    "sign": {"residual": "sign", "weight_rule": "lion"},
    "two_sided": {"side": "two_sided"},
    "other_rule_of_p": {"projection_rule": "adafactor", "projection_sample": 3},
    "whole": {"projection_sample": 1, "alpha": 500.0},  # steps of P that are cut
    "static": {"subspace": "static", "init": "orthonormal"},
    "bfloat16": {"subspace": "static", "projection_dtype": "bfloat16", "moment_dtype": "bfloat16"},
    "int8": {"subspace": "static", "projection_dtype": "int8"},
    "bfloat16_moments": {"moment_dtype": "bfloat16"},
}


@pytest.mark.filterwarnings("ignore:lr alpha sqrt")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_recorded_step_is_every_step(name: str, monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: False)  # else a recording has no kernels' settings
    options = OPTIONS[name] | {"dtype": torch.float32 if name.endswith("8bit") else torch.float64}
    graph, eager = Trained(**options, capturable=True), Trained(**options, capturable=True)
    host = Trained(lambda: 2.0**-9, **options)
    for trained in (graph, eager, host):
        trained.run(range(3))
    graph.arrive(3)
    replay = graph.record(monkeypatch).replay
    graph.run(range(3, 15), replay)
    eager.run(range(3, 15))
    host.run(range(3, 15))
    for X, Y in zip(graph.tensors(), eager.tensors(), strict=True):
        assert torch.equal(X, Y) and (X.dtype == torch.uint8 or X.isfinite().all())
    assert eager.optimizer.statistics() == graph.optimizer.statistics() == {"skipped_steps": 2}
    if not name.endswith("8bit") and not name.startswith("bfloat16"):  # where a last bit decides over a code
        # the same sums in another order; bfloat16's are of 8 bits
        torch.testing.assert_close(graph.params, host.params, rtol=1e-9, atol=1e-11)
    graph.run(range(15, 18))  # the host has not counted, and goes on
    eager.run(range(15, 18))
    assert all(torch.equal(X, Y) for X, Y in zip(graph.tensors(), eager.tensors(), strict=True))


def test_without_it_a_recording_repeats_what_the_host_said(monkeypatch):
    """That the recordings above can show a difference: here the block of the gradient is always the same."""
    graph, eager = Trained(), Trained()
    for trained in (graph, eager):
        trained.run(range(3))
    graph.arrive(3)
    replay = graph.record(monkeypatch).replay
    graph.run(range(3, 6), replay)
    eager.run(range(3, 6))
    assert not torch.allclose(graph.params[0], eager.params[0], rtol=1e-6, atol=0)


def test_a_recording_refuses_a_question():
    with Recording(), pytest.raises(AssertionError, match="asks the device"):
        bool(torch.ones(()) > 0)


# What a graph cannot hold


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"subspace": "svd"}, "capturable` is not for parameter group 0: subspace='svd' asks the host"),
        ({"subspace": "random"}, "subspace='random' asks the host"),
        ({"subspace": "power"}, "subspace='power' asks the host, or decomposes"),
        ({"projection_interval": 2}, "the host counts the steps of projection_interval=2"),
        ({"carry_moments": True}, "carry_moments decomposes"),
        ({"projection_dtype": "bfloat16"}, "projection_dtype='bfloat16' rounds P by noise that the host seeds"),
        ({"projection_dtype": "int8"}, "projection_dtype='int8' rounds P by noise that the host seeds"),
        ({"stochastic_rounding": True}, "stochastic_rounding seeds its noise on the host"),
        ({"layerwise": True}, "`capturable` of OSD has no effect with `layerwise`"),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, "float64 on cpu: with `capturable` it must be float32"),
    ],
    ids=str,
)
def test_what_a_graph_cannot_hold_is_refused(options: dict[str, Any], reason: str):
    W = nn.Parameter(torch.randn(24, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=reason):
        OSD([W], rank=RANK, capturable=True, **options)


def test_sharded_weights_are_refused():
    trained = Trained(capturable=True)
    weights, p = trained.optimizer.weights, trained.params[0]
    sharded = replace(weights.of(p).geometry, sharding=object())
    with pytest.raises(ValueError, match="parameter 0 is sharded .FSDP2., which `capturable` is not for"):
        weights._make(p, sharded, trained.optimizer.param_groups[0])


def test_activations_are_refused():
    with pytest.raises(ValueError, match="source='activations' keeps account of passes"):
        hf_osd.create_osd_optimizer(nn.Linear(24, 24), rank=4, source="activations", capturable=True)


def test_a_rule_of_ones_own_says_whether_a_graph_holds_it():
    class Own(OnlinePCA):
        def advance_(self, P, move): ...

    class Same(OnlinePCA):
        capturable = True

        def moves_at(self, count):
            return True

    assert OnlinePCA.capturable and Same.capturable and not Own.capturable


def test_what_is_not_ready_is_told():
    trained = Trained(capturable=True)

    def told(error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            check_capture(trained.optimizer.weights)

    trained.run(range(1))
    told(RuntimeError, "parameter 0 has not made two steps with its state")
    trained.run(range(1, 2))
    check_capture(trained.optimizer.weights)
    trained.optimizer.collect_statistics = True
    told(RuntimeError, "holds no observation")
    trained.optimizer.collect_statistics = False
    trained.optimizer.load_state_dict(trained.optimizer.state_dict())
    told(RuntimeError, "parameter 0 has not made two steps")  # with this state
    trained.run(range(2, 3))
    check_capture(trained.optimizer.weights)
    trained.optimizer.param_groups[1]["lr"] = 0.1
    with pytest.warns(UserWarning, match="keeps the learning rate that it is captured with"):
        check_capture(trained.optimizer.weights)
    trained.optimizer.weights.device_types = {"cpu", "cuda"}
    told(RuntimeError, "holds no step on another device: cpu, cuda")
    trained = Trained()
    told(RuntimeError, "make the optimizer with `capturable=True`")
    trained = Trained(capturable=True)
    trained.optimizer.zero_grad()
    told(RuntimeError, "No parameter has a gradient for a CUDA graph to read: make some steps")


def test_a_capture_is_noticed(monkeypatch):
    trained = Trained()
    trained.run(range(2))
    trained.optimizer.weights.device_types = {"cuda"}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="A CUDA graph cannot hold these steps"):
        trained.optimizer.step()


def test_an_expert_without_tokens_has_no_p_to_capture():
    trained = Trained(capturable=True)
    for number in range(3):
        trained.arrive(number)
        trained.params[3].grad[1] = 0
        trained.optimizer.step()
    with pytest.raises(RuntimeError, match="parameter 3 has not made two steps with its state: make some .* expert"):
        check_capture(trained.optimizer.weights)


def test_a_gradient_scaler_is_told_what_takes_its_place():
    p = nn.Parameter(torch.randn(24, 16))
    optimizer, scaler = OSD([p], rank=4, capturable=True), torch.amp.GradScaler("cpu")
    scaler.scale(p.square().sum()).backward()
    with pytest.raises(ValueError, match="call its `unscale_`, then the step itself"):
        scaler.step(optimizer)
    scaler.unscale_(optimizer)
    optimizer.step()
    scaler.update()


# The learning rate


def test_each_group_has_a_tensor_of_its_own():
    lr = torch.tensor(2.0**-6)
    groups = [{"params": [nn.Parameter(torch.randn(24, 16))], "rank": rank} for rank in (RANK, None)]
    optimizer = OSD(groups, lr=lr, capturable=True)
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(24, 16))]})
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    optimizer.step(), schedule.step(1.0), schedule.step(2.0)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    assert [float(group["lr"]) for group in optimizer.param_groups] == [2.0**-8] * 3 and lr == 2.0**-6


def test_a_learning_rate_stays_a_tensor():
    lr = torch.tensor([2.0**-6])
    optimizer = OSD([nn.Parameter(torch.randn(24, 16))], lr=lr, rank=RANK, capturable=True)
    tensor = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step(), schedule.step()
    assert optimizer.param_groups[0]["lr"] is tensor and tensor == 2.0**-7
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    plain = OSD([nn.Parameter(torch.randn(24, 16))], rank=RANK)
    plain.load_state_dict(saved)
    assert type(plain.param_groups[0]["lr"]) is float and plain.param_groups[0]["lr"] == 2.0**-7
    optimizer.load_state_dict(plain.state_dict())
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    refuse_baked_lr(optimizer.param_groups[0], "")
