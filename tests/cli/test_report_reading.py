"""What `hf-osd report` reads of a run: log, memory, metrics and settings; nothing in them is run."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from report_pages import copy, report, write_results

from hf_osd.report import read_run, read_runs
from hf_osd.report.memory import read_memory
from hf_osd.report.settings import read_arguments


def test_the_log_the_layers_and_the_settings_of_a_run(finished_runs):
    run = read_run(finished_runs["osd"])
    state = json.loads((finished_runs["osd"] / "checkpoint-12" / "trainer_state.json").read_text())
    assert run.name == "osd" and run.steps == 12 and run.notes == []
    for key in ("loss", "eval_loss", "learning_rate", "osd/pca_loss"):
        rows = [row for row in state["log_history"] if key in row]
        assert run.series(key) == ([row["step"] for row in rows], [row[key] for row in rows]) and len(rows) >= 3
    assert run.layers.steps == [2, 4, 6, 8, 10, 12] and len(run.layers.names) == 14
    assert run.layers.names[:3] == [
        f"model.layers.{i}.self_attn.{kind}_proj.weight" for i, kind in ((0, "q"), (1, "q"), (0, "k"))
    ]
    for key in ("pca_loss", "orthogonality"):
        for i, mean in enumerate(run.series(f"osd/{key}")[1]):
            assert sum(row[i] for row in run.layers.values[key]) / 14 == pytest.approx(mean, rel=1e-3)  # four digits
    assert run.settings["Training"]["optim_args"] == "rank=4" and run.settings["Training"]["max_steps"] == 12
    assert run.settings["Training"]["lr_scheduler_type"] == "linear"  # an enum member
    assert run.settings["Optimizer"]["rank"] == 4 and run.settings["Model"]["hidden_size"] == 32
    assert run.throughput()["steps_per_second"] == run.last("train_steps_per_second") > 0


def test_memory_is_that_of_the_saved_tensors(finished_runs):
    for name, parts in (
        ("osd", {"weights", "moments", "projections P", "moments of P"}),
        ("adamw", {"weights", "moments"}),
    ):
        memory = read_run(finished_runs[name]).memory
        saved = torch.load(finished_runs[name] / "checkpoint-12" / "optimizer.pt", weights_only=True)
        tensors = [value for state in saved["state"].values() for value in state.values()]
        assert set(memory.parts) == parts
        assert memory.state == sum(value.nbytes for value in tensors)
        assert memory.parts["weights"] == (finished_runs[name] / "checkpoint-12" / "model.safetensors").stat().st_size
    saved = torch.load(finished_runs["osd"] / "checkpoint-12" / "optimizer.pt", weights_only=True)
    projections = sum(state["projection"].nbytes for state in saved["state"].values() if "projection" in state)
    assert read_run(finished_runs["osd"]).memory.parts["projections P"] == projections


def test_what_stands_for_p_counts_as_p_and_unreadable_states_as_files(tmp_path):
    P, moments = torch.zeros(5, dtype=torch.int64), torch.zeros(7)
    states = [{"projection_seed": P, "exp_avg": moments}, {"projection_columns": P, "projection_exp_avg": moments}]
    path = tmp_path / "optimizer.pt"
    torch.save({"state": dict(enumerate(states)), "param_groups": []}, path)
    assert read_memory([tmp_path], {}, []).parts == {"moments": 28, "projections P": 80, "moments of P": 28}
    torch.save({"state": {0: {"projector": Path("as GaLore's, an object")}}}, path)
    assert read_memory([tmp_path], {}, []).parts == {"optimizer state": path.stat().st_size}


def test_a_checkpoint_can_be_given_and_ends_where_it_was_saved(finished_runs, tmp_path):
    runs, errors = read_runs([finished_runs["osd"] / "checkpoint-6", finished_runs["osd"]])
    assert [run.name for run in runs] == ["osd/checkpoint-6", "osd"] and not errors
    assert runs[0].steps == 6 and runs[0].layers.steps == [2, 4, 6]


def test_runs_with_one_name_are_told_apart(finished_runs, tmp_path):
    other = copy(finished_runs["osd"], tmp_path / "second" / "osd")
    runs, _ = read_runs([finished_runs["osd"], other, other])
    assert [run.name for run in runs] == [f"{finished_runs['osd'].parent.name}/osd", "second/osd"]


def test_strange_rows_of_a_log_are_left_out(finished_runs, tmp_path):
    run = copy(finished_runs["adamw"], tmp_path / "run")
    shutil.rmtree(run / "checkpoint-12")
    shutil.rmtree(run / "checkpoint-6")
    rows = [3, {"loss": 1}, {"step": 1, "loss": "1"}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 10**400}]
    state = {"log_history": [*rows, {"step": 4, "loss": 1.5, "eval_loss": float("inf")}]}
    (run / "trainer_state.json").write_text(json.dumps(state))
    assert read_run(run).series("loss") == ([4], [1.5])
    page = report(tmp_path, run)
    assert "No checkpoint" not in page.text and "1.500" in page.text


def test_what_evaluations_found_is_shown(finished_runs, tmp_path):
    run = copy(finished_runs["adamw"], tmp_path / "run")
    timing = {"eval_runtime": 1.5, "eval_samples": 872, "eval_samples_per_second": 3, "eval_model_preparation_time": 1}
    write_results(run, "all_results.json", eval_accuracy=0.8125, eval_loss=3.25, predict_f1=0.5, epoch=3.0, **timing)
    assert read_run(run).metrics() == {"eval_accuracy": 0.8125, "eval_loss": 3.25, "predict_f1": 0.5}
    page = report(tmp_path, run, finished_runs["osd"])
    assert "eval_accuracy 0.8125 – eval_loss 3.250 4" in page.text and "predict_f1 0.5000 –" in page.text


def test_throughput_is_also_that_of_all_results(finished_runs, tmp_path):
    run = copy(finished_runs["adamw"], tmp_path / "run")
    write_results(run, "all_results.json", train_runtime=100.0, train_samples_per_second=7.0)
    assert read_run(run).throughput()["seconds"] == 100 and read_run(run).throughput()["samples_per_second"] == 7


def test_memory_without_a_checkpoint_is_what_the_run_wrote_down(finished_runs, tmp_path):
    run = copy(finished_runs["osd"], tmp_path / "run")
    saved = read_run(run).memory
    for name in ("checkpoint-6", "checkpoint-12"):
        shutil.rmtree(run / name)
    memory = read_run(run).memory
    assert memory.parts == {"optimizer state": saved.state} and memory.adamw_state == saved.adamw_state
    assert "not known" not in report(tmp_path, run).text


def test_nothing_in_training_arguments_is_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    path = tmp_path / "training_args.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"attack": Attack()}))
    with pytest.raises(ValueError, match=r"training_args\.bin"):
        read_arguments(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Attack()))
    assert read_arguments(path) == {}
    assert not (tmp_path / "touched").exists()
