"""Layers that are given one tensor share one P, and weights that are used otherwise are seen."""

import copy
import logging

import pytest
import torch
from torch import nn

import hf_osd
from reference.nets_in_layers import Net, Other, batch, distance, loss_of, make, train
from reference.tiny_models import tiny_llama


def llama_step(model, optimizer, seed=0):
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_llama_block_has_four():
    model = tiny_llama()
    optimizer = hf_osd.create_osd_optimizer(model, rank=4, source="activations")
    llama_step(model, optimizer)
    llama_step(model, optimizer)
    holders = {
        name.removesuffix(".weight").rpartition(".")[2]: optimizer.weight_of(model.get_parameter(name)).geometry.holder
        for name in optimizer._layers.layers
        if name.startswith("model.layers.0.")
    }
    short = {name: holder.removesuffix(".weight").rpartition(".")[2] for name, holder in holders.items()}
    assert short == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "q_proj"),
        "o_proj": "o_proj",
        **dict.fromkeys(("gate_proj", "up_proj"), "gate_proj"),
        "down_proj": "down_proj",
    }
    assert sum("projection" in state for state in optimizer.state.values()) == 4 * 2
    assert sum("projection_exp_avg" in state for state in optimizer.state.values()) == 4 * 2


def test_equal_tensors_are_not_one():
    net = Other(lambda layers, x: layers["a"](x) + layers["b"](x.clone()), a=nn.Linear(20, 24), b=nn.Linear(20, 24))
    optimizer = make(net)
    train(net, optimizer, range(2))
    assert len(list(optimizer._layers.inputs())) == 2


def test_a_tensor_that_was_changed_in_place_is_not_the_same():
    net = Other(lambda layers, x: layers["a"](x) + layers["b"](x.mul_(2)), a=nn.Linear(20, 24), b=nn.Linear(20, 24))
    optimizer = make(net)
    with torch.no_grad():
        x = batch(0)
    net(x)
    assert len(list(optimizer._layers.inputs())) == 2


def test_layers_of_other_ranks_and_groups_do_not_share():
    net = Other(lambda layers, x: layers["a"](x) + layers["b"](x), a=nn.Linear(20, 24), b=nn.Linear(20, 24))
    optimizer = make(net, rank_pattern={"b": 3})
    train(net, optimizer, range(2))
    assert len(list(optimizer._layers.inputs())) == 2


def test_a_shared_input_that_parts_later_is_still_right():
    """Sharing was seen once; with another tensor each layer's R is made of its own."""
    apart = []

    def forward(layers, x):
        return layers["a"](x) + layers["b"](x * 2 if apart else x)

    net = Other(forward, a=nn.Linear(20, 24), b=nn.Linear(20, 24))
    optimizer = make(net)
    train(net, optimizer, range(2))
    apart.append(True)
    plain = copy.deepcopy(net)
    loss_of(net(batch(0))).backward()
    loss_of(plain(batch(0))).backward()
    P = optimizer._layers.layers["layers.a.weight"].input.P
    for name in ("a", "b"):
        R = optimizer._layers.layers[f"layers.{name}.weight"].stand_in.grad
        assert (R - plain.layers[name].weight.grad @ P).abs().max() < 1e-12


def used_beside(layers, x):
    return layers["a"](x) @ layers["a"].weight @ layers["b"](x).mT


@pytest.mark.parametrize("signs", [False, True])
def test_what_else_is_done_with_a_weight_is_in_its_r(signs: bool):
    net = Other(used_beside, a=nn.Linear(20, 24), b=nn.Linear(20, 20))
    options: dict = {"residual": "sign", "residual_sample": 3} if signs else {}
    optimizer = make(net, **options)
    train(net, optimizer, range(1))
    plain, P = copy.deepcopy(net), optimizer._layers.layers["layers.a.weight"].input.P.clone()
    W = net.layers["a"].weight.detach().clone()
    loss_of(net(batch(1))).backward()
    loss_of(plain(batch(1))).backward()
    optimizer.step()
    moment = optimizer.state[net.layers["a"].weight]["exp_avg"]
    G = plain.layers["a"].weight.grad
    assert (moment - 0.1 * G @ P).abs().max() < 1e-12
    D = moment / 0.1 / (optimizer.state[net.layers["a"].weight]["exp_avg_sq"] / 0.001).sqrt().add(1e-8)
    rest = torch.zeros_like(G)
    rest[:, ::3] = 3**0.5 * torch.sign(G - G @ P @ P.T)[:, ::3]
    assert (W - 1e-2 * (D @ P.T + signs * rest) - net.layers["a"].weight).abs().max() < 1e-12


def test_a_layer_that_is_never_called_goes_by_gradients(caplog):
    def forward(layers, x):
        return nn.functional.linear(x, layers["a"].weight) + layers["b"](x)

    net = Other(forward, a=nn.Linear(20, 24), b=nn.Linear(20, 24))
    optimizer = make(net)
    before = net.layers["a"].weight.detach().clone()
    with caplog.at_level(logging.WARNING, "hf_osd"):
        train(net, optimizer, range(3))
    assert sum("layers.a.weight is used otherwise" in record.message for record in caplog.records) == 1
    assert list(optimizer._layers.left) == ["layers.a.weight"]
    assert type(net.layers["a"]) is nn.Linear and optimizer.state[net.layers["a"].weight]["step"] == 3
    assert not torch.equal(net.layers["a"].weight, before)


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_is_known_beforehand_not_to_be_a_linear_layer_goes_by_gradients():
    tied = nn.Linear(20, 20)
    embedding = nn.Embedding(20, 20)
    embedding.weight = tied.weight
    replaced = nn.Linear(20, 20)
    replaced.forward = lambda x, plain=replaced.forward: plain(x)
    net = Other(
        lambda layers, x: layers["tied"](layers["replaced"](layers["sub"](x))) + layers["embedding"].weight.sum(),
        sub=Subclass(20, 20),
        tied=tied,
        embedding=embedding,
        replaced=replaced,
        plain=nn.Linear(20, 20),
    )
    optimizer = make(net)
    assert list(optimizer._layers.layers) == ["layers.plain.weight"]
    assert set(optimizer._layers.left) == {"layers.sub.weight", "layers.tied.weight", "layers.replaced.weight"}
    before = [p.detach().clone() for p in net.parameters()][:4]
    train(net, optimizer, range(3))
    assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=False))


def test_experts_go_by_gradients_and_both_resume_exactly():
    from transformers import MixtralConfig, MixtralForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 4}

    def make_both():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**small))
        return model, hf_osd.create_osd_optimizer(model, rank=4, source="activations")

    model, optimizer = make_both()
    assert any("experts" in name for name in optimizer._layers.left)
    for seed in range(3):
        llama_step(model, optimizer, seed)
    other, second = make_both()
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        llama_step(model, optimizer, seed)
        llama_step(other, second, seed)
    assert distance(model, other) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "left"}, "`side`"),
        ({"side": "two_sided"}, "`side`"),
        ({"residual": "scaled"}, "`residual`.*use residual='sign'"),
        ({"subspace": "svd"}, "made from gradients"),
        ({"subspace": "cosine"}, "made from gradients"),
        ({"init": "svd"}, "decomposes a gradient"),
        ({"ddp_compression": "subspace"}, "Use source='activations'"),
        ({"subspace": "random", "projection_sample": 2}, "`projection_sample`"),
        ({"subspace": "power", "mixing": 0.5}, "`mixing`"),
        ({"source": "activation"}, "activations"),
    ],
)
def test_what_needs_a_gradient_is_refused(options, message):
    net = Net()
    with pytest.raises(ValueError, match=message):
        make(net, **options)
    assert type(net.layers[0]) is nn.Linear


def test_ddp_comes_after_the_optimizer():
    net = nn.Module.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(net)
    net.module = Net()
    with pytest.raises(ValueError, match="make the optimizer first"):
        make(net)


def test_osd_alone_has_no_prepared_layers():
    with pytest.raises(ValueError, match="create_osd_optimizer"):
        hf_osd.OSD([{"params": [nn.Linear(8, 8).weight], "rank": 2}], source="activations")
