"""The committed figures of memory: what the estimate promises holds in them, and the table is theirs."""

import json
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import memory  # noqa: E402


RESULT = BENCHMARKS / "results" / "cpu_2_cores" / "memory.json"


def test_the_committed_result():
    result = json.loads(RESULT.read_text())
    assert {row["optim"] for row in result["rows"]} == set(memory.RUNS)
    assert memory.summary(result["rows"]) == RESULT.with_suffix(".md").read_text()
    assert memory.table(result["rows"]) == RESULT.with_name("memory_all.md").read_text()
    for row in result["rows"]:
        told, seen = row["predicted"], row["measured"]
        for part in ("state", "projection"):
            assert told[part] == pytest.approx(seen[part], rel=0.05)
        assert told["peak"] == pytest.approx(seen["peak"], rel=0.15)


def test_it_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config | {"num_attention_heads": 4, "vocab_size": 100}))
    command = ["--model", str(path), "--layers", "1", "--rank", "4", "--seq", "8", "--runs", "osd_lion_layerwise"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *command, "--output_dir", str(tmp_path)])
    memory.main()
    assert "| osd_lion_layerwise |" in capsys.readouterr().out
    assert "| osd_lion_layerwise |" in (tmp_path / "memory.md").read_text()
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
