"""One model has one name for each parameter, however it is wrapped: in groups, states, P and patterns."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from hf_osd import OSD, ProjectionState, create_osd_optimizer
from hf_osd.optim.selection.wrappers import plain_name
from reference.tiny_models import tiny_llama


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_blocks(wrap):
    def wrapped(model: nn.Module) -> nn.Module:
        layers = model.model.layers
        for index, layer in enumerate(layers):
            layers[index] = wrap(layer)
        return model

    return wrapped


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


WRAPS = {
    "bare": lambda model: model,
    "compiled": compiled,
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compiled DDP": lambda model: compiled(DistributedDataParallel(model)),
    "DDP of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled blocks": in_blocks(compiled),
    "DDP of compiled blocks": lambda model: DistributedDataParallel(in_blocks(compiled)(model)),
    "checkpointed blocks": in_blocks(checkpoint_wrapper),
}
NAMES = [name for name, _ in tiny_llama().named_parameters()]


def names_of(optimizer: OSD) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def stepped(optimizer: OSD) -> OSD:
    torch.manual_seed(1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def as_before(state_dict: dict, names: dict[str, str]) -> dict:
    """A state with the names of a wrapped model, as it was saved once."""
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group["param_names"] = [names[name] for name in group["param_names"]]
    return state_dict


@pytest.mark.parametrize("wrap", WRAPS)
def test_states_and_projections_fit_whatever_the_model_is_wrapped_in(wrap: str):
    bare, model = tiny_llama(), WRAPS[wrap](tiny_llama())
    ours, other = (stepped(create_osd_optimizer(one, rank=4, weight_decay=0.1)) for one in (bare, model))
    assert names_of(other) == names_of(ours) and set(names_of(ours)) == set(NAMES)
    assert [g["weight_decay"] for g in other.param_groups] == [g["weight_decay"] for g in ours.param_groups]
    states = [ProjectionState.from_optimizer(one) for one in (ours, other)]
    assert states[0].keys() == states[1].keys()
    inside = {plain_name(name).removeprefix("module."): name for name, _ in model.named_parameters()}
    saved = as_before(other.state_dict(), inside)
    for optimizer in (ours, other):
        optimizer.load_state_dict(saved)
        optimizer.load_state_dict(ours.state_dict())
        assert set(names_of(optimizer)) == set(NAMES)
    old = ProjectionState({inside[name]: entry for name, entry in states[1].items()})
    assert {name.removeprefix("module.") for name in old} == set(states[0])
    create_osd_optimizer(model, rank=4, init=old)
    create_osd_optimizer(bare, rank=4, init={inside[name]: entry.projection for name, entry in states[1].items()})


@pytest.mark.parametrize("wrap", WRAPS)
def test_patterns_are_for_the_bare_names(wrap: str):
    model = WRAPS[wrap](tiny_llama())
    optimizer = create_osd_optimizer(
        model,
        rank=4,
        target_modules=r"model\.layers\.\d+\.self_attn\.[qkv]_proj",
        exclude_modules=["model.layers.1.self_attn.k_proj"],
        rank_pattern={r"model\.layers\.0\.self_attn\.q_proj": 2},
    )
    ranks = {name: g["rank"] for g in optimizer.param_groups if g["rank"] for name in g["param_names"]}
    expected = {f"model.layers.{i}.self_attn.{kind}_proj.weight": 4 for i in (0, 1) for kind in "qkv"}
    del expected["model.layers.1.self_attn.k_proj.weight"]
    assert ranks == expected | {"model.layers.0.self_attn.q_proj.weight": 2}


@pytest.mark.parametrize("wrap", WRAPS)
def test_pairs_of_a_wrapped_model_are_named_likewise(wrap: str):
    model = WRAPS[wrap](tiny_llama())
    assert names_of(OSD(model.named_parameters(), rank=4)) == NAMES
    pairs = list(model.named_parameters())
    optimizer = OSD([{"params": pairs[:3], "rank": 4}, {"params": iter(pairs[3:5])}])
    optimizer.add_param_group({"params": pairs[5:]})
    assert names_of(optimizer) == NAMES


def test_a_part_of_ones_own_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(8, 12), "head": nn.Linear(12, 4)})
    names = ["module.weight", "module.bias", "head.weight", "head.bias"]
    assert names_of(OSD(model.named_parameters(), rank=2)) == names
    optimizer = stepped(create_osd_optimizer(model, rank=2, target_modules=["module"]))
    assert all(model.get_parameter(name) is not None for name in names_of(optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    assert list(ProjectionState.from_optimizer(optimizer)) == ["module.weight"]
