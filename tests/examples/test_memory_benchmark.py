"""The committed figures of memory: what the estimate promises holds in them, and the table is theirs."""

import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import memory  # noqa: E402


RESULT = BENCHMARKS / "results" / "cpu_2_cores" / "memory.json"


def test_the_committed_result():
    result = json.loads(RESULT.read_text())
    assert {row["optim"] for row in result["rows"]} == set(memory.RUNS)
    assert memory.summary(result["rows"]) == RESULT.with_suffix(".md").read_text()
    assert memory.table(result["rows"]) == RESULT.with_name("memory_all.md").read_text()
    for row in filter(lambda row: row["predicted"], result["rows"]):
        told, seen = row["predicted"], row["measured"]
        for part in ("state", "projection"):
            assert told[part] == pytest.approx(seen[part], rel=0.05)
        assert told["peak"] == pytest.approx(seen["peak"], rel=0.15)


@pytest.mark.parametrize("name", ["memory_int8", "memory_int8_1b"])
def test_the_committed_result_of_int8_weights(name):
    """One byte a weight and a scale for each row; the estimate is within 3% of what was counted."""
    result = json.loads(RESULT.with_name(f"{name}.json").read_text())
    assert [row["optim"] for row in result["rows"]] == memory.load_experiment(name)["runs"]
    assert memory.summary(result["rows"]) == RESULT.with_name(f"{name}.md").read_text()
    model = memory.random_model(memory.load_config(result["model"], result["layers"]), torch.bfloat16, "meta")
    blocks = sum(p.numel() for key, p in model.named_parameters() if key.endswith("_proj.weight"))
    others = sum(p.nbytes for key, p in model.named_parameters() if not key.endswith("_proj.weight"))
    others += sum(b.nbytes for b in model.buffers())
    for row in result["rows"]:
        assert row["gradient_checkpointing"]
        assert row["predicted"]["peak"] == pytest.approx(row["measured"]["peak"], rel=0.03)
        each = (row["measured"]["weights"] - others) / blocks
        assert each == pytest.approx(2, abs=1e-3) or "int8" in row["optim"] and 1 < each < 1.02
    first, last = (result["rows"][i]["measured"]["peak"] for i in (0, -1))
    assert last < (0.55 if result["model"] == "llama_350m" else 0.57) * first


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that measures a tiny model and returns the rows of the result."""
    pytest.importorskip("matplotlib")
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config | {"num_attention_heads": 4, "vocab_size": 100}))

    def run(*arguments: str) -> list[dict]:
        command = ["--model", str(path), "--layers", "1", "--rank", "4", "--seq", "8", "--output_dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["memory.py", *command, *arguments])
        memory.main()
        return json.loads((tmp_path / "memory.json").read_text())["rows"]

    return run


def test_it_runs(run, tmp_path, capsys):
    run("--runs", "osd_lion_layerwise")
    assert "| osd_lion_layerwise |" in capsys.readouterr().out
    assert "| osd_lion_layerwise |" in (tmp_path / "memory.md").read_text()
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_gradients_that_never_exist_are_not_counted_and_r_is(run, tmp_path):
    name = "osd_adamw:source=activations"
    run("--runs", "osd_adamw", "--seq", "64")
    gradients, activations = (row["measured"] for row in run("--runs", name, "--seq", "64", "--add"))
    # embeddings and head, three norms, and of 4 columns R of the seven matrices
    assert activations["gradients"] == 4 * (2 * 100 * 32 + 3 * 32 + 4 * (4 * 32 + 2 * 48 + 32))
    assert gradients["gradients"] == 4 * (2 * 100 * 32 + 3 * 32 + 4 * 32 * 32 + 3 * 32 * 48)
    assert (
        activations["projection"] < gradients["projection"] and activations["activations"] < gradients["activations"]
    )
    assert f"| {name} | " in (tmp_path / "memory_all.md").read_text()
