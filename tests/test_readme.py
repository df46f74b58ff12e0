"""The README says what is so: its tables are the committed results, its keys exist, its snippets are Python."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_osd import create_osd_optimizer
from hf_osd.optim import DEFAULT_RANK, OPTIM_NAMES, PRESETS, predicted_state_bytes
from hf_osd.optim.options.mode import LAYERWISE_SUFFIX
from hf_osd.optim.options.presets import KEYS
from hf_osd.optim.options.table import DEFAULTS


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = README.replace("\n", " ")  # for what may break anywhere
RESULTS = ROOT / "examples" / "benchmarks" / "results" / "cpu_2_cores"


@pytest.mark.parametrize("name", ["family_text", "step_time", "memory", "training_step"])
def test_tables_are_the_committed_results(name: str):
    table = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert table in README
    assert f"results/cpu_2_cores/{name}.png" in README and (RESULTS / f"{name}.png").is_file()
    assert json.loads((RESULTS / f"{name}.json").read_text())["environment"]["device"] == "cpu_2_cores"


def test_what_it_says_of_int8_weights_was_computed_and_counted():
    cards = (RESULTS / "card_sizes.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert f"{cards}\n" in README
    peaks = {row["method"]: row["peak"] for row in json.loads((RESULTS / "card_sizes.json").read_text())["rows"]}
    names = [f"osd_adamw8bit, int8 weights, rank {rank}" for rank in (128, 512)]
    took = [f"{peaks[name]['7B'] / 1e9:.1f}" for name in (*names, "osd_adamw8bit_layerwise, rank 128")]
    text = "takes {} GB at rank 128 and {} GB at rank 512, where `osd_adamw8bit_layerwise` takes {} GB at rank 128"
    assert text.format(*took) in TEXT
    assert (RESULTS / "memory_int8.md").read_text(encoding="utf-8") in README


def test_what_it_says_of_single_options_is_what_was_measured():
    rows = json.loads((RESULTS / "family_settings_text.json").read_text())["rows"]
    seen = {row["method"]: f"{row['best_perplexity']:.1f}" for row in rows}
    carried = "`svd` every 20 steps: {svd_20} → {svd_20_carried}; `power`: {power} → {power_carried}"
    assert carried.format(**seen) in TEXT


def test_what_it_says_of_how_often_the_projection_moves_was_measured():
    rows = {row["method"]: row for row in json.loads((RESULTS / "projection_interval_text.json").read_text())["rows"]}
    seen = {name: f"{row['best_perplexity']:.1f}" for name, row in rows.items()}
    plain = "every step {interval_1}, every 2nd {interval_2}, never {never}"
    residual = "with `residual=scaled` {residual_interval_1}, {residual_interval_2} and {residual_never}"
    assert f"{plain}; {residual}".format(**seen) in TEXT
    slow = [rows["interval_1"]["perplexity"][f"0.04 × {alpha}"] for alpha in (0.078125, 0.15625, 0.3125)]
    assert min(slow) > rows["never"]["seeds"][0]  # "no better than a P that stays"


def test_what_it_says_of_speed_was_measured():
    steps, long, svd = (
        json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        for name in ("step_time", "step_time_400", "projection_time")
    )
    operators = [
        steps[0]["seconds"][name]["operators"]
        for name in ("osd_adamw", "galore-torch", "autograd, as the paper's code")
    ]
    assert (
        "asks torch for {} operators where galore-torch asks for {} and the paper's way for {}".format(*operators)
        in TEXT
    )
    spike, peer = (
        long[0]["seconds"][name]["worst"] / long[0]["seconds"][name]["median"]
        for name in ("osd_adamw", "galore-torch")
    )
    assert f"[{spike:.1f} times the median]" in TEXT and f"SVD takes {peer:.0f} times as much" in TEXT
    first, median = (steps[-1]["seconds"]["osd_adamw"][key] for key in ("first", "median"))
    assert steps[-1]["model"] == "1b" and first - median < 3 * median
    (seconds,) = [
        row["seconds"] for row in svd if (row["shape"], row["rank"], row["dtype"]) == ([2048, 5461], 128, "float32")
    ]
    ratios = [seconds["torch.linalg.svd"] / seconds[name] for name in ("closed form", "closed form, given R")]
    assert "is {:.0f} times faster than `torch.linalg.svd`, and {:.0f} times".format(*ratios) in TEXT


def test_the_quickstarts_output_is_the_committed_run():
    run = json.loads((RESULTS / "make_quickstart.json").read_text())
    assert f"validation perplexity  {run['perplexity']:.2f} after {run['tokens_seen']:,} tokens" in README
    used, adamw = run["optimizer_state_bytes"] / 2**20, run["adamw_state_bytes"] / 2**20
    assert f"{used:.1f} MiB, AdamW's would be {adamw:.1f} MiB ({used / adamw:.0%})" in README
    assert f"throughput             {run['tokens_per_second']:,.0f} tokens per second" in README


def test_the_figures_of_layerwise_mode_and_of_the_exchange_are_the_committed_ones():
    rows = json.loads((RESULTS / "layerwise_memory.json").read_text())["rows"]
    ordinary, layerwise = (
        next(row for row in rows if row["mode"] == mode and row["micro_batches"] == 1)["peak_live_gradient_bytes"]
        / 2**20
        for mode in ("ordinary", "layerwise")
    )
    assert f"at most {layerwise:.1f} MiB of LLaMA 60M's {ordinary:.1f} MiB" in README
    rows = json.loads((RESULTS / "ddp_exchange.json").read_text())["rows"]
    ratio, sharded = ({row["rank"]: row[key] for row in rows} for key in ("ratio", "fsdp2_ratio"))
    assert f"{ratio[128]:.0%} of all bytes at rank 128 and {ratio[512]:.0%} at rank 512" in README
    said = f"{sharded[128]:.0%} of the bytes that LLaMA 1B's gradients take at rank 128 and {sharded[512]:.0%} at rank"
    assert said in " ".join(README.split())


def test_the_figures_of_llama_7b_are_what_the_shapes_give():
    config = LlamaConfig.from_json_file(ROOT / "examples" / "llama_configs" / "llama_7b.json")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    fixed = sum(p.nbytes for p in model.parameters()) + max(p.nbytes for p in model.parameters())
    lean = {"projection_dtype": "bfloat16"}
    for optim, options, text in (
        ("osd_adamw8bit", {}, "{} GB with\n`osd_adamw8bit`"),
        (
            "osd_adamw8bit",
            {**lean, "projection_optim": "adafactor"},
            "{} GB with `projection_dtype=bfloat16,projection_o",
        ),
        ("osd_lion8bit", lean, "{} GB with\n`osd_lion8bit`"),
    ):
        optimizer = create_osd_optimizer(model, optim, rank=1024, **options)
        assert text.format(f"{(fixed + predicted_state_bytes(optimizer)) / 1e9:.1f}") in README
    # P (n, r) on the right side and AdamW's two moments of it, float32
    sizes = sum(p.shape[1] for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    whole = [3 * 4 * rank * sizes / 1e9 for rank in (128, 512, 1024)]
    assert "they are\n{:.2f}, {:.2f} and {:.2f} GB".format(*whole) in README


def test_the_options_table_is_complete_and_right():
    table = README.split("### Options")[1].split("**What is projected**")[0]
    named = set(re.findall(r"^\| `([a-z_]+)` \|", table, flags=re.MULTILINE))
    assert named == KEYS.keys()
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| `?([^|`]+?)`? \|", table, flags=re.MULTILINE))
    assert float(rows["rank"]) == DEFAULT_RANK
    assert [float(rows[key]) for key in ("alpha", "lambda", "scale", "update_interval")] == [5, 0.1, 1, 200]
    assert rows["subspace"] == DEFAULTS["subspace"] and rows["init"] == DEFAULTS["init"]
    assert all(f"`{name}`" in README for name in PRESETS)
    assert all(f"`{name}`" in README or name.removesuffix(LAYERWISE_SUFFIX) != name for name in OPTIM_NAMES)
    assert f"`{LAYERWISE_SUFFIX}`" in README


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_snippets_are_python(snippet: str):
    ast.parse(snippet)


def test_files_named_in_the_readme_exist():
    for path in set(re.findall(r"\b(?:examples|model_cards)/[\w./]+\.(?:py|json|md|png)", README)):
        assert (ROOT / path).exists(), path
