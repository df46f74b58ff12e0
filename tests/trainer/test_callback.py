"""What every Trainer logs of our optimizer, with a tiny LLaMA in a stock Trainer."""

import logging
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_osd import OSD, create_osd_optimizer
from hf_osd.optim.step import algorithm
from hf_osd.optim.summary import loses_small_steps, summary
from reference.tiny_models import tiny_llama


KEYS = {"osd/pca_loss", "osd/orthogonality", "osd/skipped_steps"}


def rows(count: int = 32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 4, (12,), generator=generator) for _ in range(count)]  # 4 of 64: easy to learn
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


@pytest.fixture
def trainer(tmp_path):
    """A stock Trainer of 8 steps that logs every second one and accumulates two gradients."""

    def make(callbacks: list[TrainerCallback] | None = None, **given: Any) -> Trainer:
        defaults = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "optim": "osd_adamw",
            "optim_args": "rank=4",
            "max_steps": 8,
            "logging_steps": 2,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
        }
        return Trainer(
            tiny_llama(),
            TrainingArguments(**{**defaults, **given}),
            train_dataset=rows(),
            eval_dataset=rows(4),
            callbacks=callbacks,
        )

    return make


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def test_training_rows_hold_the_statistics_and_others_do_not(trainer):
    run = trainer(eval_strategy="steps", eval_steps=4)
    run.train()
    training = logged(run)
    assert [row["step"] for row in training] == [2, 4, 6, 8]
    for row in training:
        assert row.keys() >= KEYS
        # A share of the energy, within 0 and 1 for orthonormal P; P is close to it.
        assert 0 < row["osd/pca_loss"] < 1.05
        assert 0 <= row["osd/orthogonality"] < 0.5
        assert row["osd/skipped_steps"] == 0
    others = [row for row in run.state.log_history if "loss" not in row]
    assert sum("eval_loss" in row for row in others) == 2 and sum("train_loss" in row for row in others) == 1
    assert not any(KEYS & row.keys() for row in others)
    assert training[-1]["loss"] < training[0]["loss"]


def test_callbacks_that_follow_see_the_statistics(trainer):
    class Reporter(TrainerCallback):
        seen: list[dict] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    run = trainer([Reporter()])
    run.train()
    seen = [row for row in Reporter.seen if "loss" in row]
    assert len(seen) == 4 and all(row.keys() >= KEYS for row in seen)
    assert [row["osd/pca_loss"] for row in seen] == [row["osd/pca_loss"] for row in logged(run)]


class Watch(TrainerCallback):
    """Keeps what the optimizer is about to work with at every step."""

    def __init__(self):
        self.before: list[tuple[Tensor, Tensor]] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        p = optimizer.param_groups[0]["params"][0]
        P = optimizer.state.get(p, {}).get("projection")
        self.before.append((p.grad.clone(), None if P is None else P.clone()))
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_the_values_equal_a_direct_computation_for_one_matrix(trainer):
    watch = Watch()
    run = trainer([watch], optim_target_modules=["layers.0.mlp.up_proj"])
    run.train()
    osd = run.optimizer.optimizer
    assert [osd.param_groups[0]["param_names"]] == [["model.layers.0.mlp.up_proj.weight"]]
    for row in logged(run):
        G, P = (value.double() for value in watch.before[row["step"] - 1])
        assert G.shape == (48, 32) and P.shape == (32, 4)
        residual = (G.mT - P @ P.mT @ G.mT).square().sum() / G.square().sum()
        distance = torch.linalg.matrix_norm(P.mT @ P - torch.eye(4, dtype=P.dtype)) / math.sqrt(4)
        # float32 against float64: sums of 1500 products, and 1 - 2 tr K + tr CK loses one digit.
        assert row["osd/pca_loss"] == pytest.approx(residual.item(), abs=1e-5)
        assert row["osd/orthogonality"] == pytest.approx(distance.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, [2, 4, 6, 8]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6]),
        ({"logging_steps": 0.5}, [4, 8]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_statistics_are_collected_in_logged_steps_only(given, steps, trainer, monkeypatch):
    observed: list[int] = []
    original = algorithm.observation

    def count(*arguments):
        observed.append(run.state.global_step + 1)
        return original(*arguments)

    monkeypatch.setattr(algorithm, "observation", count)
    run = trainer(**given)
    run.train()
    assert observed == [step for step in steps for _ in range(14)]  # 14 matrices
    assert [row["step"] for row in logged(run)] == steps
    assert all(row.keys() >= KEYS for row in logged(run))


# Fails: the row of step 1 has no pca_loss, because "no" hides that Trainer logs the first step all the same.
def test_the_first_step_is_observed_whatever_the_strategy(trainer):
    run = trainer(logging_strategy="no", logging_first_step=True)
    run.train()
    (row,) = logged(run)
    assert row["step"] == 1 and row.keys() >= KEYS


def test_every_row_of_an_epoch_has_the_statistics(trainer):
    run = trainer(logging_strategy="epoch", num_train_epochs=2, max_steps=-1)
    run.train()
    assert [row["step"] for row in logged(run)] == [8, 16]
    assert all(row.keys() >= KEYS for row in logged(run))


def test_other_optimizers_are_left_alone(trainer, caplog):
    caplog.set_level(logging.INFO, logger="hf_osd")
    run = trainer(optim="adamw_torch", optim_args=None)
    run.train()
    assert len(logged(run)) == 4
    assert not any(key.startswith("osd/") for row in run.state.log_history for key in row)
    assert not [record for record in caplog.records if record.name.startswith("hf_osd")]


class Break(TrainerCallback):
    """Puts a NaN into the gradient of one matrix at one step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step + 1 == self.step:
            optimizer.param_groups[0]["params"][0].grad[0, 0] = float("nan")


@pytest.mark.parametrize("step", [1, 3])
def test_a_broken_gradient_is_counted_and_does_no_harm(step, trainer):
    run = trainer([Break(step)], max_steps=4)
    run.train()
    assert [row["osd/skipped_steps"] for row in logged(run)] == ([1, 1] if step == 1 else [0, 1])
    assert all(math.isfinite(row[key]) for row in logged(run) for key in KEYS)
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_a_broken_gradient_in_a_logged_step_does_not_hide_the_other_matrices(trainer):
    run = trainer([Break(4)], max_steps=4)
    run.train()
    row = logged(run)[-1]
    assert row["osd/skipped_steps"] == 1
    assert math.isfinite(row["osd/pca_loss"]) and math.isfinite(row["osd/orthogonality"])


def test_the_summary_of_a_known_model():
    matrices = [nn.Parameter(torch.randn(1000, 500)) for _ in range(2)]
    plain = nn.Parameter(torch.randn(300, 1000))
    optimizer = OSD([{"params": matrices, "rank": 10}, {"params": [plain]}])
    # Each matrix: P 500 x 10 with two moments, two moments of 1000 x 10: 35 000 numbers; the other one 2 * 300 000.
    # 4 bytes each: 0.28 MB + 2.4 MB. AdamW: 2 * 4 * (2 * 500 000 + 300 000) bytes.
    assert summary(optimizer) == (
        "OSD: 2 matrices projected to rank 10 (1.0M parameters), 0.3M parameters at full size; optimizer state "
        "2.7 MB, AdamW's 10.4 MB; first updates 0.14 of AdamW's (root mean square) at learning rate 0.001"
    )
    same = OSD([{"params": matrices, "rank": 10}, {"params": [plain]}], scale="auto", residual="scaled")
    assert summary(same).endswith(
        "; first updates before the residual 1 of AdamW's (root mean square) at learning rate 0.001"
    )
    signs = OSD([{"params": matrices, "rank": 10}], scale="auto", residual="sign", residual_scale=0.5)
    assert summary(signs).endswith("; first updates 1.1 of AdamW's (root mean square) at learning rate 0.001")
    assert summary(OSD([{"params": matrices, "rank": 10}], weight_rule="sgd")).endswith("MB")
    half = nn.Parameter(torch.randn(64, 32, dtype=torch.bfloat16))
    for rounds in (False, True):
        assert loses_small_steps(OSD([{"params": [half], "rank": 4}], stochastic_rounding=rounds)) != rounds
    ranks = OSD([{"params": [matrices[0]], "rank": 10}, {"params": [matrices[1]], "rank": 20}])
    assert "2 matrices projected to ranks 10 to 20 (1.0M" in summary(ranks)
    assert "0 matrices projected to no rank" in summary(OSD([plain]))
    sides = OSD([{"params": matrices, "rank": 10, "side": "two_sided"}], scale="auto")
    assert "; first updates at most 1 of AdamW's" in summary(sides)


def test_the_first_updates_have_the_size_that_is_told():
    """Projected weights alone, with multiples of the learning rate and without."""
    for options in ({}, {"lr_pattern": "mlp.*:0.1"}, {"lr_pattern": "self_attn.*|mlp.*:10", "scale": 0.25}):
        model = tiny_llama().double()
        optimizer = create_osd_optimizer(model, rank=4, lr=1e-6, preset="pretrain", **options)
        assert summary(optimizer, model).startswith("OSD (preset pretrain): ")
        told = float(re.search(r"first updates (\S+) of AdamW's", summary(optimizer, model)).group(1))
        projected = [p for group in optimizer.param_groups if group["rank"] for p in group["params"]]
        before = [p.detach().double().clone() for p in projected]
        ids = torch.randint(0, 32, (4, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        squares = [(p - old).square().sum() for p, old in zip(projected, before, strict=True)]
        seen = (sum(squares) / sum(p.numel() for p in projected)).sqrt().item() / 1e-6
        assert seen == pytest.approx(told, rel=0.1), options


def test_the_summary_is_said_once_when_training_begins(trainer, caplog):
    caplog.set_level(logging.INFO, logger="hf_osd")
    run = trainer()
    assert not caplog.records
    run.train()
    (record,) = [record for record in caplog.records if record.name == "hf_osd"]
    assert record.getMessage() == summary(run.optimizer.optimizer)
    assert record.getMessage().startswith(
        "OSD: 14 matrices projected to rank 4 (0.0M parameters: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj), 0.0M parameters at full size (embed_tokens, lm_head, 5 vectors); optimizer state"
    )


def test_an_optimizer_made_for_a_loop_of_ones_own_says_its_summary_once(trainer, caplog):
    caplog.set_level(logging.INFO, logger="hf_osd")
    run = trainer(optim="adamw_torch", optim_args=None)
    run.optimizer = create_osd_optimizer(run.model, rank=4)
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_osd"]
    assert lines == [summary(run.optimizer, run.model)] and "14 matrices projected to rank 4" in lines[0]
    half = create_osd_optimizer(tiny_llama().to(torch.bfloat16), rank=4)
    told = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "hf_osd"][1:]
    assert told[0] == ("INFO", summary(half)) and told[1][0] == "WARNING" and len(told) == 2
    assert "set stochastic_rounding=true, or load the model in float32" in told[1][1]
    caplog.clear()
    run.train()  # which does not say it again
    assert not [record for record in caplog.records if record.name == "hf_osd"]


def test_no_summary_of_other_processes_and_of_models_that_are_only_measured(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="hf_osd")
    with torch.device("meta"):
        create_osd_optimizer(tiny_llama(), rank=4)
    monkeypatch.setenv("RANK", "1")
    create_osd_optimizer(tiny_llama(), rank=4)
    assert not caplog.records


def test_the_schedule_reaches_the_optimizer(trainer):
    watch = Watch()
    run = trainer([watch], lr_scheduler_type="cosine", warmup_steps=2, logging_steps=1)
    run.train()
    # Trainer logs the rate that the step has used.
    assert [row["learning_rate"] for row in logged(run)] == watch.rates
    expected = [0.0, 5e-3] + [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    # The same formula in another order of operations.
    assert watch.rates == pytest.approx(expected, rel=1e-12)
    assert all(group["lr"] == pytest.approx(0.0, abs=1e-12) for group in run.optimizer.param_groups)
    assert logged(run)[-1]["loss"] < logged(run)[0]["loss"]
