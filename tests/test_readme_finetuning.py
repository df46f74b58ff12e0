"""The README's section on fine-tuning tells what the committed results say."""

import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Fine-tune")[1].split("\n## ")[0]
RESULTS = ROOT / "examples" / "benchmarks" / "results" / "cpu_2_cores"
TEXT = " ".join(SECTION.split())


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["glue_minilm", "glue_adapters"])
def test_tables_are_the_committed_results(name):
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8").split("\n\n")[-1] in SECTION
    assert f"compare_finetuning.py {name}" in SECTION


def test_every_method_had_the_same_steps_and_the_stated_grid():
    experiment = json.loads((ROOT / "examples" / "benchmarks" / "experiments" / "glue_minilm.json").read_text())
    rows = result("glue_minilm")["rows"]
    steps = {task: {row["steps"] for row in rows if row["task"] == task} for task in experiment["tasks"]}
    assert steps == {"sst2": {100}, "mrpc": {64}, "rte": {64}} and "100, 64 and 64 steps" in TEXT
    for row in rows:
        rates = experiment["methods"][row["method"]]["learning_rates"]
        assert isinstance(rates, str) or row["grid"].keys() == {f"{rate:g}" for rate in rates}
        assert len(row["scores"]) == 3


def test_the_chat_models_run():
    run = result("sft_smollm2")
    before = next(entry["eval_perplexity"] for entry in run["log_history"] if "eval_perplexity" in entry)
    assert f"perplexity on held-out answers {before:.1f} to {run['perplexity']:.1f}" in TEXT
    share = run["optimizer_state_bytes"] / run["adamw_state_bytes"]
    assert f"with {share:.0%} of AdamW's optimizer memory" in TEXT
    assert f"{run['steps']} steps" in TEXT and run["settings"]["osd_rank"] == 64


def test_rounding():
    loss = result("stochastic_rounding")["loss"]
    start = loss["float32"][0][1]
    end = {name: values[-1][1] for name, values in loss.items()}
    kinds = ("float32", "bfloat16", "bfloat16, stochastic rounding")
    exact, rounded, stochastic = (end[kind] for kind in kinds)
    assert (
        f"from {start:.3f} to {exact:.3f} nats per byte in float32, to {rounded:.3f} in bfloat16, and to "
        f"{stochastic:.3f} in bfloat16 with it" in TEXT
    )
