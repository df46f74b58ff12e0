"""`hf-osd report`: what it reads of a run, what it says where something is missing, and nothing that could be run."""

import json
import os
import pickle
import re
import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from report_runs import SECRET

from hf_osd.cli.main import main
from hf_osd.report import read_run, read_runs, runs
from hf_osd.report.charts import line_chart
from hf_osd.report.memory import Memory, read_memory
from hf_osd.report.settings import read_arguments
from hf_osd.trainer.statistics_file import STATISTICS_NAME


EVIL = '<script>alert("1")</script>&amp;<img src=x onerror=alert(1)>\'"$x_$'


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def report(tmp_path: Path, *folders: Path) -> Page:
    page = tmp_path / "page.html"
    main(["report", *map(str, folders), "--output", str(page)])
    return Page(page.read_text(encoding="utf-8"))


def refused(*words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["report", *map(str, words)])
    assert str(caught.value).startswith("hf-osd report: ")
    return str(caught.value)


def copy(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target))


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


def test_the_page_of_two_runs(finished_runs, tmp_path):
    page = report(tmp_path, *finished_runs.values())
    for word in (
        "Training loss",
        "Evaluation loss",
        "Learning rate",
        "PCA loss",
        "Orthogonality",
        "Memory",
        "Throughput",
    ):
        assert word in page.text
    assert page.tags.count("svg") == 8  # six of both runs, two of the layers of one
    assert "No OSD statistics: the optimizer was adamw_torch." in page.text
    table = page.text.split("what differs")[1].split("All settings")[0]
    assert "learning_rate 0.01 0.001" in table and "optim osd_adamw adamw_torch" in table
    assert "max_steps" not in table and "hidden_size" not in table and "weight_rule" not in table


def test_the_page_needs_nothing_else_and_tells_no_secret(finished_runs, tmp_path):
    page = report(tmp_path, *finished_runs.values())
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert SECRET not in html
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), value[:80]
        assert not name.startswith("on")
    assert not re.search(r"url\((?!#)|@import", html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in page.attributes if name.endswith("href") and value.startswith("#")}
    assert used | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    assert "#fe00" not in html and "#fd00" not in html  # every stand-in was replaced by a colour of the page


def test_names_and_values_from_files_are_text(finished_runs, tmp_path):
    run = copy(finished_runs["osd"], tmp_path / EVIL.replace("/", "_"))
    statistics = (run / STATISTICS_NAME).read_text()
    evil = json.dumps(EVIL)[1:-1]
    (run / STATISTICS_NAME).write_text(statistics.replace("model.layers.0.self_attn.q_proj.weight", evil))
    for folder in (run, run / "checkpoint-12"):
        (folder / "config.json").write_text(json.dumps({EVIL: EVIL, "hidden_size": 32}))
    page = report(tmp_path, run, finished_runs["adamw"])
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(re.sub(r"\s+", " ", EVIL)) >= 3  # as a weight, a setting and its value
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_a_damaged_run_is_named_and_the_others_are_shown(finished_runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    page = report(tmp_path, finished_runs["osd"], tmp_path / "empty", tmp_path / "missing")
    assert "Not read" in page.text and "there is no such folder" in page.text
    said = capsys.readouterr()
    assert "1 run\n" in said.out and said.err.count("\n") == 2
    message = refused(tmp_path / "empty", tmp_path / "missing")
    assert "neither trainer_state.json nor a complete checkpoint" in message and "there is no such folder" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"log_history": 3}'])
def test_broken_files_become_notes(content, finished_runs, tmp_path):
    run = copy(finished_runs["osd"], tmp_path / "run")
    broken = ("config.json", "osd_config.json", "training_args.bin", "optimizer.pt", "results.json")
    for folder in (run, run / "checkpoint-6", run / "checkpoint-12"):
        for name in broken:
            (folder / name).write_bytes(content)
    (run / "trainer_state.json").write_bytes(content)
    page = report(tmp_path, run)
    assert "checkpoint-12/training_args.bin cannot be read" in page.text
    for name in ("checkpoint-12", "checkpoint-6"):
        shutil.rmtree(run / name)
    (run / STATISTICS_NAME).write_bytes(content)
    assert "run" in refused(run)


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


def write_results(run: Path, name: str = "results.json", **values: object) -> None:
    (run / name).write_text(json.dumps(values))


def test_one_odd_run_does_not_end_the_page(finished_runs, tmp_path):
    runs = [copy(finished_runs["osd"], tmp_path / f"odd{i}") for i in range(6)]
    for run in runs[:2]:
        shutil.rmtree(run / "checkpoint-6")
    for name in ("model.safetensors", "config.json"):
        (runs[0] / "checkpoint-12" / name).unlink()
        (runs[0] / "checkpoint-12" / name).symlink_to("nowhere")
    shutil.rmtree(runs[1] / "checkpoint-12")
    write_results(runs[1], optimizer_state_bytes=10**400, adamw_state_bytes=10**400, settings={"x": 10**400})
    statistics = [json.loads(line) for line in (runs[2] / STATISTICS_NAME).read_text().splitlines()]
    statistics[-1] |= {"step": 10**400}
    statistics[-2] |= {"time": 10**400}
    (runs[2] / STATISTICS_NAME).write_text("\n".join(map(json.dumps, statistics)))
    write_results(runs[3], **{"\ud800": 1}, settings={"\ud800": "\udfff"}, dataset="\ud800", eval_x=1)
    for folder in (runs[3], runs[3] / "checkpoint-12"):
        (folder / "config.json").write_text(json.dumps({"\ud800": "\udfff\x00"}))
    (runs[4] / STATISTICS_NAME).write_text((runs[4] / STATISTICS_NAME).read_text().replace("q_proj", "q\\ud800"))
    os.mkfifo(runs[5] / "results.json")
    page = report(tmp_path, *runs, finished_runs["adamw"])
    assert "Not read" not in page.text and page.text.count("All settings of") == 7
    assert "checkpoint-12/config.json cannot be read: No such file or directory" in page.text
    assert "odd5/results.json cannot be read" in page.text
    assert "\\ud800 \\udfff\\x00" in page.text and "q\\ud800.weight" in page.text


def test_what_reading_a_run_raises_is_said_and_the_others_are_shown(finished_runs, tmp_path, monkeypatch, capsys):
    def read_memory(folders, recorded, notes):
        if tmp_path in folders[0].parents:
            raise PermissionError(13, "Permission denied", str(tmp_path))
        return Memory()

    run = copy(finished_runs["osd"], tmp_path / "osd")
    monkeypatch.setattr(runs, "read_memory", read_memory)
    page = report(tmp_path, run, finished_runs["adamw"])
    assert str(tmp_path) not in page.text and "osd : Permission denied." in page.text


def test_more_runs_than_colours(finished_runs):
    one = read_run(finished_runs["adamw"])
    svg = line_chart([one] * 300, "loss", "Loss", name="loss")
    assert set(re.findall(r"var\(--run-(\d+)\)", svg)) == set("01234567") and "#fe00" not in svg
    assert 'class="run-299"' in svg


def test_an_earlier_page_is_replaced_whole_or_not_at_all(finished_runs, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("earlier")
    (tmp_path / "link.html").symlink_to(page)
    monkeypatch.setattr("hf_osd.report.render", lambda runs, errors: "half \ud800")
    refused(finished_runs["adamw"], "--output", page)
    assert page.read_text() == "earlier" and not list(tmp_path.glob("_*"))
    monkeypatch.undo()
    main(["report", str(finished_runs["adamw"]), "--output", str(tmp_path / "link.html")])
    assert (tmp_path / "link.html").is_symlink() and page.read_text().startswith("<!doctype html>")
    for other in (tmp_path, "/dev/null"):
        assert "is not a file" in refused(finished_runs["adamw"], "--output", other)


def test_secrets_and_folders_are_in_no_page(finished_runs, tmp_path):
    run, other = (copy(finished_runs["osd"], tmp_path / name) for name in ("run", "other"))
    secrets = {
        "hub_token": "told1",
        "WANDB_API_KEY": "told2",
        "use_auth": {"aws_secret_access_key": "told3", "nested": [{"password": "told4"}]},
        "data_files": f"https://me:told5@example.org/a.json?x={SECRET}",
    }
    folders = {
        "model_name_or_path": "/home/told6/models/llama",
        "optim_args": "rank=4,init=/home/told6/earlier",
        "train_files": ["~/told7/a.txt", r"C:\Users\told8\b.txt", "file:///home/told9/c.txt"],
        "resume_from_checkpoint": "/told6",
    }
    kept = {
        "url": "https://example.org/a/b",
        "pattern": r"(\d+)/.*\.(q|v)_proj",
        "max_tokens": 3,
        "num_key_value_heads": 4,
    }
    write_results(run, settings=secrets | folders | kept, model="/home/told6/llama", dataset="user/data")
    for place in (run / "checkpoint-6", run / "checkpoint-12"):
        (place / "training_args.bin").unlink()
        (place / "config.json").write_text(json.dumps({"inner": secrets | folders, "quantization": {"key": "told5"}}))
    (other / "results.json").mkdir()
    (other / "checkpoint-12" / "training_args.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    page = report(tmp_path, run, other, tmp_path / "empty", tmp_path / "missing")
    html = (tmp_path / "page.html").read_text()
    assert not re.search(r"told[1-57-9]", html) and SECRET not in html and str(tmp_path) not in html
    settings = read_run(run).settings["Training"]
    assert {name: settings[name] for name in kept} == kept
    assert settings["model_name_or_path"] == "…/llama" and settings["optim_args"] == "rank=4,init=…/earlier"
    assert settings["train_files"] == ["…/a.txt", "…/b.txt", "file://…/c.txt"]
    assert "home" not in page.text


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


def test_a_folder_of_runs_is_told_what_to_give(finished_runs):
    assert "give the runs in it, adamw, osd" in refused(finished_runs["osd"].parent)


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
