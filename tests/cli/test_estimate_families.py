"""Models whose attention, scans, labels or indices are their own: predictions against counted allocations."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional
from transformers import (
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    FalconMambaConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    XLNetConfig,
)

from hf_osd.estimate import Parts, Workload, adamw
from hf_osd.estimate.models import inputs_of


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

from allocations import counted  # noqa: E402


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
MLP = SIZES | {"intermediate_size": 128}
GROUPED = MLP | {"num_key_value_heads": 2}
BERT = MLP | {"attention_probs_dropout_prob": 0.0}  # attention with dropout is not fused on CPUs
EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
EXPERTS |= {"n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
JAMBA = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "pad_token_id": 0}
JAMBA |= {"bos_token_id": 1, "eos_token_id": 2}
XLNET = {"vocab_size": 300, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "bos_token_id": 1}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
MULTI = {"problem_type": "multi_label_classification", "num_labels": 5}
FALCONS = {
    "multi_query": FalconConfig(**SIZES, multi_query=True),
    "alibi": FalconConfig(**SIZES, multi_query=False, alibi=True),
    "multi_query_alibi": FalconConfig(**SIZES, multi_query=True, alibi=True),
    "grouped": FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "many_heads": FalconConfig(**SIZES, multi_query=False),
}
SCANS = {
    "mamba": (MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2), "MambaForCausalLM"),
    "falcon_mamba": (FalconMambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2), "FalconMambaForCausalLM"),
    "jamba": (JambaConfig(**GROUPED, **JAMBA), "JambaForCausalLM"),
}
TASKS = {
    "xlnet": (XLNetConfig(**XLNET), "XLNetForSequenceClassification"),
    "xlnet_lm": (XLNetConfig(**XLNET), "XLNetLMHeadModel"),
    "deberta": (DebertaConfig(**MLP, **RELATIVE), "DebertaForSequenceClassification"),
    "deberta_v2": (DebertaV2Config(**MLP, **RELATIVE), "DebertaV2ForSequenceClassification"),
    "llama_without_padding": (LlamaConfig(**GROUPED), "LlamaForSequenceClassification"),
    "gpt2_without_padding": (GPT2Config(**GPT2, eos_token_id=1), "GPT2ForSequenceClassification"),
    "bert_multi_label": (BertConfig(**BERT, **MULTI), "BertForSequenceClassification"),
    "bert_regression": (
        BertConfig(**BERT, num_labels=3, problem_type="regression"),
        "BertForSequenceClassification",
    ),
    "bert_one_number": (BertConfig(**BERT, num_labels=1), "BertForSequenceClassification"),
    "bert_next_sentence": (BertConfig(**BERT), "BertForNextSentencePrediction"),
    "bert_multiple_choice": (BertConfig(**BERT), "BertForMultipleChoice"),
    "bert_answers": (BertConfig(**BERT), "BertForQuestionAnswering"),
    "bert_tokens": (BertConfig(**BERT, num_labels=5), "BertForTokenClassification"),
}


def told_and_seen(
    config: PreTrainedConfig, architecture: str, sequence: int, batch: int = 2, checkpointing: bool = False
) -> tuple[Parts, dict[str, int]]:
    """The parts that are told, and the allocations of three steps with AdamW."""
    config.architectures = [architecture]
    work = Workload(config, torch.float32, sequence, 8)
    told = work.parts(adamw(work.model()), checkpointing, batch)
    inputs = {}
    for name, value in inputs_of(work.model(), batch, sequence).items():
        per_token = name == "labels" and value.shape == (batch, sequence) and "Token" not in architecture
        limit = 300 if name == "input_ids" or per_token else max(2, config.num_labels)
        limit = min(limit, sequence if name.endswith("positions") else limit)
        number = torch.rand(value.shape) if value.is_floating_point() else torch.randint(limit, value.shape)
        inputs[name] = number
    with counted("cpu") as (phase, seen):
        with phase("model"):
            model = getattr(transformers, architecture)._from_config(work.model().config).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for step in range(3):
            with phase(f"forward {step}"):
                loss = model(**inputs).loss
            with phase(f"backward {step}"):
                loss.backward()
            with phase(f"optimizer {step}"):
                optimizer.step()
            with phase(f"end {step}"):
                optimizer.zero_grad()
                del loss
    peak = max(part.peak for part in seen.values()) - seen["model"].start
    kept = seen["forward 2"].end - seen["forward 2"].start
    return told, {"peak": peak, "forward": kept, "told forward": work.run("full", checkpointing, batch).forward}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("sequence", [64, 256])
@pytest.mark.parametrize("kind", FALCONS)
def test_attention_that_no_kernel_fuses_and_masks(kind: str, sequence: int, checkpointing: bool):
    """One head of keys for all has no fused kernel: its (S, S) counts; a mask of booleans becomes one of numbers."""
    told, seen = told_and_seen(FALCONS[kind], "FalconForCausalLM", sequence, checkpointing=checkpointing)
    assert told.peak == pytest.approx(seen["peak"], rel=0.04)
    assert seen["told forward"] == pytest.approx(seen["forward"], rel=0.01)


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_that_are_added_in_place(kind: str):
    """A scan gives a gradient of the whole sequence for each step; autograd adds them up in the first one."""
    told, seen = told_and_seen(*SCANS[kind], sequence=64)
    assert told.peak == pytest.approx(seen["peak"], rel=0.01)
    assert seen["told forward"] == pytest.approx(seen["forward"], rel=0.01)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tasks_and_their_labels(kind: str):
    told, seen = told_and_seen(*TASKS[kind], sequence=64)
    assert told.peak == pytest.approx(seen["peak"], rel=0.01)
    assert seen["told forward"] == pytest.approx(seen["forward"], rel=0.01)


@pytest.mark.parametrize("config", [DeepseekV2Config, DeepseekV3Config])
@pytest.mark.parametrize("sequence", [64, 256])
def test_heads_of_two_sizes(config: type, sequence: int, monkeypatch):
    """DeepSeek's: GPUs have a kernel for them, CPUs none, so it is held against values filled up to one size."""
    plain = functional.scaled_dot_product_attention

    def fused(query, key, value, **options):
        more = query.shape[-1] - value.shape[-1]
        return plain(query, key, functional.pad(value, (0, more)), **options)[..., : value.shape[-1]]

    small = config(**MLP, num_key_value_heads=4, **EXPERTS, **LATENT)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", fused)
    told, seen = told_and_seen(small, config.__name__.replace("Config", "ForCausalLM"), sequence)
    heads = 2 * sequence * 4 * 4  # a float32 number for each token and head
    filled = 2 * heads * (2 * 16 - 12)  # in each of two layers: values and outputs of 16 instead of 12, and a copy
    assert seen["forward"] - filled <= seen["told forward"] <= seen["forward"]
    assert 0.9 * seen["peak"] <= told.peak <= seen["peak"]
