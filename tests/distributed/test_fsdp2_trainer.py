"""A stock Trainer under FSDP2: accelerate's own preparation, checkpoints and resume on two processes.

On the CPU accelerate makes DDP of FSDP without a word, so its state is told what it would say on GPUs. What follows is
its own code: the optimizer is built first, the model sharded, the parameters exchanged.
"""

import json
import os
from pathlib import Path

import processes
import pytest
import torch
from sharded_models import pretend_to_be_on_gpus
from transformers import MixtralConfig, MixtralForCausalLM, Trainer

from hf_osd import OSDTrainingArguments, ProjectionState


pytestmark = pytest.mark.distributed
STEPS = 4
SOURCES = {"gradients": {}, "activations": {"osd_source": "activations"}}


def train(output_dir: Path, batch: int, resume: Path | None = None, **options) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    # three experts: two on the first process, one on the second; projected on the right as all that is sharded
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=3)
    tokens = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(1))
    args = OSDTrainingArguments(
        output_dir=str(output_dir),
        optim="osd_adamw",
        osd_rank=8,
        osd_projection_sample=1,  # blocks would be of each process's own part
        learning_rate=1e-2,
        weight_decay=0.01,
        max_steps=STEPS,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=batch,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(MixtralForCausalLM(config), args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def sharded_trainer(rank: int, world: int, folder: Path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # accelerate asks, and finds the group made
    pretend_to_be_on_gpus()
    fsdp = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False, "reshard_after_forward": True},
    }
    fsdp["fsdp_config"]["state_dict_type"] = "SHARDED_STATE_DICT"
    for source, options in SOURCES.items():
        train_and_resume(rank, folder / source, fsdp | options)


def train_and_resume(rank: int, folder: Path, options: dict):
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    # two micro-batches where R is exchanged, in what accelerate makes of a step
    parts = {"gradient_accumulation_steps": 2} if "osd_source" in options else {}
    batch = 2 // parts.get("gradient_accumulation_steps", 1)
    trainer = train(folder / "sharded", batch, **options, **parts)
    assert isinstance(trainer.model, FSDPModule)
    assert (folder / "sharded" / "checkpoint-2" / "optimizer_0").is_dir()  # sharded, by torch.distributed.checkpoint
    groups = trainer.optimizer.optimizer.param_groups
    assert all(isinstance(p, DTensor) for group in groups for p in group["params"])
    assert set(groups[0]["sides"]) == {"right"}
    weights = {name: p.detach().full_tensor() for name, p in trainer.model.named_parameters()}
    losses = logged(trainer)

    again = train(folder / "sharded", batch, resume=folder / "sharded" / "checkpoint-2", **options, **parts)
    for name, p in again.model.named_parameters():
        assert torch.equal(p.detach().full_tensor(), weights[name]), name
    if rank == 0:
        torch.save(weights, folder / "weights.bin")
        (folder / "losses.json").write_text(json.dumps(losses))


def logged(trainer: Trainer) -> list[float]:
    """Loss and norm of each step; they are clipped to a norm of 1, too."""
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry for key in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    results = processes.run(2, [sharded_trainer], folder)
    assert not results["sharded_trainer"], results["sharded_trainer"]
    return folder


@pytest.mark.parametrize("source", SOURCES)
def test_two_processes_train_what_one_trains(folder, source):
    tmp_path, options = folder / source, SOURCES[source] or {"osd_side": "right"}
    single = train(tmp_path / "single", 4, **options)
    losses = logged(single)
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, abs=1e-4)
    weights = torch.load(tmp_path / "weights.bin", weights_only=True)
    for name, p in single.model.named_parameters():
        # float32, and Adam divides by gradients near zero: a tenth of a step
        torch.testing.assert_close(weights[name], p.detach(), rtol=0, atol=1e-3)

    saved = ProjectionState.from_pretrained(tmp_path / "sharded" / f"checkpoint-{STEPS}")
    expected = ProjectionState.from_optimizer(single.optimizer)
    assert set(saved) == set(expected) and {entry.side for entry in saved.values()} == {"right"}
    for name, entry in saved.items():
        P, Q = entry.projection, expected[name].projection
        # of the first gradient's singular vectors, whose sign is the processor's
        P = P * (P * Q).sum(dim=-2, keepdim=True).sign()
        torch.testing.assert_close(P, Q, rtol=0, atol=1e-2)
