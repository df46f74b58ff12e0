"""Scenarios of `source="activations"` under FSDP2: training as of one process on the global batch."""

import os
import warnings
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import torch.distributed as dist
from sharded_models import (
    LR,
    RANK,
    assert_same_state,
    assert_same_weights,
    loss_of,
    make_model,
    pretend_to_be_on_gpus,
    shard,
    shard_as_accelerate,
    single_process_mesh,
    train,
    whole,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from hf_osd import OSD, create_osd_optimizer
from hf_osd.layers import fsdp
from hf_osd.optim.step.sharding import local


STEPS = 5
TOLERANCE = 1e-9  # float64, see test_fsdp2.py
TARGETS = ["tall", "wide", "gate"]  # the gate, of one row, has an empty part on all processes but one


def make(model: nn.Module, optim: str = "osd_adamw", **options) -> OSD:
    defaults = {"lr": LR, "rank": RANK, "source": "activations", "weight_decay": 0.01}
    if options.get("subspace") != "random":
        defaults["projection_sample"] = 1  # else tokens are of each process's own part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rank of the gate is clipped, which the optimizer says
        return create_osd_optimizer(model, optim, **{**defaults, "target_modules": TARGETS, **options})


def compare(rank: int, world: int, clip: float = 0.0, how=MappingProxyType({}), **options):
    single, sharded = make_model(), shard(make_model(), **how)
    reference, optimizer = make(single, **options), make(sharded, **options)
    assert len(optimizer.layers.layers) == 5 and isinstance(optimizer.layers.layers["gate.weight"].stand_in, DTensor)
    train(single, reference, range(STEPS - 1), clip=clip)
    train(sharded, optimizer, range(STEPS - 1), rank, world, clip=clip)
    reference.collect_statistics = optimizer.collect_statistics = True
    train(single, reference, [STEPS - 1], clip=clip)
    train(sharded, optimizer, [STEPS - 1], rank, world, clip=clip)
    assert optimizer.statistics() == pytest.approx(reference.statistics(), abs=1e-7, nan_ok=True)
    assert_same_weights(sharded, single, TOLERANCE)
    assert_same_state(optimizer, reference, 1e-7)
    assert not torch.equal(single.blocks[0].tall.weight, make_model().blocks[0].tall.weight)
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if value is local(value):
                first = value.clone()
                dist.broadcast(first, src=0)
                assert torch.equal(first, value), name
            elif name.startswith("projection"):  # each row on one process, also where two have the same part of W
                rows = torch.tensor(len(local(value)))
                dist.all_reduce(rows)
                assert int(rows) == len(value) == p.shape[1] and value.device_mesh == p.device_mesh
            elif p.ndim == 2:
                assert value.placements == p.placements and value.shape[0] == p.shape[0]


def dense(rank: int, world: int, folder: Path):
    for options in ({}, {"optim": "osd_lion"}, {"subspace": "power"}, {"subspace": "random", "update_interval": 3}):
        compare(rank, world, **options)
    compare(rank, world, residual="sign", residual_sample=3)


def clipped(rank: int, world: int, folder: Path):
    """In buckets of one weight, of which some are sent while the backward pass goes on."""
    fsdp.BUCKET = 1000
    try:
        compare(rank, world, clip=0.05)
    finally:
        fsdp.BUCKET = 2**25


def accumulated(rank: int, world: int, folder: Path):
    """As in test_fsdp2.py; the norm that is clipped by is that of the averaged R."""
    for always in (True, False):
        single, sharded = make_model(), shard(make_model())
        reference, optimizer = make(single), make(sharded)
        for step in range(3):
            for i in range(3):
                sharded.set_requires_gradient_sync(always or i == 2)
                (loss_of(sharded, 3 * step + i, rank, world) / 3).backward()
                (loss_of(single, 3 * step + i) / 3).backward()
                gate = optimizer.layers.layers["gate.weight"]
                assert gate.made != (gate.stand_in.grad is not None) == (always or i == 2)
            norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.05) for model in (single, sharded)]
            assert norms[0] > 0.05
            torch.testing.assert_close(whole(norms[1]), norms[0], rtol=1e-9, atol=0)
            for own in (reference, optimizer):
                own.step()
                own.zero_grad()
        assert_same_weights(sharded, single, TOLERANCE)


def checkpointed(rank: int, world: int, folder: Path):
    for reentrant in (False, True):
        single, sharded = make_model(), make_model()
        for model in (single, sharded):
            for block in model.blocks:
                plain = block.forward
                block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=reentrant)  # noqa: B023
        shard(sharded)
        reference, optimizer = make(single), make(sharded)
        train(single, reference, range(3))
        train(sharded, optimizer, range(3), rank, world)
        assert_same_weights(sharded, single, TOLERANCE)


def accelerate_order(rank: int, world: int, folder: Path):
    single, sharded = make_model(), make_model()
    reference = make(single)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        optimizer = make(sharded)
    assert all(p.requires_grad for p in sharded.blocks[0].tall.parameters())  # not kept from DDP
    shard_as_accelerate(sharded, optimizer)
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    train(single, reference, range(STEPS), clip=0.05)
    train(sharded, optimizer, range(STEPS), rank, world, clip=0.05)
    assert_same_weights(sharded, single, TOLERANCE)


def loaded_by_the_first_process(rank: int, world: int, folder: Path):
    """accelerate's own preparation, which moves the model to the meta device and back; embeddings are tied."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from transformers import LlamaConfig, LlamaForCausalLM

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    pretend_to_be_on_gpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    sizes = {"hidden_size": 32, "intermediate_size": 66, "num_attention_heads": 2, "vocab_size": 64}
    config = LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    single, model = LlamaForCausalLM(config).double(), LlamaForCausalLM(config).double()
    model.load_state_dict({name: p if rank == 0 else 0 * p for name, p in single.state_dict().items()})
    reference, optimizer = (make(m, target_modules="all-linear", weight_decay=0.0) for m in (single, model))
    model, optimizer = accelerator.prepare(model, optimizer)
    layers = optimizer.optimizer.layers.layers
    assert len(layers) == 14 and all(layer.fsdp is not None for layer in layers.values())
    assert len(set(optimizer.optimizer.layers.inputs())) == 0
    for step in range(4):
        x = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(step))
        single(input_ids=x, labels=x).loss.backward()
        own = x.chunk(world)[rank]
        accelerator.backward(model(input_ids=own, labels=own).loss)
        norms = (
            nn.utils.clip_grad_norm_(single.parameters(), 0.1),
            accelerator.clip_grad_norm_(model.parameters(), 0.1),
        )
        torch.testing.assert_close(whole(norms[1]).double(), norms[0], rtol=1e-6, atol=0)
        for stepped in (reference, optimizer):
            stepped.step()
            stepped.zero_grad()
    assert len(set(optimizer.optimizer.layers.inputs())) == 8  # q, k, v have one, and gate and up
    assert_same_weights(model, single, 1e-8)  # the loss is in float32


def evaluated(rank: int, world: int, folder: Path):
    """An evaluation leaves the root's weights gathered, and a state is saved and loaded then; blocks are compiled."""
    single, sharded = make_model(), make_model()
    for block in sharded.blocks:
        block.compile(backend="aot_eager")
    fully_shard(sharded)
    reference, optimizer = make(single), make(sharded)
    for step in range(3):
        train(single, reference, range(step, step + 1))
        train(sharded, optimizer, range(step, step + 1), rank, world)
        with torch.no_grad():
            loss_of(sharded, 9, rank, world)
        assert not isinstance(sharded.blocks[0].tall.weight, DTensor)
        optimizer.load_state_dict(optimizer.state_dict())
    assert_same_weights(sharded, single, TOLERANCE)


def in_bfloat16(rank: int, world: int, folder: Path):
    """R is exchanged in the precision that FSDP2's policy says, and added to the weights in theirs."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    reduced = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dtype, policy in ((torch.float32, mixed), (torch.float32, reduced), (torch.bfloat16, MixedPrecisionPolicy())):
        single, sharded = make_model(dtype), shard(make_model(dtype), mp_policy=policy)
        reference, optimizer = make(single, optim="osd_sgd", lr=0.1), make(sharded, optim="osd_sgd", lr=0.1)
        start = make_model(dtype).blocks[0].tall.weight
        train(single, reference, range(STEPS))
        train(sharded, optimizer, range(STEPS), rank, world)
        moved = (single.blocks[0].tall.weight - start).norm()
        for name in ("blocks.0.tall.weight", "blocks.1.wide.weight"):
            p, q = single.get_parameter(name), whole(sharded.get_parameter(name))
            assert (p - q).norm() < 0.1 * moved  # bfloat16 has 8 bits
        assert optimizer.layers.layers["gate.weight"].leaf.dtype == torch.bfloat16
        assert optimizer.layers.layers["gate.weight"].stand_in.dtype == dtype


def eight_bit(rank: int, world: int, folder: Path):
    """The reference is divided over one process, so that blocks lie within rows there, too."""
    sizes = {"width": 128, "inner": 130}
    single = shard(make_model(torch.float32, **sizes), single_process_mesh(world))
    sharded = shard(make_model(torch.float32, **sizes))
    for model in (single, sharded):
        model.embedding.requires_grad_(False)  # 8-bit moments of what is not projected make steps of noise
    # inputs of 37 tokens would leave columns of a P that starts as orth(A) to rounding
    reference, optimizer = (make(model, "osd_adamw8bit", rank=64, init="orthonormal") for model in (single, sharded))
    train(single, reference, range(STEPS))
    train(sharded, optimizer, range(STEPS), rank, world)
    assert local(optimizer.state[sharded.blocks[0].tall.weight]["exp_avg"]).dtype == torch.uint8
    assert_same_weights(sharded, single, LR / 5)  # sums in another order change codes, see test_fsdp2_checkpoints.py
