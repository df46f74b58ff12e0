"""`torch.distributed.checkpoint.state_dict` creates missing state by a step with zero gradients and lr 0."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_osd import OSD
from hf_osd.update_rules import RULES
from reference import nets_in_layers
from reference.divided_form import divide_moments


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(160, 96)
        self.tall = nn.Linear(96, 130, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tall(self.wide(x).relu())


def make(rule: str, **options) -> tuple[Model, OSD]:
    torch.manual_seed(0)
    model = Model()
    named = dict(model.named_parameters())
    matrices = [(name, p) for name, p in named.items() if p.ndim == 2]
    vectors = [(name, p) for name, p in named.items() if p.ndim == 1]
    return model, OSD([{"params": matrices, "rank": 48}, {"params": vectors}], lr=1e-3, weight_rule=rule, **options)


def train(model: Model, optimizer: OSD, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 160, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# P as a seed or as indices, drawn anew or moved after the resume; the limiter's norm; two factors of P
FAMILY = {
    "random": {"subspace": "random", "update_interval": 4, "residual": "scaled"},
    "cosine": {"subspace": "cosine", "update_interval": 4, "residual": "sign", "carry_moments": True},
    "power": {"subspace": "power", "residual": "scaled"},
    "two_sided": {"side": "two_sided", "residual": "scaled"},
}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    ("rule", "given"), [*((rule, {}) for rule in RULES), *(("adamw", o) for o in FAMILY.values())]
)
def test_get_and_set_continue_bit_for_bit(rule: str, given: dict, flatten: bool):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = make(rule, **given)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3, 6))

    resumed, other = make(rule, **given)
    resumed.load_state_dict(weights)
    set_optimizer_state_dict(resumed, other, saved, options=options)
    train(resumed, other, range(3, 6))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, other.state[q][name]) for name, value in optimizer.state[p].items())


def test_dense_moments_of_a_divided_parameter_are_set():
    """Where this run has codes: torch puts this run's absmax beside what it sets."""
    model, optimizer = make("adamw8bit")
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    entries = saved["state"]["wide.weight"]
    divide_moments(entries, optimizer, model.wide.weight, 1)
    dense = entries["exp_avg"].clone()
    assert dense.dtype == torch.float32
    resumed, other = make("adamw8bit")
    set_optimizer_state_dict(resumed, other, saved, options=StateDictOptions(full_state_dict=True))
    state = other.state[resumed.wide.weight]
    assert torch.equal(state["exp_avg"], dense) and "exp_avg_absmax" not in state
    train(resumed, other, range(3, 4))


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_the_norm_that_previous_norm_clips_by_is_saved(flatten: bool, template: bool):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    mode = {"layerwise": True, "layerwise_clipping": "previous_norm", "max_grad_norm": 1e-3, "momentum": 0.0}
    model, optimizer = make("sgd", **mode)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    norm = float(optimizer.grad_norm)
    train(model, optimizer, range(3, 5))

    resumed, other = make("sgd", **mode)
    resumed.load_state_dict(weights)
    if template:  # as `torch.distributed.checkpoint.load` wants one: made by a step whose norm is zero
        get_optimizer_state_dict(resumed, other, options=options)
    set_optimizer_state_dict(resumed, other, saved, options=options)
    assert float(other.stream.clipping.before2) == pytest.approx(norm**2) and norm > 2e-3
    train(resumed, other, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_checkpoint_of_one_mode_continues_in_the_other(flatten: bool, layerwise: bool):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    modes = {False: {}, True: {"layerwise": True, "layerwise_clipping": "previous_norm", "max_grad_norm": 1e-3}}
    model, optimizer = make("adamw", **modes[layerwise])
    train(model, optimizer, range(2))
    other_model, other = make("adamw", **modes[not layerwise])
    set_optimizer_state_dict(
        other_model, other, get_optimizer_state_dict(model, optimizer, options=options), options=options
    )
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert all(torch.equal(value, other.state[q][name]) for name, value in optimizer.state[p].items())


@pytest.mark.parametrize("rule", RULES)
def test_the_initial_zero_step_neither_moves_weights_nor_starts_p(rule: str):
    model, optimizer = make(rule)
    weights = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    P = optimizer.state[model.wide.weight]["projection"]
    assert not P.any() and float(optimizer.state[model.wide.weight]["step"]) == 0
    train(model, optimizer, range(1))
    torch.testing.assert_close(P.T @ P, torch.eye(48), atol=1e-4, rtol=0)  # started from the first real gradient


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_initial_zero_step_does_not_count(rule: str, layerwise: bool):
    (model, optimizer), (other_model, other) = (make(rule, layerwise=layerwise) for _ in range(2))
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state[model.wide.bias]["step"] == 0
    for trained in ((model, optimizer), (other_model, other)):
        train(*trained, range(3))
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, other.state[q][name]) for name, value in optimizer.state[p].items())


def test_a_first_step_of_ones_own_with_lr_0_counts():
    model, optimizer = make("adamw")
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0  # as at the beginning of a warm-up
    train(model, optimizer, range(1))
    assert all(entries["step"] == 1 for entries in optimizer.state.values())


@pytest.mark.parametrize("flatten", [False, True])
def test_a_parameter_that_never_had_a_gradient(flatten: bool, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def made() -> tuple[Model, OSD]:
        model, optimizer = make("adamw")
        model.unused = nn.Linear(96, 80)
        model.frozen = nn.Linear(96, 80).requires_grad_(False)
        optimizer.add_param_group({"params": [("unused.weight", model.unused.weight)], "rank": 8})
        rest = [("unused.bias", model.unused.bias), ("frozen.weight", model.frozen.weight)]
        optimizer.add_param_group({"params": rest})
        return model, optimizer

    model, optimizer = made()
    train(model, optimizer, range(3))
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options), "model": model.state_dict()}
    assert model.unused.weight not in optimizer.state  # in what is saved alone
    save(saved, checkpoint_id=tmp_path)
    train(model, optimizer, range(3, 6))
    resumed, other = made()
    template = {"optimizer": get_optimizer_state_dict(resumed, other, options=options), "model": resumed.state_dict()}
    load(template, checkpoint_id=tmp_path)
    resumed.load_state_dict(template["model"])
    set_optimizer_state_dict(resumed, other, template["optimizer"], options=options)
    train(resumed, other, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    resumed.unused.weight.grad = torch.randn(80, 96)
    other.step()
    assert other.weight_of(resumed.unused.weight).started


@pytest.mark.parametrize("given", FAMILY.values(), ids=FAMILY)
def test_the_initial_zero_step_draws_chooses_and_measures_nothing(given: dict):
    model, optimizer = make("adamw", **given)
    weights = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for p in (model.wide.weight, model.tall.weight):
        assert all(not value.any() for value in optimizer.state[p].values())
        assert not optimizer.weight_of(p).started
    train(model, optimizer, range(1))
    fresh_model, fresh = make("adamw", **given)
    train(fresh_model, fresh, range(1))
    for p, q in ((model.wide.weight, fresh_model.wide.weight), (model.tall.weight, fresh_model.tall.weight)):
        expected = fresh.state[q]
        assert torch.equal(p, q) and all(torch.equal(v, expected[name]) for name, v in optimizer.state[p].items())


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize(
    "given", [{}, {"subspace": "random", "update_interval": 2}, {"init": "orthonormal"}], ids=["pca", "random", "init"]
)
def test_from_activations(given: dict, before: int, flatten: bool, prepared: bool, tmp_path):
    """Two layers share one P, of which a new optimizer, that makes the template, does not know yet."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def made():
        net = nets_in_layers.Net()
        optimizer = nets_in_layers.make(net, **given)
        return net, Accelerator(cpu=True).prepare_optimizer(optimizer) if prepared else optimizer

    net, optimizer = made()
    nets_in_layers.train(net, optimizer, range(before))
    saved = {"optimizer": get_optimizer_state_dict(net, optimizer, options=options), "model": net.state_dict()}
    save(saved, checkpoint_id=tmp_path)
    nets_in_layers.train(net, optimizer, range(before, before + 3))

    resumed, other = made()
    template = {"optimizer": get_optimizer_state_dict(resumed, other, options=options), "model": resumed.state_dict()}
    load(template, checkpoint_id=tmp_path)
    resumed.load_state_dict(template["model"])
    set_optimizer_state_dict(resumed, other, template["optimizer"], options=options)
    nets_in_layers.train(resumed, other, range(before, before + 3))
    assert nets_in_layers.distance(net, resumed) == 0
    states, resumed_states = optimizer.state_dict()["state"], other.state_dict()["state"]
    for key, entries in states.items():
        assert entries.keys() == resumed_states[key].keys()
        assert all(torch.equal(value, resumed_states[key][name]) for name, value in entries.items())
    assert "projection_step" not in states[1] and len(other.param_groups) == len(optimizer.param_groups) == 3
