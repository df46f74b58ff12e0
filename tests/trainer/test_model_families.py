"""Every family of models: what is projected of it, two steps in a Trainer, and a resume bit for bit."""

import ast
import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

from hf_osd.optim.selection.targets import select
from hf_osd.optim.step.geometry import ProjectedGeometry


H, I, L, V, HEADS, EXPERTS = 32, 48, 2, 80, 4, 3  # noqa: E741 - sizes as in the formulas below
RANK, STEPS, SAVED_AT = 4, 3, 2
SIZES = {"hidden_size": H, "intermediate_size": I, "num_hidden_layers": L, "num_attention_heads": HEADS}
TEXT = SIZES | {"vocab_size": V, "max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": HEADS // 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

SLIM = GROUPED | {"head_dim": H // HEADS}
SPARSE = {"num_experts_per_tok": 1}

ATTENTION, MLP = 4 * H * H, 2 * H * I
GROUPED_ATTENTION, GATED_MLP = 2 * H * H + 2 * H * (H // 2), 3 * H * I  # keys and values of half the heads
# elements and matrices that are projected
PLAIN = (L * (ATTENTION + MLP), L * 6)
FUSED = (L * (ATTENTION + MLP), L * 4)  # queries, keys and values in one matrix
GATED = (L * (GROUPED_ATTENTION + GATED_MLP), L * 7)
ENCODER_DECODER = (L * (3 * ATTENTION + 2 * MLP), L * 16)
MIXTURE = (L * (GROUPED_ATTENTION + EXPERTS * GATED_MLP), L * (4 + 2 * EXPERTS))  # gate and up in one matrix
SHARED = (L * (GROUPED_ATTENTION + (EXPERTS + 1) * GATED_MLP), L * (4 + 2 * EXPERTS + 3))

DISTILBERT = {"dim": H, "hidden_dim": I, "n_layers": L, "n_heads": HEADS, "vocab_size": V}
GPT2 = {"n_embd": H, "n_inner": I, "n_layer": L, "n_head": HEADS, "vocab_size": V, "n_positions": 64} | IDS
T5 = {"d_model": H, "d_kv": H // HEADS, "d_ff": I, "num_layers": L, "num_heads": HEADS, "vocab_size": V}
WHISPER = IDS | {
    "d_model": H,
    "encoder_ffn_dim": I,
    "decoder_ffn_dim": I,
    "encoder_layers": L,
    "decoder_layers": L,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "vocab_size": V,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 32,
    "decoder_start_token_id": 1,
}
QWEN_MOE = (
    GROUPED | SPARSE | {"num_experts": EXPERTS, "moe_intermediate_size": I, "shared_expert_intermediate_size": I}
)


class Family(NamedTuple):
    """How to build a model, what it reads, and what of it is to be projected."""

    model: type[nn.Module]
    config: Callable[..., Any]
    sizes: dict[str, Any]
    inputs: str
    projected: tuple[int, int]  # elements and matrices
    whole: str  # a layer that stays at full size, as the summary names it


FAMILIES = {
    "bert": Family(hf.BertForSequenceClassification, hf.BertConfig, TEXT, "label", PLAIN, "classifier"),
    "roberta": Family(hf.RobertaForSequenceClassification, hf.RobertaConfig, TEXT, "label", PLAIN, "word_embeddings"),
    "distilbert": Family(
        hf.DistilBertForSequenceClassification, hf.DistilBertConfig, DISTILBERT, "label", PLAIN, "pre_classifier"
    ),
    "gpt2": Family(hf.GPT2LMHeadModel, hf.GPT2Config, GPT2, "tokens", FUSED, "wte"),
    "gpt_neox": Family(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, TEXT, "tokens", FUSED, "lm_head"),
    "llama": Family(hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED, "tokens", GATED, "lm_head"),
    "mistral": Family(hf.MistralForCausalLM, hf.MistralConfig, GROUPED, "tokens", GATED, "lm_head"),
    "qwen2": Family(hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED, "tokens", GATED, "lm_head"),
    "qwen3": Family(hf.Qwen3ForCausalLM, hf.Qwen3Config, SLIM, "tokens", GATED, "lm_head"),
    "gemma2": Family(hf.Gemma2ForCausalLM, hf.Gemma2Config, SLIM | IDS, "tokens", GATED, "embed_tokens"),
    "gemma3": Family(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, SLIM | IDS, "tokens", GATED, "embed_tokens"),
    "phi": Family(hf.PhiForCausalLM, hf.PhiConfig, TEXT | IDS, "tokens", PLAIN, "lm_head"),
    "t5": Family(
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        T5 | {"decoder_start_token_id": 0},
        "tokens",
        ENCODER_DECODER,
        "shared",
    ),
    "vit": Family(
        hf.ViTForImageClassification,
        hf.ViTConfig,
        SIZES | {"image_size": 16, "patch_size": 8},
        "image",
        PLAIN,
        "classifier",
    ),
    "whisper": Family(
        hf.WhisperForConditionalGeneration, hf.WhisperConfig, WHISPER, "sound", ENCODER_DECODER, "conv1"
    ),
    "mixtral": Family(
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        GROUPED | SPARSE | {"num_local_experts": EXPERTS},
        "tokens",
        MIXTURE,
        "lm_head",
    ),
    "qwen2_moe": Family(hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig, QWEN_MOE, "tokens", SHARED, "shared_expert_gate"),
    "gpt_oss": Family(
        hf.GptOssForCausalLM,
        hf.GptOssConfig,
        SLIM | SPARSE | IDS | {"num_local_experts": EXPERTS},
        "tokens",
        MIXTURE,
        "lm_head",
    ),
}
MIXTURES = ("mixtral", "qwen2_moe", "gpt_oss")
IDLE = EXPERTS - 1  # the expert that is given no tokens


class Examples(Dataset):
    def __init__(self, kind: str):
        self.kind = kind

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, V, (12,), generator=generator)
        return {
            "label": {"input_ids": ids, "labels": index % 2},
            "tokens": {"input_ids": ids, "labels": ids},
            "image": {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 2},
            "sound": {"input_features": torch.randn(8, 20, generator=generator), "labels": ids},
        }[self.kind]


def build(family: Family) -> nn.Module:
    hf.set_seed(0)
    model = family.model(family.config(**family.sizes))
    for name, p in model.named_parameters():
        if re.search(r"mlp\.(gate|router)\.(weight|bias)", name):
            # a·h or -a·h is above zero for every h: the two first experts take all tokens
            p.requires_grad_(False)
            p.data[1:] = 0
            p.data[1] = -p.data[0]
    return model


def trainer(family: Family, folder: Path, options: str = "", **more: Any) -> hf.Trainer:
    args = hf.TrainingArguments(
        output_dir=str(folder),
        optim="osd_adamw",
        optim_args=f"rank={RANK},{options}".rstrip(","),
        learning_rate=1e-2,
        weight_decay=0.1,
        max_steps=STEPS,
        save_steps=SAVED_AT,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    examples = Examples(family.inputs)
    return hf.Trainer(build(family), args, train_dataset=examples, eval_dataset=examples)


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_resumes_and_says_what_is_projected(name: str, tmp_path: Path, caplog):
    family = FAMILIES[name]
    elements, matrices = family.projected
    caplog.set_level(logging.INFO, logger="hf_osd")
    run = trainer(family, tmp_path)
    start = {key: p.detach().clone() for key, p in run.model.named_parameters()}
    run.train()
    optimizer = run.optimizer.optimizer
    found = [(optimizer.weight_of(p).geometry, p) for group in optimizer.param_groups for p in group["params"]]
    projected = [(geometry, p) for geometry, p in found if isinstance(geometry, ProjectedGeometry)]

    # the projected share, against the sizes of the configuration
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert sum(p.numel() for _, p in projected) == elements
    assert sum(geometry.matrices for geometry, _ in projected) == matrices
    assert sum(p.numel() for _, p in found) == trainable
    (line,) = [record.getMessage() for record in caplog.records if record.name == "hf_osd"]
    assert "\n" not in line and f"OSD: {matrices} matrices projected to rank {RANK} " in line
    assert f"({elements / 1e6:.1f}M parameters: " in line
    assert f"{(trainable - elements) / 1e6:.1f}M parameters at full size (" in line
    assert family.whole in line.split("at full size")[1]

    # every trainable parameter has moved, but an expert without tokens
    for key, p in run.model.named_parameters():
        if p.requires_grad and not optimizer.weight_of(p).geometry.stacked and p.grad is not None:
            assert not torch.equal(p, start[key]), key
    stacks = [(geometry, p) for geometry, p in projected if geometry.stacked]
    assert len(stacks) == (2 * L if name in MIXTURES else 0)
    for geometry, p in stacks:
        moved = [not torch.equal(p[e], start[geometry.name][e]) for e in range(EXPERTS)]
        assert moved == [True, True, False] and optimizer.state[p]["step"].tolist() == [STEPS, STEPS, 0]
        assert optimizer.state[p]["idle_steps"].tolist()[IDLE] == STEPS
        assert all(not value[IDLE].any() for key, value in optimizer.state[p].items() if key != "idle_steps")

    # the third step after a resume
    checkpoint = tmp_path / f"checkpoint-{SAVED_AT}"
    other = trainer(family, tmp_path)
    other.train(resume_from_checkpoint=str(checkpoint))
    for (key, p), q in zip(run.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), key
    for (_, p), q in zip(found, (q for group in other.optimizer.param_groups for q in group["params"]), strict=True):
        left, right = optimizer.state[p], other.optimizer.optimizer.state[q]
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", ["vit", *MIXTURES])
def test_the_best_model_is_loaded_as_a_whole(name: str, tmp_path: Path):
    more = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": SAVED_AT}
    run = trainer(FAMILIES[name], tmp_path, metric_for_best_model="count", greater_is_better=False, **more)
    evaluate, counted = run.evaluate, itertools.count()
    run.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_count": next(counted)}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{SAVED_AT}")
    best = FAMILIES[name].model.from_pretrained(run.state.best_model_checkpoint)
    last = FAMILIES[name].model.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    moved = 0
    for (key, p), q, other in zip(run.model.named_parameters(), best.parameters(), last.parameters(), strict=True):
        assert torch.equal(p, q), key
        moved += not torch.equal(p, other)
    assert moved > 5


def test_a_checkpoint_without_some_of_the_weights_is_refused(tmp_path: Path):
    family = FAMILIES["mixtral"]
    run = trainer(family, tmp_path)
    run.train()
    path = tmp_path / f"checkpoint-{SAVED_AT}" / "model.safetensors"
    saved = load_file(path)
    del saved["model.layers.0.self_attn.q_proj.weight"]
    save_file(saved, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks model.layers.0.self_attn.q_proj.weight"):
        trainer(family, tmp_path).train(resume_from_checkpoint=str(path.parent))


# One after the other over the families, each with the residual
SUBSPACES = (
    "subspace=online_pca,side=two_sided",
    "subspace=svd,update_interval=2,carry_moments=true",
    "subspace=random,update_interval=2",
    "subspace=cosine,update_interval=2,carry_moments=true",
    "subspace=importance,update_interval=2",
    "subspace=power,carry_moments=true",
    "subspace=static",
)


@pytest.mark.parametrize(("number", "name"), list(enumerate(FAMILIES)))
def test_every_subspace_with_the_residual(number: int, name: str, tmp_path: Path):
    family, options = FAMILIES[name], f"{SUBSPACES[number % len(SUBSPACES)]},residual=scaled"
    run = trainer(family, tmp_path, options=options)
    start = {key: p.detach().clone() for key, p in run.model.named_parameters()}
    run.train()
    optimizer = run.optimizer.optimizer
    for group in optimizer.param_groups:
        for p in group["params"]:
            geometry = optimizer.weight_of(p).geometry
            moved = [not torch.equal(W, V) for W, V in zip(p, start[geometry.name], strict=True)]
            if geometry.stacked:
                assert moved == [True, True, False]  # the last expert has no tokens
            elif p.grad is not None:
                assert any(moved) and p.isfinite().all(), geometry.name
    checkpoint = tmp_path / f"checkpoint-{SAVED_AT}"
    other = trainer(family, tmp_path, options)
    other.train(resume_from_checkpoint=str(checkpoint))
    for (key, p), q in zip(run.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), key


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(8, 6, 5), nn.Linear(6, 10)])


def test_a_convolution_is_no_stack_of_matrices():
    selection = select(Convolution())
    assert list(selection.projected) == ["layers.1.weight"] and "layers.0.weight" in selection.full_size


def test_every_layer_of_experts_in_transformers_is_found_by_its_name():
    """The classes of the installed release that hold 3-D weights of experts: their names must fit the rule."""
    found = []
    for path in (Path(hf.__file__).parent / "models").glob("*/modeling_*moe*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "gate_up_proj = nn.Parameter" in ast.unparse(node):
                found.append(node.name)
    assert len(found) > 10 and [name for name in found if not name.endswith("Experts")] == []
