"""README and docs/ give figures of the committed pretraining results around `preset=pretrain`."""

import math
from statistics import mean, stdev

import pytest

from pages import RESULTS, by_method, page, result, text_of


@pytest.mark.parametrize(
    "said",
    [
        "{preset} becomes {rank96} with twice the rank, {rank24} with half of it, {rank12} with a quarter",
        "{alpha20} with `alpha=20`, {alpha1.25} with `alpha=1.25`, {carry_moments} with",
        "{rank12} at rank 12, {rank24} at 24, {preset} at 48 and {rank96} at 96",
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


METHODS = {
    "adamw": "AdamW",
    "adamw_scaled": "AdamW, its blocks at a scale",
    "adamw_ratio": "AdamW, its embeddings at a ratio",
    "galore": "GaLore (galore-torch)",
    "apollo": "APOLLO (apollo-torch)",
    "svd_residual": "GaLore + Fira's residual",
    "online_pca": "OSD, online PCA",
    "online_pca_residual": "OSD, online PCA + residual",
    "online_pca_sign": "OSD, online PCA + sign of the rest",
    "online_pca_activations": "OSD from activations, online PCA",
    "preset_activations_signs": "**OSD from activations, `preset=pretrain`**",
    "preset": "**OSD, `preset=pretrain`**",
}
OF_PRESETS = {"preset": "preset", "adamw_ratio": "adamw_ratio", "preset_activations_signs": "preset_activations"}


def quality() -> str:
    """README's table of pretraining, from three results."""
    short, presets, long = map(by_method, ("family_text", "pretrain_presets_text", "family_long_text"))
    lines = ["| method | LLaMA 0.5M, 256,000 tokens | LLaMA 2.1M, 20M tokens | optimizer state |", "| --- " * 4 + "|"]
    for name, label in METHODS.items():
        row, later = presets[OF_PRESETS[name]] if name in OF_PRESETS else short[name], long[name]
        assert row["tokens_seen"] == 256_000 and len(row["seeds"]) == len(later["seeds"]) == 2
        shares = {f"{own['optimizer_state_bytes'] / own['adamw_state_bytes']:.0%}" for own in (row, later)}
        figures = [f"{mean(own['seeds']):.2f} ± {stdev(own['seeds']):.2f}" for own in (row, later)]
        lines.append(f"| {label} | {' | '.join(figures)} | {' and '.join(sorted(shares))} |")
    return "\n".join(lines) + "\n"


def test_the_readmes_table_of_quality_is_of_the_committed_results():
    assert quality() in page("README.md")
    rows = by_method("pretrain_presets_text")
    assert rows["preset"]["best"]["learning_rate"] == rows["adamw_ratio"]["best"]["learning_rate"]  # which is AdamW's
    assert rows["adamw_ratio"]["best"]["ratio"] == 16


def test_what_signs_from_activations_are_worth():
    rows = by_method("pretrain_presets_text")
    names = ("preset", *(f"preset_activations{sample}" for sample in ("", "_2", "_16", "_none")))
    whole, found, second, few, none = (rows[name] for name in names)
    said = (
        f"it is at {found['best_perplexity']:.1f} (two seeds): there its signs are of every fourth column, others at "
    )
    said += f"each step. Of every second one {second['best_perplexity']:.1f}, of every sixteenth "
    said += f"{few['best_perplexity']:.1f}, and without signs {none['best_perplexity']:.1f} (one seed, beside "
    assert f"{said}{found['seeds'][0]:.1f})" in text_of("docs/choosing.md") and len(found["seeds"]) == 2
    said = f"at {found['best_perplexity']:.1f} from activations and at {whole['best_perplexity']:.1f} on gradients"
    assert said in text_of("docs/activations.md")


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
    readme = f"ends at {adamw['best_perplexity']:.1f} there, at the best of three learning rates ("
    assert readme in text_of("README.md") and len(adamw["perplexity"]) == 3


def below(ours: dict, theirs: dict) -> float:
    """By which share the mean of the seeds is lower that both have."""
    count = min(len(ours["seeds"]), len(theirs["seeds"]))
    return 1 - mean(ours["seeds"][:count]) / mean(theirs["seeds"][:count])


def apart_by_seed(rows: dict[str, dict], of: str = "") -> str:
    """How far the preset ends above AdamW with a ratio with the first seed, and below it with the second."""
    above, under = (a / b - 1 for a, b in zip(rows["preset"]["seeds"], rows["adamw_ratio"]["seeds"], strict=True))
    assert under < 0 < above < 0.01 and abs(below(rows["preset"], rows["adamw_ratio"])) < 0.01
    return f"{above:.1%} above{of} and {-under:.1%} below"


def test_the_long_comparison_is_on_its_page():
    rows, text = by_method("family_long_text"), text_of("docs/benchmarks.md")
    assert (RESULTS / "family_long_text.md").read_text(encoding="utf-8") in page("docs/benchmarks.md")
    ours, scaled, adamw, same = (rows[name] for name in ("preset", "adamw_scaled", "adamw", "preset_at_adamws"))
    seeds = " and ".join(f"{1 - a / b:.1%}" for a, b in zip(ours["seeds"], scaled["seeds"], strict=True))
    said = f"ends {below(ours, scaled):.1%} below AdamW with its best scale (by seed {seeds}), "
    said += f"level with AdamW with its embeddings at the best ratio (by seed {apart_by_seed(rows)}), "
    apollo, fira, galore = (rows[name] for name in ("apollo", "svd_residual", "galore"))
    by_seed, of_apollo, of_fira, of_galore = (
        " and ".join(f"{1 - a / b:.1%}" for a, b in zip(ours["seeds"], row["seeds"], strict=True))
        for row in (adamw, apollo, fira, galore)
    )
    said += f"{below(ours, adamw):.1%} below AdamW with one learning rate ({by_seed}), "
    said += f"{below(ours, apollo):.1%} below APOLLO (by seed {of_apollo}), {below(ours, fira):.1%} below Fira's "
    said += f"residual ({of_fira}) and {below(ours, galore):.1%} below GaLore ({of_galore})**"
    share, *others = (
        f"{row['optimizer_state_bytes'] / row['adamw_state_bytes']:.0%}" for row in (ours, apollo, fira, galore)
    )
    assert len(set(others)) == 1 and f"{said}, with {share} of AdamW's state (the last three have {others[0]})" in text
    by_seed = " and ".join(f"{1 - a / b:.1%}" for a, b in zip(same["seeds"], adamw["seeds"], strict=True))
    assert f"without a search: {mean(same['seeds']):.2f}, {below(same, adamw):.1%} below AdamW ({by_seed})" in text
    assert same["best"] == adamw["best"]
    short = 1 - ours["short_seeds"][0] / scaled["short_seeds"][0]
    loss, other = (dict(row["curves"][0]) for row in (ours, scaled))
    lead = {step: f"{1 - math.exp(loss[step] - other[step]):.1%}" for step in loss}
    at = f"{lead[2800]} after 2,800 steps, {lead[5200]} after 5,200 and {lead[8800]} from 8,800 on"
    assert f"is {short:.1%} in runs of 2M tokens. Here, with the first seed, it is {at}" in text
    assert lead[8800] == lead[10000]
    spreads = [max(row["seeds"]) / min(row["seeds"]) - 1 for row in (rows["adamw_ratio"], ours, apollo)]
    assert "its seeds are {:.1%} apart, the preset's {:.1%}, APOLLO's {:.1%}".format(*spreads) in text


def test_steps_of_the_long_comparison_are_timed_side_by_side():
    times = result("family_long_text")["times"]
    seconds = times["seconds_per_step"]
    assert seconds.keys() == by_method("family_long_text").keys() and times["steps"] == 400
    slower = [seconds[name] / seconds["adamw"] - 1 for name in ("preset_at_adamws", "preset_ratio8", "preset")]
    said = f"takes {100 * min(slower):.0f} to {max(slower):.0%} longer than AdamW's ({1000 * seconds['adamw']:.0f} ms)"
    assert said in text_of("docs/benchmarks.md")
    signs, rso = (seconds[name] / seconds["adamw"] - 1 for name in ("preset_activations_signs", "rso"))
    assert f"from activations {signs:.0%}, RSO's {-rso:.0%} less" in text_of("docs/benchmarks.md")
    equal = [seconds[name] for name in ("adamw", "adamw_scaled", "adamw_ratio")]
    assert f"which cost the same, are {max(equal) / min(equal) - 1:.0%} apart" in text_of("docs/benchmarks.md")


FROM_ACTIVATIONS = ("online_pca_activations", "preset_activations", "preset_activations_signs")


def of_adamw(rows: dict[str, dict]) -> str:
    """Where the preset from activations ends beside AdamW."""
    first, second = (
        ours / theirs - 1
        for ours, theirs in zip(rows["preset_activations_signs"]["seeds"], rows["adamw"]["seeds"], strict=True)
    )
    assert second < 0 < first and abs(below(rows["preset_activations_signs"], rows["adamw"])) < 0.005
    return f"level with AdamW (by seed {first:.1%} above and {-second:.1%} below)"


def test_what_is_said_of_what_lies_outside_the_subspaces():
    rows, text = by_method("family_long_text"), text_of("docs/benchmarks.md")
    assert {len(row["seeds"]) for row in rows.values()} == {2}
    end = {name: mean(row["seeds"]) for name, row in rows.items()}
    said = "OSD ends at {online_pca:.2f} without a residual, at {online_pca_residual:.2f} with a scaled one and at "
    said += "{online_pca_sign:.2f} with signs, GaLore at {galore:.2f} and with Fira's residual at {svd_residual:.2f}, "
    said += "RSO, which draws P at random, at {rso:.2f}. From activations and without one it is "
    said += "{online_pca_activations:.2f}, and {preset_activations:.2f} with the preset's ratio, "
    assert said.format(**end) in text
    none, adamw, preset = (end[name] for name in ("online_pca", "adamw", "preset"))
    plain, bare, signs = (end[name] for name in FROM_ACTIVATIONS)
    said = (
        f"{plain / none - 1:.1%} and {bare / none - 1:.1%} above OSD without a residual, {plain / adamw - 1:.1%} and "
    )
    said += f"{bare / adamw - 1:.1%} above AdamW. **The preset as it is, with signs of every fourth column at a time, "
    said += f"ends at {signs:.2f} from activations**: {1 - signs / bare:.1%} below that, {of_adamw(rows)}, and "
    assert f"{said}{signs / preset - 1:.1%} above the preset on gradients." in text
    above = f"{none / adamw - 1:.0%} above AdamW without a residual, {plain / adamw - 1:.0%} from activations without "
    assert f"{above}one, and level with it from activations with the preset" in text_of("README.md")
    choosing = text_of("docs/choosing.md")
    told = f"over 20M tokens it ends {plain / none - 1:.0%} above gradients without a residual, and "
    assert f"{told}{plain / preset - 1:.0%} above `preset=pretrain`" in choosing
    assert f"{signs:.1f} there, {signs / preset - 1:.1%} above the same on gradients" in choosing
    assert f"from {none:.1f} to {end['online_pca_sign']:.1f} over 20M tokens" in choosing
    told = f"ends at {signs:.1f} with `preset=pretrain`, level with AdamW ({adamw:.1f}) and {signs / preset - 1:.1%} "
    assert f"{told}above the preset on gradients; without its signs at {bare:.1f}" in text_of("docs/activations.md")


def test_what_int8_weights_cost_at_length():
    rows = by_method("family_long_text")
    int8, floats = rows["int8"], rows["online_pca_activations"]
    assert int8["optimizer_state_bytes"] == floats["optimizer_state_bytes"]
    by_seed = " and ".join(f"{a / b - 1:.1%}" for a, b in zip(int8["seeds"], floats["seeds"], strict=True))
    more, in_short = -below(int8, floats), int8["short_seeds"][0] / floats["short_seeds"][0] - 1
    said = f"{mean(int8['seeds']):.2f}, {more:.1%} above float32 weights (by seed {by_seed}), at the best settings of "
    assert f"{said}each. In runs of 2M tokens it is {in_short:.1%}." in text_of("docs/benchmarks.md")
    assert f"ends {more:.1%} above float32 weights (two seeds" in text_of("docs/low_precision.md")


def test_what_is_said_of_the_long_comparison_elsewhere():
    rows = by_method("family_long_text")
    end = {name: f"{mean(row['seeds']):.1f}" for name, row in rows.items()}
    ratio = rows["adamw_ratio"]["best"]["ratio"]
    said = f"only level with AdamW with its embeddings at a searched ratio, {ratio:g} ({end['adamw_ratio']}; by seed "
    assert said + apart_by_seed(rows, " it") in text_of("docs/choosing.md")
    half, whole = (end[name] for name in ("preset_ratio8", "preset"))
    assert f"there over 20M tokens, too: 8 ends at {half}, 16 at {whole} (two seeds)" in text_of("docs/choosing.md")
    scaled, plain = (f"{below(rows['preset'], rows[name]):.1%}" for name in ("adamw_scaled", "adamw"))
    said = f"{end['preset']}, {scaled} below AdamW with its blocks at a scale that was searched for "
    said += f"({end['adamw_scaled']}; two seeds) and {plain} below AdamW with one rate ({end['adamw']}; two seeds)"
    assert said in text_of("docs/choosing.md")
    ends = f"{below(rows['preset'], rows['adamw_scaled']):.1%} below AdamW with its blocks at a scale, and only level"
    assert ends in text_of("README.md")
    same = mean(rows["preset_at_adamws"]["seeds"])
    assert f"(AdamW's own ends at {same:.2f})" in text_of("README.md")
    assert {len(rows[name]["seeds"]) for name in ("preset", "preset_at_adamws", "adamw_scaled", "adamw")} == {2}
