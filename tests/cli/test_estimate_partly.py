"""`hf-osd estimate` of what it cannot do in whole: the rest is told, or one sentence says why nothing is."""

import json

import pytest
from estimates import SMALL, estimate, refused, report_of
from transformers import AlbertConfig, BertConfig, CLIPConfig, LlamaConfig, MambaConfig, PretrainedConfig, T5Config


T5 = T5Config(vocab_size=200, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
ALBERT = AlbertConfig(**SMALL, embedding_size=32)
MAMBA = MambaConfig(vocab_size=200, hidden_size=64, num_hidden_layers=2)
CLIP = CLIPConfig(
    text_config=SMALL, vision_config={**SMALL, "image_size": 32, "patch_size": 16}, architectures=["CLIPModel"]
)
METHODS = ["adamw_torch_fused", "adamw_bnb_8bit", "galore_adamw", "lora", "subzero", "osd_adamw8bit"]
CHECKPOINTED = [method for method in METHODS if method != "subzero"]
WORDS = ("--rank", "4", "--seq", "32", "--gpu", "24GB")


def saved(config: PretrainedConfig, path, architecture: str | None = None, **changes) -> str:
    """The config in a folder, with `changes` that its class need not accept."""
    config.save_pretrained(path)
    named = {"architectures": [architecture]} if architecture else {}
    text = json.loads((path / "config.json").read_text()) | named | changes
    (path / "config.json").write_text(json.dumps(text))
    return str(path)


@pytest.mark.parametrize(
    ("config", "architecture", "rows", "missing"),
    [
        (T5, "T5ForConditionalGeneration", [METHODS, CHECKPOINTED], []),
        (ALBERT, "AlbertForMaskedLM", [METHODS, []], ["gradient checkpointing: AlbertForMaskedLM does not support"]),
        (
            MAMBA,
            "MambaForCausalLM",
            [[m for m in methods if m != "lora"] for methods in (METHODS, CHECKPOINTED)],
            ["LoRA: peft refuses MambaForCausalLM"],
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Mamba's of its kernels
def test_what_can_be_told_is(config, architecture, rows, missing, capsys, tmp_path):
    words = (saved(config, tmp_path, architecture), *WORDS)
    report = report_of(capsys, *words)
    for checkpointing in (False, True):
        told = [row["method"] for row in report["rows"] if row["gradient_checkpointing"] == checkpointing]
        assert told == rows[checkpointing]
    assert len(report["missing"]) == len(missing)
    assert all(found.startswith(start) for found, start in zip(report["missing"], missing, strict=True))
    assert report["suggestion"]["options"]
    text = estimate(capsys, *words)
    assert all(f"not estimated: {name}" in text for name in report["missing"])
    assert ("\nwith gradient checkpointing\n" in text) == bool(rows[True])


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            BertConfig(**SMALL),
            {"hidden_size": 65},
            "The hidden size (65) is not a multiple of the number of attention",
        ),
        (
            LlamaConfig(**SMALL),
            {"hidden_size": 65},
            "The hidden size (65) is not a multiple of the number of attention",
        ),
        (LlamaConfig(**SMALL), {"hidden_size": "64"}, "'hidden_size' expected int, got str"),
        (CLIP, {}, "CLIPModel could not be run on a batch of `input_ids`: "),
    ],
    ids=["bert", "llama", "string", "clip"],
)
def test_configs_that_do_not_work(config, changes, message, capsys, tmp_path):
    path = saved(config, tmp_path, **changes)
    said = refused(capsys, path, *WORDS)
    assert message in said and (not changes or repr(path) in said)


def test_quantised_weights_are_refused(capsys, tmp_path):
    """Their layers are refused in training: a table of bfloat16 weights would be that of another model."""
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path = saved(LlamaConfig(**SMALL), tmp_path, quantization_config=quantised)
    assert f"{path!r} has quantised weights, which cannot be trained" in refused(capsys, path, *WORDS)
