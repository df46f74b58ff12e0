"""The hooks of layerwise mode: who owns them, what takes them off, and what cannot work with them."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from layerwise_nets import Net, assert_equal, inputs, optimizer_of, train
from torch import nn

from hf_osd import OSD
from hf_osd.optim.options.mode import Mode
from hf_osd.optim.step.gradients import clip_coefficient


def test_remove_restores_the_model_and_attach_goes_on():
    model = Net()
    optimizer = optimizer_of(model, layerwise=True)
    train(model, optimizer, range(1))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.remove()
    optimizer.remove()
    model(inputs(1)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match=r"hooks of this optimizer have been removed: call `attach\(\)`"):
        optimizer.step()
    model.zero_grad()
    optimizer.attach()
    train(model, optimizer, range(1, 2))
    whole = Net()
    train(whole, optimizer_of(whole), range(2))
    assert_equal(model, whole)


def test_a_second_optimizer_takes_the_parameters_over():
    model, ordinary = Net(), Net()
    first = optimizer_of(model, layerwise=True)
    second = optimizer_of(model, layerwise=True)
    train(model, second, range(2))
    train(ordinary, optimizer_of(ordinary), range(2))
    assert_equal(model, ordinary)
    with pytest.raises(ValueError, match="have been removed"):
        first.step()


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_forgotten_optimizer_is_freed_at_once_and_steps_no_more(layerwise: bool):
    model = Net()
    optimizer = optimizer_of(model, layerwise=layerwise)
    train(model, optimizer, range(2))
    optimizer, together = copy.deepcopy(optimizer), weakref.WeakSet([optimizer])
    together.add(optimizer)
    # No cycle may need the collector: until it ran, the state would take memory and the hooks would train on.
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert not together
    finally:
        gc.enable()
    model(inputs(0)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_hooks_of_their_own(how: str):
    model = Net()
    together = (model, optimizer_of(model, layerwise=True))
    train(*together, range(2))
    if how == "deepcopy":
        copied = copy.deepcopy(together)
    else:
        buffer = io.BytesIO()
        torch.save(together, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert copied[1].stream.weights is copied[1].weights
    before = [p.detach().clone() for p in model.parameters()]
    train(*copied, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    train(*together, range(2, 4))
    assert_equal(model, copied[0])


def test_added_groups_are_stepped_too():
    p, q = nn.Parameter(torch.randn(12, 30)), nn.Parameter(torch.randn(30))
    optimizer = OSD([{"params": [p], "rank": 4}], layerwise=True)
    optimizer.add_param_group({"params": [q]})
    (p.square().sum() + q.square().sum()).backward()
    assert p.grad is None and q.grad is None and optimizer.state[q]["step"] == 1


def test_a_grad_scaler_is_refused():
    model = Net()
    optimizer = optimizer_of(model, layerwise=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(inputs(0))).backward()
    with pytest.raises(ValueError, match="A `GradScaler`.*scaled gradients"):
        scaler.step(optimizer)
    optimizer.step()  # without one it goes on


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_closure_is_called_once(accumulates: bool):
    """As Lightning steps: forgetting, forward and backward pass are in the closure."""
    model, other = Net(), Net()
    optimizer = optimizer_of(model, layerwise=True, gradient_accumulation=accumulates)
    plain = optimizer_of(other, layerwise=True, gradient_accumulation=accumulates)

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(inputs(step))
        loss.backward()
        return loss

    for step in range(3):
        calls: list[bool] = []
        expected = model(inputs(step)).item()
        assert optimizer.step(closure).item() == expected
        assert calls == [True]
    train(other, plain, range(3))
    assert_equal(model, other)
    assert optimizer.step(lambda: None) is None  # nothing has come


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layerwise_clipping": "global", "layerwise": True}, "one of parameter, previous_norm, got 'global'"),
        ({"layerwise_clipping": "parameter", "layerwise": True}, "has no effect without a `max_grad_norm`"),
        ({"max_grad_norm": 1.0}, "and clip with `torch.nn.utils.clip_grad_norm_`"),
        ({"max_grad_norm": 0.0, "layerwise": True}, "`max_grad_norm` of OSD must be a number > 0"),
        ({"gradient_accumulation": True}, "`gradient_accumulation` of OSD has no effect without `layerwise`"),
        ({"layerwise": 1}, "`layerwise` of OSD must be True or False"),
        ({"layerwise_clipping": "parameter", "max_grad_norm": 1.0}, "without `layerwise`"),
    ],
)
def test_wrong_modes_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Mode(**options)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        OSD([nn.Parameter(torch.zeros(8, 8))], rank=2, **options)


def test_the_clip_coefficient_is_torchs():
    G = torch.randn(7)
    p = nn.Parameter(torch.zeros(7))
    p.grad = G.clone()
    nn.utils.clip_grad_norm_([p], 0.3)
    torch.testing.assert_close(G * clip_coefficient(G.square().sum(), 0.3), p.grad)


def test_an_optimizer_pickled_before_there_were_modes_steps():
    model = Net()
    old = optimizer_of(model)
    state = {name: value for name, value in old.__getstate__().items() if name not in ("mode", "_stream")}
    optimizer = OSD.__new__(OSD)
    optimizer.__setstate__(state)
    train(model, optimizer, range(1))
    assert not optimizer.mode.layerwise


def test_clipping_without_layerwise_says_what_is_missing():
    with pytest.raises(ValueError, match="`layerwise_clipping` of OSD has no effect without `layerwise`"):
        Mode(layerwise_clipping="parameter")


@pytest.mark.parametrize("projected", [True, False])
def test_a_parameter_that_is_unfrozen_later_is_stepped_in_its_hook_like_the_others(projected: bool):
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    late = next(p for p in model.parameters() if (p.ndim == 2) == projected)
    twin = next(p for p in other.parameters() if (p.ndim == 2) == projected)
    late.requires_grad_(False), twin.requires_grad_(False)

    def of_all(net: Net, layerwise: bool) -> OSD:  # frozen parameters too
        matrices, others = ([p for p in net.parameters() if (p.ndim == 2) == kind] for kind in (True, False))
        return OSD([{"params": matrices, "rank": 6}, {"params": others}], lr=1e-2, layerwise=layerwise)

    optimizer, ordinary = of_all(model, True), of_all(other, False)
    train(model, optimizer, range(2)), train(other, ordinary, range(2))
    late.requires_grad_(True), twin.requires_grad_(True)
    train(model, optimizer, range(2, 3)), train(other, ordinary, range(2, 3))
    model(inputs(3)).backward()
    assert late.grad is None  # no gradients pile up
    optimizer.step()
    train(other, ordinary, range(3, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


TOLD = "Compile its blocks"


@pytest.mark.parametrize("way", ["function", "method", "blocks"])
def test_a_model_compiled_as_a_whole_is_told(way: str):
    """Whose gradients all come at once; those of its blocks come block by block."""

    def make(layerwise: bool) -> OSD:
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(24, 24) for _ in range(4))})
        if way == "function":
            return optimizer_of(torch.compile(model, backend="eager"), layerwise=layerwise)
        for module in [model] if way == "method" else model["layers"]:
            module.compile(backend="eager")
        return optimizer_of(model, layerwise=layerwise)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(layerwise=False)
    assert not [warning for warning in caught if TOLD in str(warning.message)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(layerwise=True)
    assert len([warning for warning in caught if TOLD in str(warning.message)]) == (way != "blocks")


def test_gradients_of_compiled_blocks_come_block_by_block(monkeypatch):
    layers = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in range(4))
    optimizer = OSD([{"params": list(layers.parameters()), "rank": 4}], layerwise=True)
    events: list[str] = []
    names = {layer.weight: f"weight {i}" for i, layer in enumerate(layers)}
    take = optimizer.stream._take
    monkeypatch.setattr(optimizer.stream, "_take", lambda p: events.append(names[p]) or take(p))
    x = torch.randn(4, 32)
    for i, layer in enumerate(layers):
        layer.compile(backend="aot_eager")
        x = layer(x)
        x.register_hook(lambda gradient, i=i: events.append(f"into block {i}"))
    x.square().mean().backward()
    optimizer.step()
    assert events == [f"{event} {i}" for i in (3, 2, 1, 0) for event in ("into block", "weight")]
