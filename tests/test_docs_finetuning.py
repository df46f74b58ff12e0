"""What is said of fine-tuning is what the committed results say."""

import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
RESULTS = ROOT / "examples" / "benchmarks" / "results" / "cpu_2_cores"
TEXT = " ".join(PAGE.split())


def table(name: str) -> str:
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8").split("\n\n")[-1]


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["glue_minilm", "glue_adapters"])
def test_tables_are_the_committed_results(name):
    assert table(name) in PAGE
    assert f"compare_finetuning.py {name}" in PAGE


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


def test_the_preset_beside_adamw_at_its_rates():
    rows = {row["method"]: row for row in result("sft_presets")["rows"]}
    for name, label in (("adamw", "AdamW"), ("finetune_r128", "preset=finetune")):
        seen = [rows[name]["perplexity"][rate] for rate in ("2e-05", "5e-05", "0.0001")]
        assert f"| {label} | {' | '.join(f'{value:.2f}' for value in seen)} |" in PAGE
        assert (rows[name]["steps"], len(rows[name]["seeds"])) == (200, 1)
    less = [
        1 - value / rows["adamw"]["perplexity"][rate] for rate, value in rows["finetune_r128"]["perplexity"].items()
    ]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"ends {100 * min(less):.0f} to {100 * max(less):.0f}% below AdamW's perplexity" in readme
    named, ours = rows["by_name_r128"]["perplexity"], rows["finetune_r128"]
    assert f"OSD is at {named['5e-05']:.2f} at 5e-5, and at {named['0.0002']:.2f} at 2e-4" in TEXT
    activations, adamw = (rows[name]["perplexity"]["5e-05"] for name in ("activations_r128", "adamw"))
    said = f"the preset is at {activations:.2f} at 5e-5, {activations / adamw - 1:.1%} above AdamW"
    assert said in TEXT
    choosing = " ".join((ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").split())
    best = ours["perplexity"]["0.0001"]
    assert f"at {named['0.0002']:.1f} with it, and at {best:.1f} with the preset at 1e-4" in choosing
    assert f"with {ours['optimizer_state_bytes'] / ours['adamw_state_bytes']:.0%} of the optimizer state" in TEXT


def test_the_averages_in_the_readme_and_in_choosing_are_those_of_the_table():
    averages = re.findall(r"^\| ([^|]+) \|(?:[^|]*\|){3} ([\d.]+ ± [\d.]+) \|", table("glue_minilm"), re.MULTILINE)
    average = dict(averages)
    readme, choosing = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/choosing.md"))
    said = "full AdamW {}, OSD at rank 8 {}, GaLore {}, LoRA {} ("
    names = ("full AdamW", "OSD, rank 8", "GaLore, rank 8", "LoRA, rank 8")
    assert said.format(*(average[name] for name in names)) in readme
    ranks = [average[f"OSD, rank {rank}"].split()[0] for rank in (4, 8, 32)]
    assert "{} at rank 4, {} at rank 8, {} at rank 32".format(*ranks) in choosing
