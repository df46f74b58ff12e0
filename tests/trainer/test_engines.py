"""Engines that flatten parameters are refused before anything is loaded, naming FSDP2 and how to have it."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_osd import OSD, OSDTrainingArguments
from hf_osd.trainer.settings import check_arguments


def arguments(folder, kind=OSDTrainingArguments, **options):
    return kind(output_dir=str(folder), optim="osd_adamw", use_cpu=True, report_to=[], **options)


@pytest.mark.parametrize(
    ("environment", "engine"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),  # accelerate's default
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ],
)
def test_accelerate_launch(tmp_path, monkeypatch, environment, engine):
    args = arguments(tmp_path, TrainingArguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"{engine}.*FSDP2.*fsdp_version: 2.*DistributedConfig\(fsdp_size=N\)"):
        check_arguments(args)
    if engine == "FSDP1":  # before the model is touched; DeepSpeed itself would have to be installed to come so far
        with pytest.raises(ValueError, match=f"{engine}.*FSDP2"):
            Trainer(nn.Linear(4, 4), args)
    args.optim = "adamw_torch"  # other optimizers are none of our business
    check_arguments(args)


def test_fsdp2_is_accepted(tmp_path, monkeypatch):
    args = arguments(tmp_path, fsdp=True, fsdp_config={"version": 2, "reshard_after_forward": True})
    assert args.fsdp_plugin_args["fsdp_version"] == 2
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    arguments(tmp_path)


@pytest.mark.parametrize("config", [{"version": 1}, {"xla": True}])
def test_trainer_arguments(tmp_path, config):
    with pytest.raises(ValueError, match="FSDP.*fsdp_version: 2"):
        arguments(tmp_path, fsdp=True, fsdp_config=config)


@pytest.mark.parametrize("optim", ["osd_adamw", "rso_adamw"])
def test_a_refused_run_leaves_nothing_in_the_environment(tmp_path, monkeypatch, optim):
    args = arguments(tmp_path, TrainingArguments, fsdp=True, fsdp_config={"version": 1})
    args.optim = optim
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate does where there are GPUs, before we are asked
    with pytest.raises(ValueError, match=f"^{optim} cannot be used with FSDP1"):
        check_arguments(args)
    args.fsdp = False
    check_arguments(args)


def test_flat_parameters_of_a_loop_of_ones_own():
    from torch.distributed.fsdp._flat_param import FlatParameter

    flat = FlatParameter.__new__(FlatParameter, torch.zeros(48))
    view, zero3, matrix = (nn.Parameter(torch.zeros(shape)) for shape in ((12,), (0,), (6, 8)))
    view._fsdp_flattened = True  # what FSDP1 leaves on a parameter with `use_orig_params`
    zero3.ds_id = 0
    for p, engine in ((flat, "FSDP1"), (view, "FSDP1"), (zero3, "DeepSpeed ZeRO")):
        with pytest.raises(ValueError, match=f"{engine}.*fully_shard"):
            OSD([{"params": [matrix], "rank": 2}, {"params": [p]}])


def test_a_matrix_that_was_flattened_after_construction():
    """ZeRO 1 and 2 exchange the optimizer's parameters for one vector."""
    matrix = nn.Parameter(torch.randn(6, 8))
    optimizer = OSD([{"params": [matrix], "rank": 2}])
    optimizer.param_groups[0]["params"] = [nn.Parameter(matrix.detach().flatten())]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(48)
    with pytest.raises(ValueError, match="was a matrix and has the shape .*FSDP2"):
        optimizer.step()
