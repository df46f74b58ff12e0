"""What is said of fine-tuning is what the committed results say."""

import json
import re
from statistics import mean

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


def test_the_averages_in_choosing_are_those_of_the_table():
    averages = re.findall(r"^\| ([^|]+) \|(?:[^|]*\|){3} ([\d.]+ ± [\d.]+) \|", table("glue_minilm"), re.MULTILINE)
    average = dict(averages)
    ranks = [average[f"OSD, rank {rank}"].split()[0] for rank in (4, 8, 32)]
    assert "{} at rank 4, {} at rank 8, {} at rank 32".format(*ranks) in text_of("docs/choosing.md")


def test_who_keeps_adamws_rate_gets_what_is_said():
    rows = {(row["task"], row["method"]): row for row in rows_of("glue_presets")}
    text = text_of("docs/choosing.md")

    def at(task: str, method: str, rate: str) -> float:
        scores = rows[task, method]["scores"][rate].values()
        assert len(scores) == 3
        return mean(scores)

    best = {
        task: max(at(task, "full", rate) for rate in rows[task, "full"]["scores"]) for task in ("sst2", "mrpc", "rte")
    }
    kept = {task: at(task, "finetune-r128", "5e-05") for task in best}
    assert (
        f"{kept['sst2']:.1f} beside {best['sst2']:.1f} on SST-2 and {kept['mrpc']:.1f} beside {best['mrpc']:.1f}"
        in text
    )
    assert f"it decides nothing: {kept['rte']:.1f} beside {best['rte']:.1f}" in text
    tasks = ("sst2", "mrpc")
    names = ("finetune-r8", "activations-signs-r128", "activations-r128")
    few, activations, without = ([at(task, name, "5e-05") for task in tasks] for name in names)
    galore, lora = (
        [max(at(task, name, rate) for rate in rows[task, name]["scores"]) for task in tasks]
        for name in ("galore-r8", "lora-r8")
    )
    assert "the preset is at {:.1f} and {:.1f} at 5e-5".format(*few) in text
    said = "at rank 128, at {:.1f} and {:.1f}, and without the signs at {:.1f} and {:.1f}"
    assert said.format(*activations, *without) in text
    less = [kept[task] - score for own in (activations, without) for task, score in zip(tasks, own, strict=True)]
    said = "{:.1f} points of accuracy on SST-2 and {:.1f} on MRPC, without signs {:.1f} and {:.1f}"
    assert said.format(*less) in text_of("docs/activations.md")
    assert "is at {:.1f} and {:.1f}, LoRA (rank 8) at {:.1f} and {:.1f}".format(*galore, *lora) in text
    share = rows["sst2", "finetune-r8"]["optimizer_state_bytes"] / rows["sst2", "full"]["optimizer_state_bytes"]
    assert f"At rank 8, with {share:.0%} of AdamW's state" in text
    ratios = [at("sst2", method, "5e-05") for method in ("signs-r128", "head16-r128", "head256-r128")]
    assert "without it {:.1f}, with 16 and 256 {:.1f} and {:.1f}".format(*ratios) in text
    adamw = [at(*where) for where in (("sst2", "full-head", "5e-05"), ("sst2", "full-head", "0.0001"))]
    assert "({:.1f} and {:.1f})".format(*adamw) in text and f"({at('mrpc', 'full-head', '0.0001'):.1f})" in text
    head = [max(at(task, "full-head", rate) for rate in rows[task, "full-head"]["scores"]) for task in tasks]
    shown = {
        "full AdamW, best of its rates": [best[task] for task in tasks],
        "full AdamW, classifier at 64 times the rate, best of its rates": head,
        "`preset=finetune` at AdamW's usual 5e-5, rank 128": [kept[task] for task in tasks],
        "`preset=finetune` at 5e-5, rank 8": few,
        "GaLore, rank 8, best of its rates": galore,
        "LoRA, rank 8, best of its rates": lora,
    }
    for label, (first, second) in shown.items():
        assert f"| {label} | {first:.1f} | {second:.1f} |" in page("README.md")
    assert f"OSD is at {mean(rows['sst2', 'osd-r8']['scores']['5e-05'].values()):.1f} on SST-2" in text
