"""Trainings that run on one process or several, on the same global batches. Also the program that torchrun starts."""

import contextlib
import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_osd import OSD, create_osd_optimizer
from hf_osd.optim.options.mode import LAYERWISE_SUFFIX


STEPS, BATCH = 20, 8


class Net(nn.Module):
    """Projected on either side, tied, and at full size, in float64."""

    def __init__(self, inner: int = 40) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = ((24, 24), (24, 24), (24, inner))
        self.layers = nn.ModuleList(nn.Linear(n, m, dtype=torch.float64) for n, m in shapes)
        self.layers[1].weight = self.layers[0].weight
        self.head = nn.Linear(inner, 12, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(inner, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x * self.scale)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, 24, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, :12] * 2)


def share() -> slice:
    """This process's part of a global batch."""
    if not dist.is_initialized():
        return slice(None)
    part = BATCH // dist.get_world_size()
    return slice(dist.get_rank() * part, (dist.get_rank() + 1) * part)


def own_model(
    inner: int = 40, optim: str = "osd_adamw", layerwise: bool = False, **options: Any
) -> tuple[Net, OSD, nn.Module]:
    """A model, its optimizer, and the model in DDP where there are several processes."""
    net = Net(inner)
    if dist.is_initialized() and dist.get_rank() > 0:
        with torch.no_grad():  # the first process's weights count
            for p in net.parameters():
                p.add_(0.1)
    optim += LAYERWISE_SUFFIX * layerwise
    optimizer = create_osd_optimizer(net, optim, **({"lr": 1e-2, "rank": 6, "weight_decay": 0.1} | options))
    return net, optimizer, nn.parallel.DistributedDataParallel(net) if dist.is_initialized() else net


def own_loop(
    steps: int = STEPS, micro: int = 1, clip: float | None = None, resume_at: int | None = None, **options: Any
) -> tuple[Net, OSD]:
    """A training in DDP, or alone; `micro` backward passes over the same batch before each step."""
    net, optimizer, model = own_model(**options)
    for step in range(steps):
        if step == resume_at:
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            net, optimizer, model = own_model(**options)
            net.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        x, y = (X[share()] for X in batch(step))
        for i in range(micro):
            last = i == micro - 1 or not dist.is_initialized()
            with contextlib.nullcontext() if last else model.no_sync():
                ((model(x + 0.1 * i) - y).square().mean() / micro).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def accelerate_loop(**options: Any) -> tuple[nn.Module, OSD]:
    """The same through accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = Net()
    own = create_osd_optimizer(net, lr=1e-2, rank=6, **options)
    model, optimizer = accelerator.prepare(net, own)
    for step in range(STEPS):
        x, y = (X[share()] for X in batch(step))
        accelerator.backward((model(x) - y).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return net, own


def stack_loop(micro: int = 1, **options: Any) -> tuple[nn.Module, OSD]:
    """A stack of experts' matrices outside DDP; each process's half of the batch goes to experts of its own."""
    generator = torch.Generator().manual_seed(5)
    experts = nn.Module()
    experts.W = nn.Parameter(torch.randn(4, 12, 20, generator=generator, dtype=torch.float64))
    optimizer = OSD([{"params": [("W", experts.W)]}], lr=1e-2, rank=4, **options)
    for step in range(12):
        G = torch.randn(BATCH, 4, 12, 20, generator=generator, dtype=torch.float64)
        G[: BATCH // 2, 0] = 0  # no tokens of the first half
        G[BATCH // 2 :, 1] = 0
        G[:, step % 4] = 0
        for part in G[share()].chunk(micro):
            (experts.W * part.mean(0) / micro).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return experts, optimizer


class Tokens(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Recorded(Trainer):
    """A stock Trainer, but for the data in their order: a sampler's shuffling depends on the number of processes."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder: str, optim: str = "osd_adamw", text: str = "", **given: Any) -> tuple[nn.Module, OSD, list]:
    """A Trainer on the same data; returns its log as well."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).double()
    processes = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    defaults: dict[str, Any] = {
        "learning_rate": 2e-3,
        "max_steps": 10,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4 // processes,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(folder, optim=optim, optim_args=f"rank=8{text}", **(defaults | given))
    own = Recorded(model, args, train_dataset=Tokens())
    own.train()
    return model, own.optimizer.optimizer, own.state.log_history


def state_of(model: nn.Module, optimizer: OSD) -> dict[str, Any]:
    """Everything that must agree, by parameter name."""
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "states": {name: dict(optimizer.state[p]) for name, p in model.named_parameters()},
        "grad_norm": optimizer.grad_norm,
    }


def counted() -> dict[str, int]:
    """Bytes that our exchanges of one step put on the wire (DDP's own are not seen)."""
    from hf_osd.optim.arrival.exchange import exchange_bytes
    from hf_osd.optim.step.full_weight import FullWeight

    original, seen = dist.all_reduce, []

    def all_reduce(X: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(X.numel() * X.element_size())
        return original(X, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        own_loop(steps=2, ddp_compression="subspace")
        two = sum(seen)
        seen.clear()
        net, optimizer = own_loop(steps=1, ddp_compression="subspace")
    finally:
        dist.all_reduce = original
    geometries = [optimizer.weight_of(p).geometry for p in net.parameters()]
    compressed, whole = exchange_bytes(geometries, [p.dtype for p in net.parameters()])
    full_size = sum(p.numel() * 8 for p in net.parameters() if isinstance(optimizer.weight_of(p), FullWeight))
    return {"second_step": two - sum(seen), "predicted": compressed - full_size, "whole": whole - full_size}


def refusals() -> dict[str, str]:
    """What must not work beside other processes."""
    messages = {}
    for name, call in {
        "layerwise": lambda: own_loop(layerwise=True),
        "wrapped": lambda: create_osd_optimizer(
            nn.parallel.DistributedDataParallel(Net()), rank=6, ddp_compression="subspace"
        ),
    }.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


ORTHONORMAL = {"init": "orthonormal"}
COMPRESSED = {"ddp_compression": "subspace"}
EIGHT_BIT = {"optim": "osd_adamw8bit", "inner": 256, "rank": 16, "subspace": "static", **ORTHONORMAL}
# below every norm, so that every step is scaled
CLIPPED = {"optim": "osd_sgd", "lr": 0.2, "weight_decay": 0.0, "max_grad_norm": 0.02, "subspace": "static"}
# name -> what torchrun runs; without `COMPRESSED` the control on one process
OWN_LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain_random": ORTHONORMAL,
    "plain_scaled": {"residual": "scaled"},
    "plain_sign": {"residual": "sign", "residual_scale": 0.1, "subspace": "random", "update_interval": 5},
    "plain_two_sided": {"side": "two_sided", "residual": "scaled"},
    "plain_power": {"subspace": "power", "residual": "scaled"},
    "plain_cosine": {"subspace": "cosine", "update_interval": 5, "carry_moments": True},
    "plain_importance": {"subspace": "importance", "update_interval": 5},
    "random": {"subspace": "random", "update_interval": 5, **COMPRESSED},
    "cosine": {"subspace": "cosine", "update_interval": 5, **COMPRESSED},
    "importance": {"subspace": "importance", "update_interval": 5, **COMPRESSED},
    "carried_svd": {"subspace": "svd", "update_interval": 5, "carry_moments": True, **COMPRESSED},
    "online_pca_at_intervals": {"projection_interval": 3, "carry_moments": True, **COMPRESSED},
    "layerwise_random": {"subspace": "random", "distribution": "gaussian", "layerwise": True, **COMPRESSED},
    "static": {"subspace": "static", **COMPRESSED},
    "svd": {"subspace": "svd", "update_interval": 5, **COMPRESSED},
    "online_pca": {**COMPRESSED},
    "online_pca_random": {**ORTHONORMAL, **COMPRESSED},
    "layerwise_static": {"subspace": "static", "layerwise": True, **COMPRESSED},
    "layerwise_online_pca": {"layerwise": True, **COMPRESSED},
    "accumulated": {"subspace": "static", "micro": 3, **ORTHONORMAL, **COMPRESSED},
    "layerwise_accumulated": {
        "subspace": "static",
        "micro": 3,
        "layerwise": True,
        "gradient_accumulation": True,
        **ORTHONORMAL,
        **COMPRESSED,
    },
    # 256 x 16 moments are large enough for 8 bits; P is given, as gradients of 8 samples do not determine 16 columns
    "eight_bit": {**EIGHT_BIT, **COMPRESSED},
    "layerwise_eight_bit": {**EIGHT_BIT, "layerwise": True, **COMPRESSED},
    "layerwise_clipped_parameter": {**CLIPPED, "layerwise": True, "layerwise_clipping": "parameter", **COMPRESSED},
    "layerwise_clipped_previous": {**CLIPPED, "layerwise": True, "layerwise_clipping": "previous_norm", **COMPRESSED},
}
LAYERWISE = {"layerwise": True, "gradient_accumulation": True}
# a process whose tokens miss an expert must not take another way: P moves, or is made anew, for all or for none
STACKS: dict[str, dict[str, Any]] = {
    "stack": {"subspace": "static", **COMPRESSED},
    "stack_random": {"subspace": "random", "update_interval": 3, **COMPRESSED},
    "stack_at_intervals": {"projection_interval": 3, **COMPRESSED},
    "stack_svd_accumulated": {"subspace": "svd", "update_interval": 3, "micro": 2, **LAYERWISE, **COMPRESSED},
    "stack_at_intervals_accumulated": {"projection_interval": 3, "micro": 2, **LAYERWISE, **COMPRESSED},
}
RESUMED = [
    *("online_pca", "svd", "accumulated", "eight_bit", "random", "cosine"),
    *("layerwise_online_pca", "layerwise_accumulated", "layerwise_eight_bit", "layerwise_clipped_previous"),
]
# the tests' clip is far below every norm, so that every step is scaled
TRAINERS: dict[str, dict[str, Any]] = {
    "trainer_plain": {"max_grad_norm": 0.5},
    "trainer_static": {"text": ",subspace=static,ddp_compression=subspace", "max_grad_norm": 0.0},
    "trainer_clipped": {"text": ",subspace=static,ddp_compression=subspace", "max_grad_norm": 0.5},
    "trainer_layerwise": {
        "optim": "osd_adamw_layerwise",
        "text": ",subspace=static,ddp_compression=subspace",
        "max_grad_norm": 0.0,
    },
    "trainer_accumulated": {
        "optim": "osd_adamw_layerwise",
        "text": ",subspace=static,init=orthonormal,ddp_compression=subspace",
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 2,
    },
}


def main(folder: Path) -> None:
    """Everything that the tests ask of several processes, in one start."""
    results: dict[str, Any] = {}
    for name, given in TRAINERS.items():  # first: Trainer makes the process group
        model, optimizer, log = trainer(str(folder / name), **given)
        results[name] = state_of(model, optimizer) | {"log": log}
    for name, given in OWN_LOOPS.items():
        results[name] = state_of(*own_loop(**given))
    for name in RESUMED:
        results[f"{name}_resumed"] = state_of(*own_loop(resume_at=STEPS // 2, **OWN_LOOPS[name]))
    results["accelerate"] = state_of(*accelerate_loop())
    results["accelerate_compressed"] = state_of(*accelerate_loop(**COMPRESSED))
    for name, given in STACKS.items():
        results[name] = state_of(*stack_loop(**given))
    results["bytes"], results["refusals"] = counted(), refusals()
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
