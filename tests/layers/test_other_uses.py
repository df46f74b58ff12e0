"""What else people do with the layers and weights of a prepared model, and numbers that leave a precision's range."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

from hf_osd.optim.step import residual
from reference.nets_in_layers import N, Net, Other, batch, distance, loss_of, make, train


def trained_names(net: nn.Module, optimizer, steps: int = 4) -> set[str]:
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(steps):
        loss_of(net(batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("steps_before", [0, 2])
def test_weights_that_are_computed_from_others_are_trained(steps_before: int):
    """Pruning and parametrizations put a tensor in the place of the weight, which is a parameter of another name."""
    net = Net()
    optimizer = make(net)
    train(net, optimizer, range(steps_before))
    prune.l1_unstructured(net.layers[0], "weight", amount=0.5)
    parametrizations.orthogonal(net.layers[1])
    originals = {"layers.0.weight_orig", "layers.1.parametrizations.weight.original"}
    assert originals <= {name for name, _ in net.named_parameters()}
    found = trained_names(net, optimizer)
    assert originals <= found and "layers.2.weight" in found
    parametrize.remove_parametrizations(net.layers[1], "weight")


def test_a_callers_own_weights_get_gradients():
    net = Net()
    make(net)
    own = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters() if "stand_ins" not in name}
    loss_of(torch.func.functional_call(net, own, batch(0))).backward()
    plain = Net()
    loss_of(plain(batch(0))).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(own[name].grad, p.grad)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_whose_gradient_is_waited_for_has_one(hook: str):
    net = Net()
    seen = []
    getattr(net.layers[0].weight, hook)(lambda value: seen.append(value.shape) or None)
    optimizer = make(net)
    assert trained_names(net, optimizer) >= {"layers.0.weight", "layers.1.weight"}
    assert seen == [net.layers[0].weight.shape] * 4 and optimizer.layers.left.keys() == {"layers.0.weight"}


def test_all_weights_may_be_left_to_their_gradients():
    net = Net()
    for layer in net.layers:
        layer.weight.register_hook(lambda G: None)
    optimizer = make(net)
    assert len(optimizer.layers.left) == 3 and not list(optimizer.layers.parameters())
    assert trained_names(net, optimizer) >= {f"layers.{i}.weight" for i in range(3)}
    optimizer.remove()
    assert [type(layer) for layer in net.layers] == [type(layer) for layer in Net().layers]
    with pytest.raises(ValueError, match="attach"):
        optimizer.step()
    optimizer.attach()
    assert trained_names(net, optimizer) >= {f"layers.{i}.weight" for i in range(3)}


def test_products_of_half_precision_do_not_leave_its_range():
    """xᵀ x P sums over all tokens, and float16 ends at 65,504."""
    net = Other(lambda layers, x: layers["a"](x), a=nn.Linear(N, 24)).float()
    optimizer = make(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for step in range(3):
        x = 100 * batch(step, tokens=400).float()
        with torch.autocast("cpu", torch.float16):
            loss = net(x).float().square().mean() * 1e-4
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    (shared,) = optimizer.layers.inputs()
    assert shared.P.isfinite().all() and scaler.get_scale() >= 1
    assert distance(net, Other(lambda layers, x: x, a=nn.Linear(N, 24)).float()) > 1e-3


@pytest.mark.parametrize("subspace", ["online_pca", "power"])
@pytest.mark.parametrize("step_of_it", [0, 2])
def test_what_is_not_finite_never_enters_p(step_of_it: int, subspace: str):
    """Neither by the inputs nor by a product of theirs alone."""
    net = Net()
    optimizer = make(net, subspace=subspace)
    for step in range(5):
        loss_of(net(batch(step))).backward()
        if step == step_of_it:
            for shared in optimizer.layers.inputs():
                shared.A[0, 0] = float("inf")
        optimizer.step()
        optimizer.zero_grad()
    assert all(shared.P.isfinite().all() for shared in optimizer.layers.inputs())
    assert all(p.isfinite().all() for p in net.parameters()) and distance(net, Net()) > 1e-3


@pytest.mark.parametrize("optim", ["osd_adamw", "osd_adamw_layerwise"])
@pytest.mark.parametrize("options", [{}, {"weight_dtype": "int8"}], ids=str)
def test_signs_in_bfloat16_are_those_of_float32(options: dict, optim: str):
    """At half of the rank half of each row's energy lies inside, and is no reason to take the rest for rounding."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        net = Other(lambda layers, x: layers["a"](x), a=nn.Linear(N, 24)).to(dtype)
        signs = {"scale": 1e-6, "residual": "sign", "residual_scale": 1e6}
        optimizer = make(net, optim, lr=0.1, rank=N // 2, **signs, **options)
        for step in range(2):
            before = net.layers["a"].weight.detach().float() + 0
            loss_of(net(batch(step, tokens=100).to(dtype))).backward()
            optimizer.step()
            optimizer.zero_grad()
        change = net.layers["a"].weight.detach().float() - before
        moved.append(torch.sign(change) * (change.abs() > 0.05))
    assert moved[0].abs().mean() == 1 / 4 and (moved[0] == moved[1]).float().mean() > 0.97


def test_a_residual_that_changes_in_a_group_is_refused():
    for change in ({"residual": "scaled"}, {"residual_sample": 2}):
        net = Other(lambda layers, x: layers["a"](x), a=nn.Linear(N, 24))
        optimizer = make(net, residual="sign")
        train(net, optimizer, range(2))
        optimizer.param_groups[0].update(change)
        with pytest.raises(
            ValueError, match="`residual` and `residual_sample` of layers.a.weight cannot become other"
        ):
            train(net, optimizer, [2])


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_outside_has_no_sign(transposed: bool):
    """Inputs of rank 4, all of which P spans: what is left of G is rounding."""
    layer = Conv1D(24, N) if transposed else nn.Linear(N, 24)
    net = Other(lambda layers, x: layers["a"](x), a=layer)
    optimizer = make(net, residual="sign", subspace="static")
    span = torch.linalg.qr(torch.randn(N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    start = layer.weight.detach().clone()
    for step in range(4):
        loss_of(net(batch(step) @ span @ span.T)).backward()
        optimizer.step()
        optimizer.zero_grad()
    change = layer.weight.detach() - start
    change = change.T if transposed else change
    assert change.norm() > 1e-2 and (change - change @ span @ span.T).abs().max() < 1e-10


@pytest.mark.parametrize("only", [{"residual_sample": 8}, {"weight_dtype": "int8"}], ids=str)
def test_a_group_added_later_has_nothing_that_only_layers_do(only: dict):
    net = Other(lambda layers, x: layers["a"](x), a=nn.Linear(N, 24))
    optimizer = make(net, residual="sign", residual_sample=3)
    more = nn.Parameter(torch.randn(8, 12, dtype=torch.float64))
    (name,) = only
    with pytest.raises(ValueError, match=f"`{name}` of parameter group .* has no effect: layers are prepared"):
        optimizer.add_param_group({"params": [more], "rank": 4, **only})
    optimizer.add_param_group({"params": [more], "rank": 4, name: optimizer.defaults[name]})  # as the optimizer has it


def memory(net: nn.Module) -> int:
    """Bytes that the stand-ins of a model hold."""
    return sum(p.untyped_storage().nbytes() for p in net.osd_stand_ins._parameters.values())


@pytest.mark.parametrize("options", [{}, {"residual": "sign"}, {"weight_dtype": "int8"}], ids=str)
def test_a_model_that_is_moved_or_converted_has_no_gradients_room(options: dict):
    net = Net()
    optimizer = make(net, **options)
    count = len(net.osd_stand_ins._parameters)
    train(net, optimizer, range(2))
    elsewhere = [] if "weight_dtype" in options else [lambda: net.to("meta")]  # int8 goes nowhere without its numbers
    for move in (lambda: net.to(torch.float32), net.double, net.bfloat16, *elsewhere):
        move()
        assert memory(net) == count * next(iter(net.osd_stand_ins._parameters.values())).element_size()


def test_weights_that_a_move_exchanges_are_the_layers_still():
    """As to a device whose tensors cannot take the place of others."""
    net = Net()
    optimizer = make(net)
    before = net.layers[0].weight
    exchanges = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(exchanges)
    loss_of(net(batch(0).float())).backward()
    assert optimizer.layers is net.osd_stand_ins and net.osd_stand_ins.has_gradients
    assert net.layers[0].weight is not before and net.layers[0].weight.grad is None


def test_a_callers_own_parameters_get_gradients_and_the_model_none():
    net = Net()
    optimizer = make(net)
    train(net, optimizer, range(2))
    own = {name: nn.Parameter(p.detach().clone()) for name, p in net.named_parameters()}
    loss_of(torch.func.functional_call(net, own, (batch(2),))).backward()
    assert all(p.grad is not None for p in own.values()) and not net.osd_stand_ins.has_gradients
    again = Net()
    again.load_state_dict(own)
    loss_of(again(batch(2))).backward()
    theirs = dict(again.named_parameters())
    assert max((p.grad - theirs[name].grad).abs().max() for name, p in own.items()) < 1e-14
    loss_of(torch.func.functional_call(net, dict(net.named_parameters()), (batch(2),))).backward()
    assert net.osd_stand_ins.has_gradients  # its own are what the layers make R of


def test_another_rule_and_sample_in_a_group_are_followed():
    """As on gradients: the next step is theirs."""
    still, sampled, same = (Net() for _ in range(3))
    for net, change in ((still, {"subspace": "static"}), (sampled, {"projection_sample": 1}), (same, {})):
        optimizer = make(net)
        train(net, optimizer, range(2))
        before = {p: state["projection"].clone() for p, state in optimizer.state.items() if "projection" in state}
        optimizer.param_groups[0].update(change)
        train(net, optimizer, range(2, 5))
        stayed = all(torch.equal(optimizer.state[p]["projection"], P) for p, P in before.items())
        assert stayed == (net is still)
    assert distance(sampled, same) > 1e-6


def test_a_step_in_pieces_is_a_step(monkeypatch: pytest.MonkeyPatch):
    """A few rows at a time, which of Conv1D's weight start at any of the rows whose turn it is."""
    whole, parts = Net(), Net()
    train(whole, make(whole, residual="sign", residual_sample=3), range(5))
    monkeypatch.setattr(residual, "PIECE", 2 * 16)
    train(parts, make(parts, residual="sign", residual_sample=3), range(5))
    assert distance(whole, parts) < 1e-13
