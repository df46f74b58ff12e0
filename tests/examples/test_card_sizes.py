"""What fits which card: the committed table, its arithmetic, and that it runs."""

import json
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import card_sizes  # noqa: E402


RESULT = BENCHMARKS / "results" / "cpu_2_cores" / "card_sizes.json"


def test_the_committed_result():
    result = json.loads(RESULT.read_text())
    experiment = json.loads((BENCHMARKS / "experiments" / "card_sizes.json").read_text())
    assert {key: result[key] for key in experiment} == experiment
    assert card_sizes.table(result) == RESULT.with_suffix(".md").read_text()
    for row in result["rows"]:
        assert list(row["peak"]) == list(experiment["models"])
        assert sorted(row["peak"].values()) == list(row["peak"].values())  # the largest that fits is the last


def test_the_largest_that_fits():
    peaks = {"1B": 3, "7B": 10, "13B": 20}
    assert [card_sizes.largest(peaks, memory) for memory in (2.9, 3, 19.9, 100)] == ["-", "1B", "7B", "13B"]


def test_it_runs(monkeypatch, tmp_path, capsys):
    """All kinds of methods; what is quantised is smaller, ours with int8 weights than ours without."""
    pytest.importorskip("peft")
    experiment = card_sizes.load_experiment("card_sizes")
    tiny = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    experiment["models"] = {"tiny": ["a LLaMA", tiny | {"num_attention_heads": 4, "vocab_size": 100}]}
    del experiment["methods"][-2:]
    for _, _, options in experiment["methods"]:
        options |= {"rank": 4} if options else {}
    experiment |= {"sequence": 16, "lora_rank": 4}
    monkeypatch.setattr(card_sizes, "load_experiment", lambda name: experiment)
    card_sizes.main(["--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "card_sizes.json").read_text())["rows"]
    peaks = {row["method"].partition(", rank")[0]: row["peak"]["tiny"] for row in rows}
    assert peaks["AdamW"] > peaks["AdamW 8-bit"] and peaks["LoRA"] > peaks["QLoRA"]
    assert peaks["AdamW 8-bit"] > peaks["osd_adamw8bit_layerwise"] > peaks["osd_adamw8bit, int8 weights"]
    assert "| tiny |" in capsys.readouterr().out and (tmp_path / "card_sizes.md").is_file()
