"""What a run with `source=activations` tells of itself: summary line, log, statistics of layers, and a report."""

import json
import logging

import pytest
import torch
from observed_runs import lines, make_trainer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_osd import create_osd_optimizer
from hf_osd.cli.main import main
from hf_osd.optim import predicted_state_bytes, state_bytes
from hf_osd.optim.statistics import summarize_each
from hf_osd.optim.summary import summary
from hf_osd.report import read_run
from reference.tiny_models import LLAMA, tiny_llama


IDS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))


def step(model, optimizer, count=1):
    for _ in range(count):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("subspace", ["online_pca", "random"])
def test_the_state_is_at_most_that_of_layers_that_share_nothing(subspace):
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, rank=4, source="activations", subspace=subspace)
    before, most = summary(optimizer), predicted_state_bytes(optimizer)
    assert "; 14 learn from activations; optimizer state at most " in before and "from gradients" not in before
    step(model, optimizer, 2)
    after = summary(optimizer)
    assert "at most" not in after and "; 14 learn from activations; optimizer state " in after
    assert predicted_state_bytes(optimizer) == state_bytes(optimizer) < most
    plain = summary(create_osd_optimizer(tiny_llama(), rank=4))
    assert "at most" not in plain and "learn from" not in plain


def test_what_goes_by_gradients_is_counted_and_why():
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**LLAMA | sizes))
    optimizer = create_osd_optimizer(model, rank=4, source="activations")
    # 4 matrices of attention and a gate that is no linear layer in each block; two stacks of 4 experts in each
    told = "; 8 learn from activations, 16 from gradients (no plain linear layer: gate_up_proj, down_proj); optimizer"
    assert told in summary(optimizer)


def test_layers_that_are_not_called_are_told_of_once_it_is_known():
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, rank=4, source="activations")
    layer = model.model.layers[0].self_attn.o_proj
    layer.register_forward_pre_hook(lambda *_: None)
    model.model.layers[0].self_attn.o_proj = torch.nn.Module()
    model.model.layers[0].self_attn.o_proj.forward = lambda x: torch.nn.functional.linear(x, layer.weight)
    step(model, optimizer, 2)
    told = "; 13 learn from activations, 1 from gradients (its layer is not called: o_proj); optimizer state "
    assert told in summary(optimizer) and "at most" not in summary(optimizer)


def test_a_stock_trainer_logs_it_and_a_report_shows_it(tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, logger="hf_osd")
    trainer = make_trainer(tmp_path, optim_args="rank=4,source=activations")
    trainer.train()
    (told,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("OSD: ")]
    assert "; 14 learn from activations; optimizer state at most" in told
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all(0 < row["osd/pca_loss"] < 1 and row["osd/skipped_steps"] == 0 for row in rows)
    header, *values = lines(tmp_path)
    assert len(header["names"]) == 14 and [row["step"] for row in values] == [2, 4, 6, 8]
    for row, logged in zip(values, rows, strict=True):
        assert sum(row["pca_loss"]) / 14 == pytest.approx(logged["osd/pca_loss"], rel=1e-3)
        of_layer = dict(zip(header["names"], row["pca_loss"], strict=True))
        q, k, o = (of_layer[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qko")
        assert q == k != o  # one P, one value
    run = read_run(tmp_path)
    assert run.settings["Optimizer"]["source"] == "activations" and not run.notes
    assert run.memory.state == state_bytes(trainer.optimizer.optimizer)
    main(["report", str(tmp_path), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "or with source=activations of the layers’ inputs’" in page
    config = json.loads((tmp_path / "checkpoint-8" / "osd_config.json").read_text())
    assert config["format_version"] == 2 and config["source"] == "activations"


def test_the_line_of_a_run_that_is_resumed_knows_what_is_shared(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_osd")
    make_trainer(tmp_path, optim_args="rank=4,source=activations", max_steps=4).train()
    caplog.clear()
    trainer = make_trainer(tmp_path, optim_args="rank=4,source=activations")
    trainer.train(resume_from_checkpoint=True)
    (told,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("OSD: ")]
    assert "at most" not in told


def test_the_share_outside_is_that_of_the_inputs():
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, rank=4, source="activations", projection_sample=1)
    step(model, optimizer, 2)
    layer, seen = model.model.layers[1].mlp.down_proj, []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().reshape(-1, 48)))
    P = optimizer.state[layer.weight]["projection"].clone()
    optimizer.collect_statistics = True
    step(model, optimizer)
    (x,) = seen
    told = summarize_each(optimizer.weights)[1]["model.layers.1.mlp.down_proj.weight"]
    outside = (x - x @ P @ P.T).square().sum() / x.square().sum()
    assert told["pca_loss"] == pytest.approx(float(outside), rel=1e-4)
    error = torch.linalg.matrix_norm(P.T @ P - torch.eye(4)) / 2  # sqrt(r)
    assert told["orthogonality"] == pytest.approx(float(error), rel=1e-3)
