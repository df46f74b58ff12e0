"""A small model with every kind of shard, and the same training on one process and on several."""

import gc
import warnings
import weakref

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hf_osd import OSD


RANK = 6
LR = 1e-2


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tall = nn.Linear(width, inner)  # 33 rows: uneven on 2 and 4 processes
        self.wide = nn.Linear(inner, width, bias=False)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.wide(self.tall(self.frozen(self.norm(x))).relu())


class Model(nn.Module):
    """Tied embeddings, uneven rows, fewer rows than processes, vectors, frozen weights."""

    def __init__(self, width: int = 20, inner: int = 33) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, width)
        self.blocks = nn.ModuleList([Block(width, inner) for _ in range(2)])
        self.gate = nn.Linear(width, 1, bias=False)  # one row: an empty shard on all processes but one
        self.head = nn.Linear(width, 37, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.gate(x).sigmoid())


def make_model(dtype: torch.dtype = torch.float64, **sizes: int) -> Model:
    torch.manual_seed(0)
    return Model(**sizes).to(dtype)


def shard(model: Model, mesh=None, **options) -> Model:
    """`fully_shard` itself: accelerate makes DDP of FSDP on the CPU without a word."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    assert isinstance(model, FSDPModule) and isinstance(model.blocks[0].tall.weight, DTensor)
    return model


def shard_as_accelerate(model: nn.Module, optimizer: OSD) -> None:
    """`Accelerator._prepare_fsdp2`: empty the optimizer's parameters, shard the model, put the new ones in."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    old = {name: p.data_ptr() for name, p in model.named_parameters()}
    gone = [weakref.ref(p) for name, p in model.named_parameters() if "osd_stand_ins" not in name]
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
            group["params"][i].data_ptr = p.data_ptr()
    shard(model)
    del p
    gc.collect()
    assert not any(reference() is not None for reference in gone)  # no whole weight is kept
    new = dict(model.named_parameters())
    fsdp2_switch_optimizer_parameters(optimizer, {pointer: new[name] for name, pointer in old.items()})


def single_process_mesh(world_size: int):
    """A mesh of this process alone, inside a larger world."""
    return init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("others", "own"))["own"]


def make_groups(model: nn.Module, rank: int = RANK) -> list[dict]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    projected = {name: p for name, p in named.items() if p.ndim == 2 and "embedding" not in name}
    others = {name: p for name, p in named.items() if name not in projected}
    return [{"params": list(projected.items()), "rank": rank}, {"params": list(others.items())}]


def make_optimizer(model: nn.Module, rank: int = RANK, **options) -> OSD:
    groups = make_groups(model, rank)
    if options.get("subspace", "online_pca") == "online_pca" and options.get("side") != "two_sided":
        groups[0]["projection_sample"] = options.pop("projection_sample", 1)  # blocks are of each process's own part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the gate has one row: its rank is clipped, which the optimizer says
        return OSD(groups, **{"lr": LR, "weight_decay": 0.01, **options})


def loss_of(model: nn.Module, step: int, part: int = 0, parts: int = 1) -> Tensor:
    """Of this process's part of a global batch of 12."""
    tokens = torch.randint(0, 37, (12, 7), generator=torch.Generator().manual_seed(step)).chunk(parts)[part]
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: OSD, steps: range, part: int = 0, parts: int = 1, clip: float = 0.0) -> None:
    for step in steps:
        loss_of(model, step, part, parts).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def whole(X: Tensor) -> Tensor:
    return X.full_tensor() if isinstance(X, DTensor) else X


def assert_same_weights(sharded: nn.Module, single: nn.Module, tolerance: float) -> None:
    expected = dict(single.named_parameters())
    for name, p in sharded.named_parameters():
        torch.testing.assert_close(whole(p.detach()), whole(expected[name].detach()), rtol=0, atol=tolerance)


def assert_same_state(sharded: OSD, single: OSD, tolerance: float) -> None:
    for group, other in zip(sharded.param_groups, single.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            for name, value in single.state[q].items():
                torch.testing.assert_close(whole(sharded.state[p][name]), value, rtol=0, atol=tolerance)


def pretend_to_be_on_gpus() -> None:
    """Let accelerate do FSDP on CPUs, of which it makes DDP."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    ordinary = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        ordinary(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, kwargs["fsdp_plugin"]

    AcceleratorState.__init__ = init
