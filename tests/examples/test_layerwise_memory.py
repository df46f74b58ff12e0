import json
import sys
from pathlib import Path

import pytest
import torch


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import ddp_exchange  # noqa: E402
import layerwise_memory  # noqa: E402


RESULT = EXAMPLES / "benchmarks" / "results" / "cpu_2_cores" / "layerwise_memory.json"
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 200,
    "tie_word_embeddings": False,
}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def check(rows: list[dict]) -> None:
    """What the issue of layerwise updates is: no more than one gradient is alive."""
    by_mode = {(row["mode"], row["micro_batches"]): row for row in rows}
    ordinary, layerwise = by_mode["ordinary", 1], by_mode["layerwise", 1]
    assert ordinary["peak_live_gradient_bytes"] == ordinary["all_gradients_bytes"]
    assert layerwise["peak_live_gradient_bytes"] == layerwise["largest_gradient_bytes"]
    assert layerwise["held_bytes"] == 0
    window = by_mode["layerwise", 2]
    full_size, largest = window["full_size_gradients_bytes"], window["largest_gradient_bytes"]
    assert window["held_bytes"] > full_size and by_mode["ordinary", 2]["held_bytes"] == 0
    assert window["peak_live_gradient_bytes"] <= full_size + largest


def test_the_count_on_a_tiny_model(tiny: str):
    check(layerwise_memory.gradient_memory(tiny, rank=4, sequence=8))


def test_the_committed_result_is_what_the_count_must_give():
    result = json.loads(RESULT.read_text())
    assert result["model"] == "llama_60m"
    check(result["rows"])
    assert layerwise_memory.table(result["rows"]) == RESULT.with_suffix(".md").read_text()


def test_a_live_gradient_is_counted_until_its_memory_is_freed():
    p = torch.nn.Parameter(torch.zeros(10))
    model = torch.nn.ParameterList([p])
    live = layerwise_memory.LiveGradients()
    live.watch(model)
    p.square().sum().backward()
    kept = p.grad
    p.grad = None
    assert live.alive() == live.peak == 40
    del kept
    assert live.alive() == 0


def test_the_training_runs_on_the_cpu_too(tiny: str, tmp_path: Path, capsys):
    runs = ["osd_adamw_layerwise:rank=4,projection_dtype=bfloat16", "no_such_optimizer"]
    command = ["--runs", *runs, "--model", tiny, "--steps", "2", "--sequence", "8", "--output_dir", str(tmp_path)]
    assert layerwise_memory.main(command) == 1  # for the one that fails, at the end
    ours, failed = json.loads((tmp_path / "layerwise_memory.json").read_text())["rows"]
    assert ours["fits"] and len(ours["losses"]) == 2 and ours["predicted_state_bytes"] > 0
    assert "no_such_optimizer" in failed["error"]
    told = capsys.readouterr().out
    assert "| `no_such_optimizer` | - | failed |" in told and "no_such_optimizer failed: " in told.splitlines()[-1]


def test_a_gpu_trains_the_cases_of_the_experiment_under_their_caps(tmp_path: Path, monkeypatch):
    """As on a GPU, but for the processes."""
    commands = []

    class Done:
        stdout, stderr = 'RESULT {"run": "x", "fits": false, "peak_allocated_bytes": 5}', ""

    monkeypatch.setattr(layerwise_memory, "pick_device", lambda device: "cuda")
    monkeypatch.setattr(layerwise_memory, "describe", lambda device: {"device": device})
    monkeypatch.setattr(layerwise_memory.subprocess, "run", lambda command, **_: commands.append(command) or Done)
    assert layerwise_memory.main(["layerwise_memory_gpu", "--device", "cuda", "--output_dir", str(tmp_path)]) == 0
    cases = layerwise_memory.load_experiment("layerwise_memory_gpu")["cases"]
    words = [dict(zip(command[2::2], command[3::2], strict=True)) for command in commands]
    assert [(word["--one_run"], float(word["--cap_gb"])) for word in words] == [(run, cap) for run, cap in cases]
    assert {(word["--model"], word["--sequence"], word["--device"]) for word in words} == {
        ("llama_7b", "1024", "cuda")
    }
    assert {cap for _, cap in cases} == {24, 16}
    assert "| 16 GB | does not fit |" in (tmp_path / "layerwise_memory_gpu.md").read_text()


def test_the_committed_exchange_table_is_what_the_shapes_give():
    path = RESULT.with_name("ddp_exchange.json")
    rows = ddp_exchange.rows("llama_1b", [128, 512])
    assert json.loads(path.read_text())["rows"] == rows
    assert ddp_exchange.table(rows) == path.with_suffix(".md").read_text()
    matrices = rows[0]["matrices_ratio"]  # r m for each of the seven matrices of a block, r n for their four inputs
    h, i = 2048, 5461
    numbers = (4 * h + 2 * i + h) + (3 * h + i), 4 * h * h + 3 * h * i
    assert matrices == pytest.approx(128 * numbers[0] / numbers[1], abs=1e-4)
