"""`hf-osd estimate`: the report, its JSON, what fits, and what is refused in one sentence."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from estimates import SMALL, estimate, refused, report_of, row_of
from transformers import GPT2Config, LlamaConfig, MixtralConfig, ViTConfig

from hf_osd import create_osd_optimizer
from hf_osd.cli.estimate import usable_memory
from hf_osd.cli.main import main
from hf_osd.estimate import largest, share
from hf_osd.estimate.live_bytes import LiveBytes, meta_device
from hf_osd.estimate.models import load_config, meta_model
from hf_osd.hub import projection_bytes
from hf_osd.optim import predicted_state_bytes, select


CONFIGS = Path(__file__).parents[2] / "examples" / "llama_configs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**SMALL).save_pretrained(path)
    return str(path)


def test_the_report(folder, capsys):
    words = (folder, "--rank", "8", "--layerwise", "--seq", "32", "--batch", "4")
    report = report_of(capsys, *words, "--gpu", "2MB", "--reserve", "0KB")
    others = ["adamw_torch_fused", "adamw_bnb_8bit", "galore_adamw", "lora"]
    ours = "osd_adamw8bit_layerwise"
    assert [row["method"] for row in report["rows"]] == [*others, "subzero", ours, *others, ours]
    model = meta_model(load_config(folder), torch.bfloat16)
    sizes = [p.nbytes for p in model.parameters()]
    ours, plain = row_of(report, "osd_adamw8bit_layerwise"), row_of(report, "adamw_torch_fused")
    assert plain["bytes"]["gradients"] == sum(sizes) and ours["bytes"]["gradients"] == max(sizes)
    assert plain["bytes"]["state"] == 2 * sum(sizes) + 4 * len(sizes) and plain["bytes"]["projection"] == 0
    exact = predicted_state_bytes(create_osd_optimizer(model, "osd_adamw8bit", rank=8))
    assert ours["bytes"]["state"] + ours["bytes"]["projection"] == exact
    assert report["parameters"] == sum(p.numel() for p in model.parameters()) and report["matrices"] == 14
    shapes = [tuple(p.shape) for p in select(model).projected.values()]
    assert report["projection_file_bytes"] == projection_bytes(shapes, 8)
    text = estimate(capsys, *words, "--gpu", "2MB", "--reserve", "0KB")
    assert f"and 32 tokens:\n  {report['suggestion']['options']}\n" in text and "train.py" not in text
    assert "To train from scratch: estimate again with --preset pretrain." in text
    asked = (*words, "--gpu", "2MB", "--reserve", "0KB")
    assert "estimate again with --preset" in estimate(capsys, *asked, "--optim_args", "source=activations")
    for others in (("--preset", "pretrain"), ("--optim_args", "source=activations,weight_dtype=int8")):
        assert "estimate again" not in estimate(capsys, *asked, *others)
    assert f"{report['parameters'] / 1e6:.1f}M parameters" in text
    lines = [line for line in text.splitlines() if line.startswith("osd_adamw8bit_layerwise")]
    assert [line.split()[-2] for line in lines] == [
        "yes" if row_of(report, "osd_adamw8bit_layerwise", on)["fits"] else "no" for on in (False, True)
    ]


@pytest.mark.parametrize("option", ["subspace=random", "projection_dtype=int8"])
def test_files_hold_floats_whatever_P_is_kept_as(option, folder, capsys):
    report = report_of(capsys, folder, "--rank", "8", "--seq", "16", "--optim_args", option)
    shapes = [tuple(p.shape) for p in select(meta_model(load_config(folder), torch.bfloat16)).projected.values()]
    assert report["projection_file_bytes"] == projection_bytes(shapes, 8)


def test_what_each_of_several_processes_holds(folder, capsys):
    """tests/distributed/test_divided.py finds the same in processes."""
    words = (folder, "--rank", "8", "--seq", "32", "--preset", "osd_adamw", "--processes", "4")
    report = report_of(capsys, *words)
    model = meta_model(load_config(folder), torch.bfloat16)
    each = report["each_process"]
    assert each["divided"]["gradients"] == sum(p.nbytes for p in model.parameters()) // 4  # all sizes divide by 4
    inputs = sum(p.shape[1] for p in select(model).projected.values())  # weights are projected on the right
    assert each["whole"]["projection"] == 4 * 8 * inputs == 4 * each["divided"]["projection"]
    counters = 4 * report["matrices"]
    assert each["divided"]["projection_moments"] - counters == 2 * each["divided"]["projection"]
    assert each["divided"]["state"] == each["whole"]["state"]
    assert re.search(
        r"each of 4 processes.*\n.*P's moments\n.*\nP divided .*\nP whole on each ", estimate(capsys, *words)
    )
    assert "--processes is for steps that are not layerwise" in refused(capsys, *words, "--layerwise")
    words += ("--optim_args", "source=activations")
    each = report_of(capsys, *words)["each_process"]
    (names,) = ({name for name, p in select(model).projected.items() if p.ndim == 2},)
    led = [name for name in names if not name.split(".")[-2].startswith(("k_", "v_", "up_"))]  # q's and gate's P
    inputs = sum(model.get_parameter(name).shape[1] for name in led)
    assert each["whole"]["projection"] == 4 * 8 * inputs == 4 * each["divided"]["projection"]
    shapes = [model.get_parameter(name).shape for name in names]
    R = sum((8 + n // 4) * m for m, n in shapes)  # and every fourth column, for the preset's signs
    assert all(n % 4 == 0 for _, n in shapes)
    rest = sum(p.numel() for name, p in model.named_parameters() if name not in names)
    assert each["divided"]["gradients"] == 2 * (R + rest) // 4
    buffers = sum(X.nbytes for X in model.buffers())
    assert each["divided"]["weights"] == sum(p.nbytes for p in model.parameters()) // 4 + buffers
    assert "use DDP" in refused(capsys, *words[:-1], words[-1] + ",weight_dtype=int8")


def test_the_page_on_distributed_training_tells_what_each_of_eight_cards_holds():
    model, told = meta_model(load_config(str(CONFIGS / "llama_7b.json")), torch.bfloat16), []
    for divide in (True, False):
        for rank in (128, 512, 1024):
            each = share(model, create_osd_optimizer(model, rank=rank), 8, divide=divide)
            told.append(f"{(each.projection + each.projection_moments) / 1e9:.2f}")
    page = " ".join((CONFIGS.parents[1] / "docs" / "distributed.md").read_text().split())
    assert "holds {} GB of P and its moments at rank 128, {} GB at 512 and {} GB at 1024".format(*told[:3]) in page
    assert "whole on each they are {}, {} and {} GB".format(*told[3:]) in page


def test_lora_has_a_rank_of_its_own(folder, capsys):
    words = (folder, "--rank", "8", "--seq", "32")
    same, other = report_of(capsys, *words), report_of(capsys, *words, "--lora_rank", "2")
    assert (same["lora_rank"], other["lora_rank"]) == (8, 2)
    for method in ("galore_adamw", "osd_adamw8bit"):
        assert row_of(same, method) == row_of(other, method)
    state = [row_of(report, "lora")["bytes"]["state"] for report in (same, other)]
    factors = 2 * 14 * 2  # counters of A and B of 14 layers, 4 bytes each
    assert state[0] - 2 * factors == 4 * (state[1] - 2 * factors)
    assert "LoRA 2, AdamW" in estimate(capsys, *words, "--lora_rank", "2")
    assert "--lora_rank must be at least 1, got 0" in refused(capsys, *words, "--lora_rank", "0")


def test_what_fits_is_the_largest_that_does(folder, capsys):
    """Estimated anew, the largest rank and batch fit, and the next ones do not."""

    def peak(rank: int, batch: int, row: dict) -> int:
        report = report_of(capsys, *words[:3], "--rank", str(rank), "--batch", str(batch), "--seq", "64")
        return row_of(report, row["method"], row["gradient_checkpointing"])["bytes"]["peak"]

    words = (folder, "--preset", "osd_adamw", "--seq", "64", "--batch", "2", "--gpu", "1.95MB", "--reserve", "100KB")
    report = report_of(capsys, *words, "--rank", "8")
    ours = row_of(report, "osd_adamw", True)
    assert report["usable_bytes"] == 1_850_000
    batch, rank = ours["largest_batch"], ours["largest_rank"]
    assert batch > 2 and 8 < rank < 64
    assert peak(8, batch, ours) <= 1_850_000 < peak(8, batch + 1, ours)
    assert peak(rank, 2, ours) <= 1_850_000 < peak(rank + 1, 2, ours)
    lora = row_of(report, "lora", True)
    assert peak(8, lora["largest_batch"], lora) <= 1_850_000 < peak(8, lora["largest_batch"] + 1, lora)


@pytest.mark.parametrize("looks", [6, 40])
def test_what_fits_is_found_in_few_looks(looks):
    """Of a peak that is a line four to six, of ones with kinks, steps and plateaus never many."""
    shapes = {
        6: [lambda k: 100 + 7 * k, lambda k: 7 * k],
        40: [lambda k: max(50 * k, 900), lambda k: min(50 * k, 900), lambda k: k**2, lambda k: 1000 * (k > 77)],
    }
    for peak in shapes[looks]:
        for memory in (0, 3, 107, 899, 900, 1000, 10**5):
            for first in (1, 8, 300):
                seen: list[int] = []
                found = largest(lambda k: seen.append(k) or peak(k), memory, 300, first)  # noqa: B023
                assert found == max((k for k in range(1, 301) if peak(k) <= memory), default=0)
                assert len(seen) == len(set(seen)) <= looks


def test_what_is_being_run_is_told_on_stderr_and_nothing_is_drawn(folder, capsys):
    main(["estimate", folder, "--rank", "8", "--seq", "8", "--gpu", "1GB", "--reserve", "0KB", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"]
    lines = [line for line in said.err.splitlines() if line.startswith("hf-osd estimate: ")]
    for method in ("adamw_torch_fused", "lora and gradient checkpointing", "osd_adamw8bit"):
        assert f"hf-osd estimate: what fits with {method} ..." in lines
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    with LiveBytes():
        assert torch.randn(3, 2, generator=generator, dtype=torch.float64, device="cpu").shape == (3, 2)
    assert torch.equal(generator.get_state(), state)


def test_a_ratio_without_its_head_is_refused_before_anything_is_counted(folder, capsys):
    with pytest.raises(SystemExit, match="No head of a task that is known as one is trained"):
        main(["estimate", folder, "--rank", "8", "--optim_args", "task_head_lr_ratio=64"])
    assert "on the meta device" not in capsys.readouterr().err


def test_options_of_the_optimizer_count(folder, capsys):
    words = (folder, "--rank", "16", "--seq", "8", "--preset", "osd_adamw")

    def size(*more: str) -> dict:
        return report_of(capsys, *words, *more)["rows"][-1]["bytes"]

    base = size()
    halved = size("--optim_args", "projection_dtype=bfloat16,projection_optim=sgd")
    static = size("--optim_args", "subspace=static")
    assert static["state"] < base["state"] + 60 and static["projection"] * 3 == pytest.approx(
        base["projection"], rel=0.01
    )
    assert halved["projection"] == pytest.approx(
        base["projection"] / 2, rel=0.01
    )  # P 2 bytes and one moment of 4 of 12
    quarter = size("--optim_args", "projection_dtype=int8,projection_optim=sgd,momentum=0")
    assert quarter["projection"] == pytest.approx(static["projection"] * (1 + 4 / 16) / 4, abs=1000)
    random = size("--optim_args", "subspace=random")  # which keeps P beside a seed
    assert random["projection"] == pytest.approx(static["projection"], abs=1000)
    assert size("--optim_args", "residual=scaled")["peak"]
    assert size("--optim_args", "stochastic_rounding=true")["state"] == base["state"]
    assert size("--target_modules", "q_proj")["projection"] < 0.2 * base["projection"]


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, architectures=["GPT2LMHeadModel"]),
        MixtralConfig(**SMALL, num_local_experts=3, num_key_value_heads=2),
        ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config, capsys, tmp_path):
    config.save_pretrained(tmp_path)
    report = report_of(capsys, str(tmp_path / "config.json"), "--rank", "8", "--seq", "16")
    assert report["matrices"] == {"gpt2": 8, "mixtral": 2 * (4 + 2 * 3), "vit": 12}[config.model_type]
    for row in report["rows"]:
        assert row["bytes"]["peak"] > row["bytes"]["weights"] + row["bytes"]["state"] + row["bytes"]["projection"]
        assert row["bytes"]["activations"] > 0


def test_our_config_files_and_a_large_rank(capsys):
    text = estimate(capsys, str(CONFIGS / "llama_quickstart.json"), "--rank", "192", "--seq", "64")
    assert re.search(r"P on the Hub: [\d.]+ MB", text) and "fits" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no/such/model",), "'no/such/model' has no config that could be read"),
        (("missing.json",), "there is no file 'missing.json'"),
        (("{}", "--rank", "65"), "--rank 65 is more than any of the matrices has: give at most 64"),
        (("{}", "--rank", "0"), "--rank must be at least 1, got 0"),
        (("{}", "--preset", "osd_adam8bit"), "Unknown optimizer 'osd_adam8bit'. Did you mean 'osd_adamw8bit'?"),
        (
            ("{}", "--preset", "pretran"),
            "--preset must be one of reference, finetune, pretrain (did you mean 'pretrain'?), got 'pretran'",
        ),
        (("{}", "--optim_args", "projection_dtyp=bfloat16"), "Did you mean `projection_dtype`?"),
        (("{}", "--optim_args", "lambda=-1"), "`lambda` of --optim_args must be a number >= 0, got -1"),
        (("{}", "--optim_args", "rank=4"), "'rank' has no effect in --optim_args of an estimate: use --rank"),
        (
            ("{}", "--rank", "8", "--target_modules", "q_prj"),
            "'q_prj' in `target_modules` matches no module or matrix. Did you mean",
        ),
        (("{}", "--gpu", "24"), "--gpu must be a number with KB, MB, GB, KiB, MiB or GiB, got '24'"),
        (("{}", "--gpu", "infGB"), "--gpu must be a number with KB, MB, GB, KiB, MiB or GiB, got 'infGB'"),
        (("{}", "--gpu", "1GB", "--reserve", "2GB"), "--gpu 1GB leaves nothing beside --reserve 2GB"),
        (("{}", "--reserve", "2GB"), "--reserve is for --gpu"),
        (("{}", "--rank", "8", "--seq", "129"), "--seq 129 is more than the 128 positions of the model"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(words, message, folder, capsys):
    assert message in refused(capsys, *(word.format(folder) for word in words))


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("24gb", 24e9), ("80GiB", 80 * 2**30), ("0.5GiB", 2**29)])
def test_sizes(text, size):
    assert usable_memory(Namespace(gpu=text, reserve="1KB")) == size - 1000
    assert usable_memory(Namespace(gpu="24GB", reserve=None)) == 23e9


def test_learning_from_activations(folder, capsys):
    """By `optim_args`, as for a Trainer: what fits, and the command that trains so."""
    words = (folder, "--rank", "8", "--seq", "64", "--batch", "2", "--preset", "osd_adamw")
    given = (*words, "--optim_args", "source=activations", "--gpu", "2MB", "--reserve", "0KB")
    report, plain = report_of(capsys, *given), report_of(capsys, *words)
    ours, gradients = row_of(report, "osd_adamw"), row_of(plain, "osd_adamw")
    assert ours["bytes"]["weights"] == gradients["bytes"]["weights"]
    assert ours["bytes"]["gradients"] < gradients["bytes"]["gradients"]
    assert row_of(report, "galore_adamw")["bytes"] == row_of(plain, "galore_adamw")["bytes"]
    batch, rank = ours["largest_batch"], ours["largest_rank"]

    def peak(rank: int, batch: int) -> int:
        other = (folder, "--rank", str(rank), "--seq", "64", "--batch", str(batch), *given[7:11])
        return row_of(report_of(capsys, *other), "osd_adamw")["bytes"]["peak"]

    assert peak(8, batch) <= 2_000_000 < peak(8, batch + 1) and peak(rank, 2) <= 2_000_000
    assert "source=activations" in report["suggestion"]["options"]
    spelled = "source=activations,subspace=random,unbiased=true,restart_moments=true,distribution=gaussian"
    same = [(*words[:-2], "--optim", "rso_adamw"), (*words, "--optim_args", spelled)]
    named, spelled_out = (row_of(report_of(capsys, *own), own[8]) for own in same)
    assert named["bytes"] == spelled_out["bytes"]
    model = meta_model(load_config(folder), torch.bfloat16)
    inputs = [p.shape for name, p in select(model).projected.items() if not re.search("k_proj|v_proj|up_proj", name)]
    assert report["projection_file_bytes"] == projection_bytes(inputs, 8, side="right")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("source=activations,residual=scaled",), "`residual` of --optim_args has no effect with source="),
        (("source=activations,subspace=svd",), "subspace='svd' of"),
    ],
)
def test_what_cannot_be_with_activations(more, message, folder, capsys):
    assert message in refused(capsys, folder, "--rank", "8", "--seq", "8", "--optim_args", *more)


def test_models_may_ask_for_the_autocast_of_the_meta_device():
    """As those of transformers 5.3 do, which torch answers with an error."""
    with meta_device():
        assert not torch.is_autocast_enabled("meta")
        with torch.autocast("meta", enabled=False):
            pass
