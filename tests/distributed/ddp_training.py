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


def own_model(inner: int = 40, optim: str = "osd_adamw", **options: Any) -> tuple[Net, OSD, nn.Module]:
    """A model, its optimizer, and the model in DDP where there are several processes."""
    net = Net(inner)
    if dist.is_initialized() and dist.get_rank() > 0:
        with torch.no_grad():  # the first process's weights count
            for p in net.parameters():
                p.add_(0.1)
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


def accelerate_loop() -> tuple[nn.Module, OSD]:
    """The same through accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = Net()
    own = create_osd_optimizer(net, lr=1e-2, rank=6)
    model, optimizer = accelerator.prepare(net, own)
    for step in range(STEPS):
        x, y = (X[share()] for X in batch(step))
        accelerator.backward((model(x) - y).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return net, own


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


def trainer(
    folder: str, optim: str = "osd_adamw", text: str = "", resume: Path | None = None, **given: Any
) -> tuple[nn.Module, OSD, list]:
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
    if optim == "subzero" and dist.is_initialized() and dist.get_rank() > 0:
        with torch.no_grad():  # the first process's weights count
            for p in model.parameters():
                p.add_(0.1)
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
    own.train(resume_from_checkpoint=resume and str(resume))
    buckets = own.model_wrapped.reducer._get_zeros_like_grad_buckets() if optim == "subzero" and processes > 1 else ()
    own.optimizer.optimizer.gradient_bytes = sum(bucket.buffer().nbytes for bucket in buckets)
    return model, own.optimizer.optimizer, own.state.log_history


def state_of(model: nn.Module, optimizer: OSD) -> dict[str, Any]:
    """Everything that must agree, by parameter name."""
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "states": {name: dict(optimizer.state[p]) for name, p in model.named_parameters()},
    }


def refusals() -> dict[str, str]:
    """What must not work beside other processes."""
    messages = {}
    for name, given in {"layerwise": {}, "accumulated": {"gradient_accumulation": True}}.items():
        try:
            own_loop(optim="osd_adamw_layerwise", **given)
        except ValueError as error:
            messages[name] = str(error)
    return messages


ORTHONORMAL = {"init": "orthonormal"}
OWN_LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random_start": ORTHONORMAL,
    "scaled": {"residual": "scaled"},
    "sign": {"residual": "sign", "residual_scale": 0.1, "subspace": "random", "update_interval": 5},
    "two_sided": {"side": "two_sided", "residual": "scaled"},
    "power": {"subspace": "power", "residual": "scaled"},
    "cosine": {"subspace": "cosine", "update_interval": 5, "carry_moments": True},
    "importance": {"subspace": "importance", "update_interval": 5},
    "accumulated": {"micro": 3},
    # 256 x 16 moments are large enough for 8 bits; P is given, as gradients of 8 samples do not determine 16 columns
    "eight_bit": {"optim": "osd_adamw8bit", "inner": 256, "rank": 16, "subspace": "static", **ORTHONORMAL},
}
RESUMED = ["plain", "accumulated", "cosine", "eight_bit"]
# the clip is far below every norm, so that every step is scaled
TRAINERS: dict[str, dict[str, Any]] = {
    "trainer_plain": {"max_grad_norm": 0.5},
    "trainer_activations": {"text": ",source=activations,init=orthonormal,projection_sample=1", "max_grad_norm": 0.01},
}


SUBZERO: dict[str, Any] = {"optim": "subzero", "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}


FOLLOWING = {"text": ",source=activations,update_interval=5"}


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
    model, subzero, log = trainer(str(folder / "subzero"), **SUBZERO)
    results["subzero"] = {"weights": {name: p.detach() for name, p in model.named_parameters()}, "log": log}
    results["subzero"] |= {"rho": subzero.history()[0], "gradient_bytes": subzero.gradient_bytes}
    saving = {"save_strategy": "steps", "save_steps": 3}
    for name, resume in {"following": None, "following_resumed": folder / "following" / "checkpoint-3"}.items():
        model, subzero, _ = trainer(str(folder / "following"), resume=resume, **SUBZERO | FOLLOWING | saving)
        results[name] = {"weights": {name: p.detach() for name, p in model.named_parameters()}}
        results[name]["basis"] = {weight.name: weight.basis for weight in subzero.weights.following}
    results["accelerate"] = state_of(*accelerate_loop())
    results["refusals"] = refusals()
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
