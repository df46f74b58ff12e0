"""Training for equal time, and the text that needs no network."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import equal_time  # noqa: E402
import python_text  # noqa: E402
import whole_models  # noqa: E402


CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    path = tmp_path / "tiny.json"
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    path.write_text(json.dumps(config | {"num_attention_heads": 4, "vocab_size": 400}))
    own = {"model": str(path), "rank": 4, "batch": [4, 16], "seconds": 0.4, "dtype": "float32"}
    text = {"characters": 20_000, "vocabulary": 300, "evaluation_tokens": 128}
    return {**own, **text, "title": "tiny", "rows": [], "left_out": {}}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch) -> list[Path]:
    """Text of 120 files, one of them twice."""
    files = []
    for number in range(120):
        files.append(tmp_path / f"{number}.py")
        files[-1].write_text(f"def plus_{number}(a):\n    return a + {number}\n" * 8)
    files += [tmp_path / "again.py", tmp_path / "bytes.py"]
    files[-2].write_text(files[0].read_text())
    files[-1].write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(python_text, "source_files", lambda: files)
    return files


def test_the_text_is_packed_and_the_same_in_every_run(sources: list[Path]):
    first, second = (python_text.packed_text(16, 300) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    documents = python_text.texts(10**9)
    assert len(documents) == 120  # one is there twice, one is no text
    tokenizer = python_text.train_tokenizer(documents, 300)
    ends = [(part == tokenizer.token_to_id(python_text.END)).sum() for part in first]
    assert ends[1] == pytest.approx(3, abs=1) and sum(ends) == pytest.approx(120, abs=3)  # one in 50 is held out
    assert first.train.shape[1] == first.validation.shape[1] == 16 and first.train.max() < 300
    text = tokenizer.decode(first.validation.flatten().tolist(), skip_special_tokens=False)
    assert text.startswith(documents[0][:40])
    assert len(python_text.texts(1000)) < 10


def test_files_are_those_of_packages_and_of_python():
    names = {file.name for file in python_text.source_files()}
    assert {"argparse.py", "modeling_llama.py", "_tensor.py"} <= names


def test_the_learning_rate_rises_and_falls_with_time():
    assert equal_time.factor(0) == equal_time.factor(1) == equal_time.factor(2) == 0
    assert equal_time.factor(0.025) == pytest.approx(0.5, abs=0.01) and equal_time.factor(0.5) == pytest.approx(0.5)


def test_the_clock_stands_during_evaluations():
    clock = equal_time.Clock(CPU)
    clock.go()
    time.sleep(0.02)
    clock.stop()
    passed = clock.now
    time.sleep(0.02)
    assert clock.now == passed >= 0.02
    clock.go()
    assert clock.now > passed


def test_every_contender_trains_for_the_time_from_the_same_weights(
    settings: dict, sources: list[Path], tmp_path: Path
):
    names = ["adamw_torch_fused", "osd_adamw:scale=0.25,alpha=1,source=activations", "osd_adamw:residual=scaled"]
    settings["contenders"] = dict.fromkeys([*names, "galore_adamw"], 1e-2)
    for _ in equal_time.contend(settings, CPU):
        pass
    rows = settings["rows"]
    assert [row["name"] for row in rows] == [*names, "galore_adamw"] and not settings["left_out"]
    for row in rows:
        assert row["seconds"] >= 0.4 and len(row["curve"]) == equal_time.EVALUATIONS
        assert row["tokens"] == row["steps"] * 64 > 0
        assert row["tokens_per_second"] == row["tokens"] / row["seconds"] and row["epochs"] > 0
        assert min(loss for _, _, loss in row["curve"]) < 5.9  # log 400 is 6.0
    equal_time.render(settings, tmp_path / "equal")
    assert "validation loss after 0.1 s | validation loss after 0.2 s" in (tmp_path / "equal.md").read_text()
    assert (tmp_path / "equal.png").stat().st_size > 10_000


def test_who_cannot_take_part_is_left_out_by_name_and_stops_no_other(settings: dict, sources, monkeypatch):
    monkeypatch.setattr(equal_time, "without_8bit", lambda name: name.replace("8bit", ""))
    make = equal_time.make_optimizer

    def lacking(model, name, rank, lr):
        if name == "galore_adamw":
            raise ModuleNotFoundError("No module named 'galore_torch'", name="galore_torch")
        if name == "osd_lion":
            raise torch.OutOfMemoryError("too large")
        return make(model, name, rank, lr)

    monkeypatch.setattr(equal_time, "make_optimizer", lacking)
    settings |= {"contenders": dict.fromkeys(["galore_adamw", "osd_lion", "osd_adamw8bit"], 1e-2), "seconds": 0.1}
    for _ in equal_time.contend(settings, CPU):
        equal_time.table(settings)
    assert [row["name"] for row in settings["rows"]] == ["osd_adamw"]
    assert settings["left_out"] == {
        "galore_adamw": "galore_torch is not installed",
        "osd_lion": "out of memory",
        "osd_adamw8bit": "bitsandbytes is not installed: osd_adamw in its place",
    }
    assert "| osd_lion | out of memory |" in equal_time.table(settings)


def test_a_loss_that_is_no_number_is_told(settings: dict):
    model = whole_models.random_model(whole_models.load_config(settings["model"]), torch.float32, "cpu")
    ids = torch.randint(400, (4, 16))
    assert equal_time.evaluate(model, ids, 3) == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
    model.lm_head.weight.data.fill_(float("nan"))
    assert equal_time.evaluate(model, ids, 3) is None
    row = {"name": "x", "lr": 1.0, "curve": [[0, 1, None]] * 8, "tokens_per_second": 1, "epochs": 1, "peak_bytes": 2e9}
    assert "| x | 1 | diverged | diverged | diverged | 1 | 1.00 | 2.0 GB |" in equal_time.table(
        settings | {"rows": [row]}
    )


def test_options_have_the_types_of_trainers_optim_args():
    options = whole_models.parse_name("osd_adamw:scale=0.25,source=activations")[1]
    assert options == {"scale": 0.25, "source": "activations"}
    assert whole_models.parse_name("lora:modules_to_save=a+b")[1] == {"modules_to_save": "a+b"}
