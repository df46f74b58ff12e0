"""README and docs/ give figures of the committed pretraining results around `preset=pretrain`."""

import math

import pytest

from pages import RESULTS, by_method, page, text_of


@pytest.mark.parametrize(
    "said",
    [
        "{preset} becomes {rank96} with twice the rank, {alpha20} with `alpha=20`, {alpha1.25} with `alpha=1.25`",
        "{carry_moments} with `carry_moments=true`, {inside_half} with half the step inside the subspaces",
        "{ratio8} with half the ratio, {beta2} with `adam_beta2=0.99`, {weight_decay} with `weight_decay=0.1`",
        "20 is as good as 5, and 1.25 worse ({alpha20}, {preset}, {alpha1.25})",
        "it is at {preset}, P by SVD at {svd}, by power iteration at {power} and at random at {random}",
    ],
)
def test_what_is_around_the_preset_was_measured(said: str):
    found = {name: row["best_perplexity"] for name, row in by_method("preset_one_changed_text").items()}
    for name, perplexity in found.items():
        said = said.replace(f"{{{name}}}", f"{perplexity:.1f}")
    assert said in text_of("docs/choosing.md") and "{" not in said
    assert min(found.values()) > 0.99 * found["preset"]  # "nothing is better by more than 1%"


def test_the_readme_has_the_preset_beside_adamw_with_its_ratio():
    rows = by_method("pretrain_presets_text")
    ours, adamw = rows["preset"], rows["adamw_ratio"]
    assert ours["best"]["learning_rate"] == adamw["best"]["learning_rate"] and adamw["best"]["ratio"] == 16
    said = f"**{ours['best_perplexity']:.2f} ± {ours['spread']:.2f}** at AdamW's best learning rate, where AdamW with "
    assert said + f"the same ratio has {adamw['best_perplexity']:.2f} (" in text_of("README.md")


def test_what_is_said_of_small_batches_was_measured():
    rows = by_method("quickstart_preset")
    at, adamw = rows["preset"]["perplexity"], rows["adamw"]
    assert adamw["best"]["learning_rate"] == 2 * rows["preset"]["best"]["learning_rate"] == 0.001
    said = (
        f"at {at['0.001']:.1f} at AdamW's best learning rate, 1e-3, where AdamW is at {adamw['best_perplexity']:.1f}, "
    )
    said += f"and at {at['0.0005']:.1f} at half of that; OSD with a scale that was searched for is at "
    said += f"{rows['by_name']['best_perplexity']:.1f}. Twice and a quarter of AdamW's rate are worse "
    assert said + f"({at['0.002']:.1f}, {at['0.00025']:.1f})" in text_of("docs/choosing.md")


def test_the_long_comparison_is_on_its_page():
    rows, text = by_method("family_long_text"), text_of("docs/benchmarks.md")
    assert (RESULTS / "family_long_text.md").read_text(encoding="utf-8") in page("docs/benchmarks.md")
    end = {name: row["seeds"][0] for name, row in rows.items()}
    ours, same = end["preset"], end["preset_at_adamws"]
    below = {name: f"{1 - ours / value:.1%}" for name, value in end.items()}
    said = (
        "ends {adamw_scaled} below AdamW with its best scale, {adamw} below AdamW with one learning rate, and {galore}"
    )
    assert said.format(**below) + " below GaLore" in text
    assert f"without a search: {same:.2f}, {1 - same / end['adamw']:.1%} below AdamW" in text
    assert rows["preset_at_adamws"]["best"] == rows["adamw"]["best"]
    share = rows["preset"]["optimizer_state_bytes"] / rows["adamw"]["optimizer_state_bytes"]
    assert f" below GaLore**, with {share:.0%} of AdamW's state" in text
    short = 1 - rows["preset"]["short_seeds"][0] / rows["adamw_scaled"]["short_seeds"][0]
    loss, other = (dict(rows[name]["curves"][0]) for name in ("preset", "adamw_scaled"))
    lead = {step: f"{1 - math.exp(loss[step] - other[step]):.1%}" for step in loss}
    at = f"{lead[2800]} after 2,800 steps, {lead[5200]} after 5,200 and {lead[8800]} from 8,800 on"
    assert f"is {short:.1%} in runs of 2M tokens. Here it is {at}" in text and lead[8800] == lead[10000]


def test_what_is_said_of_the_long_comparison_elsewhere():
    found = {name: row["seeds"][0] for name, row in by_method("family_long_text").items()}
    end = {name: f"{value:.1f}" for name, value in found.items()}
    said = "ends at {preset}, AdamW at {adamw} and, with its blocks at a scale, at {adamw_scaled}, GaLore at {galore}"
    assert said.format(**end) in text_of("README.md")
    scaled, plain = (f"{1 - found['preset'] / found[name]:.1%}" for name in ("adamw_scaled", "adamw"))
    said = f"{end['preset']}, {scaled} below AdamW with its blocks at a scale that was searched for "
    said += f"({end['adamw_scaled']}) and {plain} below AdamW with one rate ({end['adamw']})"
    assert said in text_of("docs/choosing.md")
