"""What is said of fine-tuning is what the committed results say."""

import json
import re

import pytest

from pages import RESULTS, ROOT, by_method, page, result, rows_of, text_of


PAGE, TEXT = page("docs/finetuning.md"), text_of("docs/finetuning.md")


def table(name: str) -> str:
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8").split("\n\n")[-1]


@pytest.mark.parametrize("name", ["glue_minilm", "glue_adapters"])
def test_tables_are_the_committed_results(name):
    assert table(name) in PAGE
    assert f"compare_finetuning.py {name}" in PAGE


def test_every_method_had_the_same_steps_and_the_stated_grid():
    experiment = json.loads((ROOT / "examples" / "benchmarks" / "experiments" / "glue_minilm.json").read_text())
    rows = rows_of("glue_minilm")
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
    rows = by_method("sft_presets")
    for name, label in (("adamw", "AdamW"), ("finetune_r128", "preset=finetune")):
        seen = [rows[name]["perplexity"][rate] for rate in ("2e-05", "5e-05", "0.0001")]
        assert f"| {label} | {' | '.join(f'{value:.2f}' for value in seen)} |" in PAGE
        assert (rows[name]["steps"], len(rows[name]["seeds"])) == (200, 1)
    less = [
        1 - value / rows["adamw"]["perplexity"][rate] for rate, value in rows["finetune_r128"]["perplexity"].items()
    ]
    assert f"ends {100 * min(less):.0f} to {100 * max(less):.0f}% below AdamW's perplexity" in text_of("README.md")
    named, ours = rows["by_name_r128"]["perplexity"], rows["finetune_r128"]
    assert f"OSD is at {named['5e-05']:.2f} at 5e-5, and at {named['0.0002']:.2f} at 2e-4" in TEXT
    activations, adamw = (rows[name]["perplexity"]["5e-05"] for name in ("activations_r128", "adamw"))
    said = f"the preset is at {activations:.2f} at 5e-5, {activations / adamw - 1:.1%} above AdamW"
    assert said in TEXT
    said = f"at {named['0.0002']:.1f} with it, and at {ours['perplexity']['0.0001']:.1f} with the preset at 1e-4"
    assert said in text_of("docs/choosing.md")
    assert f"with {ours['optimizer_state_bytes'] / ours['adamw_state_bytes']:.0%} of the optimizer state" in TEXT


def test_the_averages_in_the_readme_and_in_choosing_are_those_of_the_table():
    averages = re.findall(r"^\| ([^|]+) \|(?:[^|]*\|){3} ([\d.]+ ± [\d.]+) \|", table("glue_minilm"), re.MULTILINE)
    average = dict(averages)
    said = "full AdamW {}, OSD at rank 8 {}, GaLore {}, LoRA {} ("
    names = ("full AdamW", "OSD, rank 8", "GaLore, rank 8", "LoRA, rank 8")
    assert said.format(*(average[name] for name in names)) in text_of("README.md")
    ranks = [average[f"OSD, rank {rank}"].split()[0] for rank in (4, 8, 32)]
    assert "{} at rank 4, {} at rank 8, {} at rank 32".format(*ranks) in text_of("docs/choosing.md")
