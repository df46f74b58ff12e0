"""P and its moments divided among processes: what each holds and sends, and that it trains what one process trains."""

import copy
import sys
from dataclasses import asdict
from pathlib import Path

import activations_training
import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded_models import (
    assert_same_state,
    assert_same_weights,
    loss_of,
    make_model,
    make_optimizer,
    shard,
    single_process_mesh,
    train,
)
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from hf_osd import OSD, ProjectionState
from hf_osd.estimate import share
from hf_osd.optim import predicted_state_bytes, state_bytes
from hf_osd.optim.step import algorithm, divided, moments
from hf_osd.subspace import precision


sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))  # for `divided_projection`

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-9  # float64, see test_fsdp2.py


def trains_what_one_trains(rank: int, world: int, folder: Path):
    """Dense, tied, frozen; three micro-batches a step, clipped; one bucket of all, and buckets and stacks of one."""
    limits = divided.BUCKET_LIMIT, divided.STACK_LIMIT
    for few in (False, True):
        if few:
            divided.BUCKET_LIMIT = divided.STACK_LIMIT = 150
        single, sharded = make_model(), shard(make_model())
        reference, optimizer = make_optimizer(single, side="right"), make_optimizer(sharded)
        for step in range(4):
            for i in range(3):
                sharded.set_requires_gradient_sync(i == 2)
                (loss_of(sharded, 3 * step + i, rank, world) / 3).backward()
                (loss_of(single, 3 * step + i) / 3).backward()
            for model, own in ((single, reference), (sharded, optimizer)):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                own.step()
                own.zero_grad()
        assert_same_weights(sharded, single, TOLERANCE)
        assert_same_state(optimizer, reference, 1e-7)
    divided.BUCKET_LIMIT, divided.STACK_LIMIT = limits


def bfloat16_and_8_bits(rank: int, world: int, folder: Path):
    """Against a P that is whole on every process: the same products; P's gradient is made of a rounded P."""
    precision._has_bfloat16_units = lambda: False
    launches = moments.launches
    eight_bit = {"weight_rule": "adamw8bit", "rank": 64}
    for dtype, options in ((torch.bfloat16, {}), (torch.float32, eight_bit), (torch.float32, dict(eight_bit))):
        # as on GPUs, where weights of one shape are stepped together, later than they are met
        algorithm.launches = moments.launches = lambda X, options=options: options is not eight_bit
        sizes = {"width": 128, "inner": 130} if options else {}
        models = [shard(make_model(dtype, **sizes)) for _ in range(2)]
        optimizers = [
            make_optimizer(model, **options, divide_projection=divide)
            for model, divide in zip(models, (True, False), strict=True)
        ]
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, range(4), rank, world)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            # a bfloat16 step of an entry of 1 is 0.008, a changed code of 8 bits a part of a step
            torch.testing.assert_close(p.full_tensor(), q.full_tensor(), rtol=0, atol=0.016 if not options else 3e-3)
        state = optimizers[0].state[models[0].blocks[0].wide.weight]
        assert isinstance(state["projection"], DTensor) and state["projection"].dtype == torch.float32
        if options:
            assert state["projection_exp_avg"].dtype == torch.uint8
    algorithm.launches = moments.launches = launches


def bytes_of_state(rank: int, world: int, folder: Path):
    """1 / processes of P, of P's moments and of R's, where these are even; and as much as was predicted."""
    from divided_projection import state_bytes_of

    mesh_of_one = single_process_mesh(world)
    found = []
    for mesh in (mesh_of_one, None):
        model = shard(make_model(torch.float32, width=64, inner=96), mesh)
        params = [block.get_parameter(f"{name}.weight") for block in model.blocks for name in ("tall", "wide")]
        optimizer = OSD([{"params": params, "rank": 8}], lr=1e-3)
        train(model, optimizer, range(2), rank, world)
        assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
        found.append(state_bytes_of(optimizer))
    whole, own = found
    assert whole == {"projection": 2 * 160 * 8 * 4, "projection_moments": 4 * 160 * 8 * 4, "moments": 4 * 160 * 8 * 4}
    assert own == {name: size // world for name, size in whole.items()}
    plain = make_model(torch.float32, width=64, inner=96)
    matrices = [block.get_parameter(f"{name}.weight") for block in plain.blocks for name in ("tall", "wide")]
    each = asdict(share(plain, OSD([{"params": matrices, "rank": 8}], lr=1e-3), world, divide=True))
    counters = {"projection": 0, "projection_moments": 4 * 4, "state": 2 * 4 * 4}  # four weights
    assert [each[name] - number for name, number in counters.items()] == list(own.values())


def what_is_sent(rank: int, world: int, folder: Path):
    """No more bytes than of a P that is whole everywhere, in a few calls instead of one for each weight."""
    from divided_projection import measure

    model = shard(make_model(torch.float32, width=256, inner=320))
    params = [block.get_parameter(f"{name}.weight") for block in model.blocks for name in ("tall", "wide")]
    for p in params:
        p.grad = p.detach().clone()
    for lr, calls in ((1e-4, 3), (1e-1, 5)):  # with steps of P that cannot be too long, and such as can
        rows = {row["way"]: row for row in measure(params, 16, 0, lr)}
        assert [rows[way]["calls"] for way in ("divided", "whole")] == [calls, 1 + len(params)], rows
        assert rows["divided"]["sent_bytes"] <= 1.05 * rows["whole"]["sent_bytes"]
    # R = G P of a bfloat16 weight takes P in bfloat16: three quarters
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    for p in params:
        p.grad = p.detach()
    rows = {row["way"]: row["sent_bytes"] for row in measure(params, 16, 0)}
    assert rows["divided"] <= 0.8 * rows["whole"]


def goes_on_either_way(rank: int, world: int, folder: Path):
    """Divided to whole and back, by `state_dict` and by torch.distributed.checkpoint, 8-bit moments of P included."""
    eight_bit = {"weight_rule": "adamw8bit", "rank": 64}
    for make, options in (
        (make_optimizer, {}),
        (make_optimizer, eight_bit),
        (activations_training.make, {"lr": 1e-3}),
    ):
        sizes = {"width": 128, "inner": 130} if options is eight_bit else {}
        for divide in (True, False):
            model = shard(make_model(torch.float32, **sizes))
            optimizer = make(model, **options, divide_projection=divide)
            train(model, optimizer, range(2), rank, world)
            weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
            checkpoint = folder / f"{len(options)}_{divide}_{world}"
            dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=checkpoint)
            train(model, optimizer, range(2, 4), rank, world)
            for by_dcp in (False, True):
                again = shard(make_model(torch.float32, **sizes))
                other = make(again, **options, divide_projection=not divide)
                again.load_state_dict(weights)
                if by_dcp:
                    read = {"optimizer": get_optimizer_state_dict(again, other)}
                    dcp.load(read, checkpoint_id=checkpoint)
                    set_optimizer_state_dict(again, other, read["optimizer"])
                else:
                    other.load_state_dict(copy.deepcopy(state))
                P = other.state[again.blocks[0].tall.weight]["projection"]
                assert isinstance(P, DTensor) != divide
                train(again, other, range(2, 4), rank, world)
                assert_same_weights(again, model, 2e-3 if options is eight_bit else 1e-5)


def given_and_exported(rank: int, world: int, folder: Path):
    """A P that was given is used, also after a save before the first step; what is exported is whole."""
    model, options = shard(make_model()), {"init": "svd"}
    optimizer = make_optimizer(model, **options)
    train(model, optimizer, range(1), rank, world)
    state = ProjectionState.from_optimizer(optimizer)
    again, single = shard(make_model()), make_model()
    given = state.initial_projections()
    assert given["blocks.0.tall.weight"].shape == (20, 6)
    other = make_optimizer(again, init=given)
    loaded = make_optimizer(again)
    loaded.load_state_dict(copy.deepcopy(other.state_dict()))
    reference = make_optimizer(single, side="right", init=given)
    train(single, reference, range(3))
    train(again, loaded, range(3), rank, world)
    assert_same_weights(again, single, TOLERANCE)
    assert_same_state(loaded, reference, 1e-7)


def refused(rank: int, world: int, folder: Path):
    for options, reason in (
        ({"subspace": "power"}, "'power' makes P of all its rows"),
        ({"subspace": "svd"}, "'svd' makes P of all its rows"),
        ({"carry_moments": True}, "`carry_moments` turns"),
        ({"side": "two_sided"}, "two_sided"),
    ):
        with pytest.raises(ValueError, match=f"`divide_projection` is not for parameter group 0: .*{reason}"):
            make_optimizer(make_model(), divide_projection=True, **options)
    with pytest.raises(ValueError, match="`divide_projection` of OSD has no effect with `layerwise`"):
        make_optimizer(make_model(), divide_projection=True, layerwise=True)
    model = shard(make_model())
    optimizer = make_optimizer(model, subspace="svd")
    train(model, optimizer, range(1), rank, world)
    assert not isinstance(optimizer.state[model.blocks[0].tall.weight]["projection"], DTensor)


TWO = [trains_what_one_trains, bfloat16_and_8_bits, bytes_of_state, what_is_sent, goes_on_either_way]
TWO += [given_and_exported, refused]
FOUR = [trains_what_one_trains, bytes_of_state, what_is_sent]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divided")
    return {2: processes.run(2, TWO, folder), 4: processes.run(4, FOUR, folder)}


@pytest.mark.parametrize(
    ("world", "scenario"), [(2, scenario.__name__) for scenario in TWO] + [(4, scenario.__name__) for scenario in FOUR]
)
def test_scenario(results, world: int, scenario: str):
    assert not results[world][scenario], results[world][scenario]
