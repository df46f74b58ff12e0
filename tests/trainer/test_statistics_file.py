"""`_osd_statistics.jsonl`: the values of every layer at logged steps, one line each, and the same after a resume."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from observed_runs import lines, make_trainer
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_osd import OSD
from hf_osd.optim import adamw_state_bytes, state_bytes
from hf_osd.optim.statistics import OBSERVED, summarize_each
from hf_osd.trainer.statistics_file import STATISTICS_NAME, StatisticsFile


VALUES = {"a": {"pca_loss": 0.25, "orthogonality": 0.125}, "b": {"pca_loss": 0.5, "orthogonality": math.nan}}


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in lines(folder)]


def test_a_line_for_each_logged_step_whose_means_are_the_logged_ones(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    header, *rows = lines(tmp_path)
    model = [name for name, p in trainer.model.named_parameters() if "layers" in name and p.ndim == 2]
    memory = [header.pop(f"{name}_state_bytes") for name in ("optimizer", "adamw")]
    assert memory == [state_bytes(trainer.optimizer.optimizer), adamw_state_bytes(trainer.optimizer)]
    assert header == {"format_version": 1, "names": model} and len(model) == 14
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row, logged in zip(rows, [row for row in trainer.state.log_history if "loss" in row], strict=True):
        for key in OBSERVED:
            # four digits are kept
            assert sum(row[key]) / 14 == pytest.approx(logged[f"osd/{key}"], rel=1e-3)
    assert rows[0]["time"] <= rows[-1]["time"]


def test_each_value_is_that_of_its_own_matrix():
    torch.manual_seed(1)
    weights = {name: nn.Parameter(torch.randn(*shape)) for name, shape in (("a", (12, 20)), ("b", (24, 10)))}
    stack = nn.Parameter(torch.randn(3, 16, 12))
    optimizer = OSD([{"params": [*weights.items(), ("stack", stack)], "rank": 4}], lr=1e-2, init="orthonormal")
    for observed in (False, True):
        for p in (*weights.values(), stack):
            p.grad = torch.randn_like(p)
        before = {p: state["projection"].double().clone() for p, state in optimizer.state.items()}
        optimizer.collect_statistics = observed
        optimizer.step()
    means, each = summarize_each(optimizer.weights)
    assert list(each) == ["a", "b", "stack"] and means == optimizer.statistics()

    def outside(G: Tensor, P: Tensor) -> float:
        G = G.double() if G.shape[0] == P.shape[0] else G.double().mT
        return ((G - P @ P.mT @ G).square().sum() / G.square().sum()).item()

    for name, p in weights.items():
        # float32 against float64
        assert each[name]["pca_loss"] == pytest.approx(outside(p.grad, before[p]), abs=1e-5)
    of_experts = [outside(G, P) for G, P in zip(stack.grad, before[stack], strict=True)]
    assert each["stack"]["pca_loss"] == pytest.approx(sum(of_experts) / 3, abs=1e-5)
    weights["a"].grad[0, 0] = math.nan
    optimizer.step()
    _, each = summarize_each(optimizer.weights)
    assert math.isnan(each["a"]["pca_loss"]) and each["b"]["pca_loss"] > 0


def test_the_values_are_read_in_one_transfer_at_logged_steps_only(tmp_path, monkeypatch):
    reads: list[int] = []
    original = Tensor.tolist

    def count(self):
        if self.ndim == 1 and self.numel() == 3 + 2 * 14:
            reads.append(trainer.state.global_step)
        return original(self)

    trainer = make_trainer(tmp_path, save_strategy="no")
    monkeypatch.setattr(Tensor, "tolist", count)
    monkeypatch.setattr(OSD, "statistics", lambda self: pytest.fail("a second transfer"))
    trainer.train()
    assert reads == [2, 4, 6, 8]


def test_a_resumed_run_leaves_what_the_uninterrupted_one_did(tmp_path):
    make_trainer(tmp_path).train()
    whole = without_times(tmp_path)
    with open(tmp_path / STATISTICS_NAME, "a") as file:
        file.write('{"step":9,"pca_lo')  # killed while writing
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert without_times(tmp_path) == whole
    other = make_trainer(tmp_path, max_steps=6)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [line.get("step") for line in lines(tmp_path)] == [None, 2, 4, 6]  # 8 was of the abandoned steps


def test_a_training_from_the_start_begins_a_new_file(tmp_path):
    make_trainer(tmp_path).train()
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train()
    assert [line.get("step") for line in lines(tmp_path)] == [None, 2, 4]
    trainer.train()
    assert [line.get("step") for line in lines(tmp_path)] == [None, 2, 4]


def test_each_trial_of_a_search_has_a_file_of_its_own(tmp_path):
    make_trainer(tmp_path).train()
    whole = lines(tmp_path)
    trial = make_trainer(tmp_path, max_steps=4)
    trial._get_output_dir = lambda trial=None: str(tmp_path / "run-0")  # as in `hyperparameter_search`
    trial.train()
    assert lines(tmp_path) == whole and [line.get("step") for line in lines(tmp_path / "run-0")] == [None, 2, 4]


@pytest.mark.parametrize("given", [{"logging_strategy": "no"}, {"optim": "adamw_torch", "optim_args": None}])
def test_no_file_without_logs_or_without_our_optimizer(given, tmp_path):
    make_trainer(tmp_path, **given).train()
    assert not (tmp_path / STATISTICS_NAME).exists()


def test_only_the_process_that_saves_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "should_save", property(lambda self: False))
    make_trainer(tmp_path, save_strategy="no").train()
    assert not list(tmp_path.rglob(STATISTICS_NAME))


def test_numbers_that_are_none_are_null_and_other_names_get_a_header(tmp_path):
    file = StatisticsFile(tmp_path, 0, {})
    file.append(1, VALUES)
    file.append(2, {})
    StatisticsFile(tmp_path, 1, {}).append(3, VALUES)
    StatisticsFile(tmp_path, 3, {}).append(4, {"c": VALUES["a"]})
    rows = lines(tmp_path)
    assert [row.get("step", row.get("names")) for row in rows] == [["a", "b"], 1, 3, ["c"], 4]
    assert rows[1]["orthogonality"] == [0.125, None]
    assert "NaN" not in (tmp_path / STATISTICS_NAME).read_text()


def test_lines_that_are_no_statistics_are_passed_over(tmp_path):
    StatisticsFile(tmp_path, 0, {}).append(1, VALUES)
    good = lines(tmp_path)
    with open(tmp_path / STATISTICS_NAME, "a") as file:
        for line in ("[]", "null", "{}", '{"step":2,"pca_loss":[1],"orthogonality":[1]}', '{"step":NaN}', "\x00\xff"):
            file.write(line + "\n")
        file.write(json.dumps({"step": 3, "pca_loss": ["1", 2], "orthogonality": [1, 2]}) + "\n")
    assert lines(tmp_path) == good


def test_a_broken_disk_costs_a_warning_and_not_the_training(tmp_path, caplog):
    (tmp_path / STATISTICS_NAME).mkdir()
    caplog.set_level(logging.WARNING, logger="hf_osd")
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 8
    (record,) = [record for record in caplog.records if record.name == "hf_osd"]
    assert "not saved any more" in record.getMessage()


def test_a_newer_format_is_left_alone(tmp_path, caplog):
    path = tmp_path / STATISTICS_NAME
    path.write_text('{"format_version":2}\n')
    caplog.set_level(logging.WARNING, logger="hf_osd")
    StatisticsFile(tmp_path, 5, {}).append(6, VALUES)
    assert path.read_text() == '{"format_version":2}\n' and "update hf_osd" in caplog.text
