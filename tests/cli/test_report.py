"""`hf-osd report`: its page, what it says of runs that are damaged, and no secret in it."""

import json
import os
import re
import shutil

import pytest
from report_pages import copy, refused, report, write_results
from report_runs import SECRET

from hf_osd.cli.main import main
from hf_osd.report import read_run, runs
from hf_osd.report.charts import line_chart
from hf_osd.report.memory import Memory
from hf_osd.trainer.statistics_file import STATISTICS_NAME


EVIL = '<script>alert("1")</script>&amp;<img src=x onerror=alert(1)>\'"$x_$'


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


def test_a_folder_of_runs_is_told_what_to_give(finished_runs):
    assert "give the runs in it, adamw, osd" in refused(finished_runs["osd"].parent)
