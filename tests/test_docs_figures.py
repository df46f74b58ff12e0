"""README and the pages of docs/ give figures of committed results, and of shapes, and no others."""

import re
from functools import cache
from statistics import mean, stdev

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_osd import create_osd_optimizer
from hf_osd.hub import projection_bytes
from hf_osd.optim import predicted_state_bytes
from pages import RESULTS, ROOT, page, result, rows_of, text_of


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("family_text", "docs/benchmarks.md"),
        ("step_time", "docs/benchmarks.md"),
        ("memory", "README.md"),
        ("training_step", "README.md"),
    ],
)
def test_tables_are_the_committed_results(name: str, where: str):
    text = page(where)
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") in text
    assert f"results/cpu_2_cores/{name}.png" in text and (RESULTS / f"{name}.png").is_file()
    assert result(name)["environment"]["device"] == "cpu_2_cores"


def test_every_result_is_on_a_page():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    for file in (ROOT / "examples" / "benchmarks" / "results").rglob("*.json"):
        assert re.search(rf"\b{file.stem}(_all)?\b", text), file.stem


def test_the_time_of_int8_weights_is_the_committed_one():
    (row,) = rows_of("training_step_int8")
    floats, int8 = (row["seconds"][f"osd_adamw:source=activations{more}"] for more in ("", ",weight_dtype=int8"))
    ratios = {part: int8[part]["median"] / floats[part]["median"] for part in ("whole", "forward", "backward")}
    text = text_of("docs/benchmarks.md")
    assert f"a step with int8 weights takes {ratios['whole']:.2f} times as long" in text
    assert f"make float weights, {ratios['forward']:.2f} and {ratios['backward']:.2f} times" in text


def test_the_time_of_signs_from_activations_is_the_committed_one():
    names = ("adamw_torch_fused", "osd_adamw:source=activations", "osd_adamw:source=activations,residual=sign")
    ratios = []
    for row in rows_of("training_step_signs"):
        adamw, none, signs = (row["seconds"][name]["whole"]["median"] for name in names)
        ratios += [f"{signs / adamw:.2f}", f"{none / adamw:.2f}"]
    small, small_none, large, large_none = ratios
    assert f"{small} at 60M and {large} at 350M, where it is {small_none} and {large_none}" in text_of("README.md")
    said = f"{small} of fused AdamW's step at 60M, {large} at 350M, and without them {small_none} and {large_none}"
    assert said in text_of("docs/benchmarks.md")
    said = f"takes {large_none} at 350M and {small_none} at 60M, with signs {large} and {small}"
    assert said in text_of("docs/activations.md")


def test_the_quickstarts_output_is_the_committed_run():
    run, readme = result("make_quickstart"), page("README.md")
    assert f"validation perplexity  {run['perplexity']:.2f} after {run['tokens_seen']:,} tokens" in readme
    used, adamw = run["optimizer_state_bytes"] / 2**20, run["adamw_state_bytes"] / 2**20
    assert f"{used:.1f} MiB, AdamW's would be {adamw:.1f} MiB ({used / adamw:.0%})" in readme
    assert f"throughput             {run['tokens_per_second']:,.0f} tokens per second" in readme


def test_what_fits_a_card_was_computed_and_int8_weights_counted():
    cards = (RESULTS / "card_sizes.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert f"{cards}\n" in page("README.md")
    peaks = {row["method"]: row["peak"] for row in rows_of("card_sizes")}
    names = [f"osd_adamw8bit, int8 weights, rank {rank}" for rank in (128, 512)]
    took = [f"{peaks[name]['7B'] / 1e9:.1f}" for name in (*names, "osd_adamw8bit_layerwise, rank 128")]
    text = "take {} GB at rank 128 and {} GB at rank 512, where `osd_adamw8bit_layerwise` takes {} GB at rank 128"
    assert text.format(*took) in text_of("docs/memory.md")
    layerwise, int8 = peaks["osd_adamw8bit_layerwise, rank 128"], peaks[names[0]]
    said = f"{layerwise['7B'] / 1e9:.1f} GB for 7B and {layerwise['8B'] / 1e9:.1f} GB for 8B"
    assert said in text_of("docs/finetuning.md") and f": {int8['13B'] / 1e9:.1f} GB." in text_of("docs/finetuning.md")
    assert (RESULTS / "memory_int8.md").read_text(encoding="utf-8") in page("docs/low_precision.md")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("pretrain_presets_text", "docs/choosing.md"),
        ("full_size_optim_text", "docs/choosing.md"),
        ("glue_presets", "docs/finetuning.md"),
    ],
)
def test_the_presets_were_measured(name: str, where: str):
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip() in page(where)


def test_what_choosing_says_was_measured():
    text, best = text_of("docs/choosing.md"), {row["method"]: row for row in rows_of("family_text")}
    adamw, blocks, osd = (f"{best[name]['best_perplexity']:.1f}" for name in ("adamw", "adamw_scaled", "online_pca"))
    said = f"a perplexity of {adamw}; AdamW with its blocks at 1/16 of the rate {blocks}; OSD at its best scale {osd}"
    assert said in text and best["adamw_scaled"]["best"]["scale"] == 1 / 16
    spread = {name: f"{row['best_perplexity']:.2f} ± {row['spread']:.2f}" for name, row in best.items()}
    assert "| perplexity | {online_pca} | {online_pca_residual} | {online_pca_sign} |".format(**spread) in text
    assert f"it did best there ({spread['power_activations']})" in text
    assert "level with gradients ({online_pca_activations} beside {online_pca})".format(**spread) in text
    sign = best["online_pca_sign"]
    assert sign["best"] == {"learning_rate": 0.08, "scale": 0.125, "residual_scale": 0.25}
    assert "1.25" in sign["arguments"] and "| 0.08 | 0.125 | `alpha=1.25,residual=sign,residual_scale=0.25` |" in text
    seen = {row["label"]: row["best_perplexity"] for row in rows_of("quickstart_settings")}
    scales = (
        seen["scale 0.5"],
        seen["alpha 5 (the paper's)"],
        seen["scale 0.125"],
    )  # 0.25 is not named
    assert "from {:.1f} at scale 0.5 to {:.1f} at 0.25 and {:.2f} at 0.125".format(*scales) in text
    scale, by_svd = "scale {}", "scale {}, P by SVD every 200 steps (GaLore)"
    said = (
        "0.125 LLaMA 4M ends at {:.2f}, with SVD every 200 steps at {:.2f}, and at scale 0.0625 at {:.2f} and {:.2f}"
    )
    assert said.format(*(seen[name.format(at)] for at in (0.125, 0.0625) for name in (scale, by_svd))) in text
    step = [row["seconds"] for row in rows_of("step_time")]
    ratios = [row["osd_adamw, residual scaled"]["median"] / row["osd_adamw"]["median"] for row in step]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times" in text
    table = (RESULTS / "paper_table5_reduced.md").read_text(encoding="utf-8")
    ours = re.findall(r"Online Subspace Descent \| (\d+) \| ([\d.]+)", table)
    assert "{:.1f} at rank 8, {:.1f} at 24, {:.1f} at 64".format(*(float(value) for _, value in ours)) in text


def test_what_is_said_of_single_options_is_what_was_measured():
    text = text_of("docs/benchmarks.md")
    seen = {row["method"]: f"{row['best_perplexity']:.1f}" for row in rows_of("family_settings_text")}
    carried = "`svd` every 20 steps: {svd_20} → {svd_20_carried}; `power`: {power} → {power_carried}"
    assert carried.format(**seen) in text
    rows = {row["method"]: row for row in rows_of("projection_interval_text")}
    seen = {name: f"{row['best_perplexity']:.1f}" for name, row in rows.items()}
    plain = "every step {interval_1}, every 2nd {interval_2}, never {never}"
    residual = "with `residual=scaled` {residual_interval_1}, {residual_interval_2} and {residual_never}"
    assert f"{plain}; {residual}".format(**seen) in text
    slow = [rows["interval_1"]["perplexity"][f"0.04 × {alpha}"] for alpha in (0.078125, 0.15625, 0.3125)]
    assert min(slow) > rows["never"]["seeds"][0]  # "no better than a P that stays"


def test_what_is_said_of_the_optimizers_speed_was_measured():
    text = text_of("docs/benchmarks.md")
    steps, long, svd = (rows_of(name) for name in ("step_time", "step_time_400", "projection_time"))
    names = ("osd_adamw", "galore-torch", "autograd, as the paper's code")
    operators = [steps[0]["seconds"][name]["operators"] for name in names]
    said = "asks torch for {} operators where galore-torch asks for {} and the paper's way for {}"
    assert said.format(*operators) in text
    worst = [long[0]["seconds"][name]["worst"] / long[0]["seconds"][name]["median"] for name in names[:2]]
    assert f"[{worst[0]:.1f} times the median]" in text and f"SVD takes {worst[1]:.0f} times as much" in text
    first, median = (steps[-1]["seconds"]["osd_adamw"][key] for key in ("first", "median"))
    assert steps[-1]["model"] == "1b" and first - median < 3 * median
    (seconds,) = [
        row["seconds"] for row in svd if (row["shape"], row["rank"], row["dtype"]) == ([2048, 5461], 128, "float32")
    ]
    ratios = [seconds["torch.linalg.svd"] / seconds[name] for name in ("closed form", "closed form, given R")]
    assert "is {:.0f} times faster than `torch.linalg.svd`, and {:.0f} times".format(*ratios) in text


def test_the_figures_of_layerwise_mode_and_of_the_exchange_are_the_committed_ones():
    rows = rows_of("layerwise_memory")
    ordinary, layerwise = (
        next(row for row in rows if row["mode"] == mode and row["micro_batches"] == 1)["peak_live_gradient_bytes"]
        / 2**20
        for mode in ("ordinary", "layerwise")
    )
    assert f"at most {layerwise:.1f} MiB of LLaMA 60M's {ordinary:.1f} MiB" in text_of("docs/training.md")
    rows, text = rows_of("ddp_exchange"), text_of("docs/distributed.md")
    keys = ("ratio", "fsdp2_ratio", "fsdp2_divided_ratio", "fsdp2_divided_to_whole_p")
    ratio, whole, divided, more = ({row["rank"]: row[key] for row in rows} for key in keys)
    assert f"{ratio[128]:.0%} of all bytes at rank 128 and {ratio[512]:.0%} at rank 512" in text
    assert f"(default) | {divided[128]:.0%} | {divided[512]:.0%} |" in text
    assert f"(`divide_projection=false`) | {whole[128]:.0%} | {whole[512]:.0%} |" in text
    assert f"{more[128] - 1:.1%} more at rank 128 and {more[512] - 1:.1%} more at rank 512" in text


def test_rounding():
    loss = result("stochastic_rounding")["loss"]
    start = loss["float32"][0][1]
    kinds = ("float32", "bfloat16", "bfloat16, stochastic rounding")
    exact, rounded, stochastic = (loss[kind][-1][1] for kind in kinds)
    assert (
        f"from {start:.3f} to {exact:.3f} nats per byte in float32, to {rounded:.3f} in bfloat16, and to "
        f"{stochastic:.3f} in bfloat16 with it" in text_of("docs/low_precision.md")
    )


def test_the_loss_with_int8_weights():
    text, tasks = page("docs/low_precision.md"), {}
    for row in rows_of("glue_weight_dtype"):
        tasks.setdefault(row["method"], {})[row["task"]] = row
    for row in rows_of("weight_dtype_text"):
        cells = [f"{row['best_perplexity']:.2f} ± {row['spread']:.2f}"]
        for task in ("sst2", "mrpc"):
            scores = tasks[row["method"]][task]["scores"] if row["method"] in tasks else None
            cells.append("-" if scores is None else f"{mean(scores):.1f} ± {stdev(scores):.1f}")
        assert f"| {row['label']} | {' | '.join(cells)} |\n" in text


def test_forward_passes_alone():
    text = text_of("docs/forward_only.md")
    table = (RESULTS / "forward_only.md").read_text(encoding="utf-8")
    ratio = {
        name: float(value) for name, value in re.findall(r"^\| (\w+) \| [^|]+ \| [^|]+ \| ([\d.]+) \|", table, re.M)
    }
    said = f"takes {ratio['SubZero']:.2f} times the memory of an evaluation, MeZO {ratio['MeZO']:.2f} times"
    assert said in text
    bases = result("forward_only_bases")
    losses = {}
    for row in bases["rows"]:
        runs = [run for run in row["runs"] if run["lr"] == row["lr"]]
        losses[row["method"]] = mean(run["loss"] for run in runs)
        losses[row["method"], "kept"] = mean(run["kept"] or 1 for run in runs)
    follows, random = "V follows the inputs", "random V"
    shares = [f"{100 * losses[name, 'kept']:.0f}%" for name in (follows, random)]
    assert f"(loss {bases['before']:.3f} before them) V keeps {shares[0]} of the gradient, a random one" in text
    assert f"a random one {shares[1]}" in text
    said = f"{losses[follows]:.3f} with it, {losses[random]:.3f} with a random V, {losses['MeZO']:.3f} with MeZO, "
    assert said + f"{losses['a saved P as V']:.3f} with a saved P as V" in text


def test_quality_of_forward_passes_alone():
    tasks: dict[str, dict] = {}
    for row in rows_of("glue_forward_only"):
        tasks.setdefault(row["label"], {})[row["task"]] = row
    for label, of in tasks.items():
        cells = []
        for row in (of.get("sst2"), of.get("mrpc")):
            if row is None:
                cells += ["-", "-"]
                continue
            losses = [metrics["eval_loss"] for metrics in row["metrics"]]
            cells.append(f"{mean(row['scores']):.1f} ± {stdev(row['scores']):.1f}")
            cells.append(f"{mean(losses):.3f} ± {stdev(losses):.3f}")
        assert f"| {label} | {' | '.join(cells)} |\n" in page("docs/forward_only.md")
    text = text_of("docs/forward_only.md")
    start, subzero, mezo = (tasks[name]["sst2"] for name in (next(iter(tasks)), "SubZero, rank 8", "MeZO"))
    same = tasks["MeZO at SubZero's rate"]["sst2"]
    assert same["best_learning_rate"] == subzero["best_learning_rate"]
    losses = [[metrics["eval_loss"] for metrics in row["metrics"]] for row in (same, subzero)]
    assert all(low < high for low, high in zip(*losses, strict=True))  # "the lower one with every seed"
    falls = f"MeZO falls from {start['scores'][0]:.1f} to {mezo['grid']['0.0003']:.1f}"
    assert f"{falls} and SubZero stays at {subzero['grid']['0.0003']:.1f}" in text
    assert f"({mezo['trained_parameters'] / 1e6:.1f}M parameters)" in text


@cache
def llama(name: str) -> LlamaForCausalLM:
    config = LlamaConfig.from_json_file(ROOT / "examples" / "llama_configs" / f"llama_{name}.json")
    with torch.device("meta"):
        return LlamaForCausalLM(config).bfloat16()


def test_the_sizes_of_p_are_what_the_shapes_give():
    for name in ("60m", "1b", "7b"):
        (row,) = re.findall(rf"^\| LLaMA {name.upper()} \| (.*) \|$", page("docs/hub.md"), re.MULTILINE)
        shapes = [tuple(p.shape) for key, p in llama(name).named_parameters() if key.endswith("_proj.weight")]
        for rank, cell in zip((128, 512, 1024), row.split(" | "), strict=True):
            number, unit = cell.split()[:2]
            size = float(number) * {"MB": 1e6, "GB": 1e9}[unit]
            assert projection_bytes(shapes, rank) == pytest.approx(size, rel=4e-3)  # three digits


def test_the_figures_of_llama_7b_are_what_the_shapes_give():
    model = llama("7b")
    fixed = sum(p.nbytes for p in model.parameters()) + max(p.nbytes for p in model.parameters())
    lean, memory = {"projection_dtype": "bfloat16"}, text_of("docs/memory.md")
    for optim, options, text in (
        ("osd_adamw8bit", {}, "{} GB with `osd_adamw8bit`"),
        (
            "osd_adamw8bit",
            {**lean, "projection_optim": "adafactor"},
            "{} GB with `projection_dtype=bfloat16,projection_optim=adafactor`",
        ),
        ("osd_lion8bit", lean, "{} GB with `osd_lion8bit`"),
    ):
        optimizer = create_osd_optimizer(model, optim, rank=1024, **options)
        assert text.format(f"{(fixed + predicted_state_bytes(optimizer)) / 1e9:.1f}") in memory
    # P (n, r) on the right side and AdamW's two moments of it, float32
    sizes = sum(p.shape[1] for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    whole = [3 * 4 * rank * sizes / 1e9 for rank in (128, 512, 1024)]
    assert "they are {:.2f}, {:.2f} and {:.2f} GB".format(*whole) in text_of("docs/distributed.md")
    # From activations q, k and v share P, and so do gate and up: one P (n, r) for each input.
    led = ("q_proj", "o_proj", "gate_proj", "down_proj")
    sizes = sum(p.shape[1] for name, p in model.named_parameters() if name.split(".")[-2] in led)
    whole = [3 * 4 * rank * sizes / 1e9 for rank in (128, 512, 1024)]
    said = "holds {:.2f} GB of P and its moments of LLaMA 7B at rank 128, {:.2f} GB at 512 and {:.2f} GB at 1024; "
    said = said.format(*(size / 8 for size in whole)) + "whole on each they are {:.2f}, {:.2f} and {:.2f} GB"
    assert said.format(*whole) in text_of("docs/distributed.md")
