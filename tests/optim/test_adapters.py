"""OSD beside peft's adapters: whole weights are projected wherever they are, adapters' factors never."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_osd import create_osd_optimizer
from hf_osd.hub import ProjectionState
from hf_osd.optim import select


BLOCK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**BLOCK, vocab_size=80))


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**BLOCK, vocab_size=80))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**BLOCK, num_key_value_heads=2, vocab_size=80))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**BLOCK, num_key_value_heads=2, vocab_size=80, num_local_experts=3))


MLP = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "lora": peft.LoraConfig(r=2, **MLP),
    "dora": peft.LoraConfig(r=2, use_dora=True, **MLP),
    "lora of embeddings": peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(r=2, **MLP),
    "adalora": peft.AdaLoraConfig(total_step=10, **MLP),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=[1, 2]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_factors_are_never_projected_and_a_pure_adapter_says_so(config: str):
    model = peft.get_peft_model(llama(), copy.deepcopy(CONFIGS[config]))
    factors = {name for name, p in model.named_parameters() if p.requires_grad}
    assert factors
    for wanted in ("all-linear", r".*"):
        with pytest.raises(ValueError, match="adapters' factors.* never projected.*adamw_torch.*modules_to_save"):
            select(model, wanted)
    # with a layer unfrozen by hand, inside a wrapper of most methods
    whole = {}
    for name, p in model.named_parameters():
        if "layers.0.self_attn.q_proj." in name and name not in factors and p.is_floating_point() and p.ndim == 2:
            whole[name] = p.requires_grad_(True)
    assert len(whole) == 1
    for wanted in ("all-linear", ["q_proj"], ["layers.0.self_attn.q_proj"], r"model\.layers\.0\..*", r".*"):
        selection = select(model, wanted)
        assert selection.projected.keys() == whole.keys(), wanted
        assert selection.full_size.keys() == factors


def test_injected_adapters_are_found_without_a_peft_model():
    model = llama()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, **MLP), model)
    model.model.layers[1].self_attn.v_proj.weight.requires_grad_(True)
    selection = select(model)
    assert list(selection.projected) == ["model.layers.1.self_attn.v_proj.weight"]
    assert len(selection.full_size) == 2 * 2 * 2 and all("lora" in name for name in selection.full_size)


def test_naming_a_factor_is_refused():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, modules_to_save=["lm_head"], **MLP))
    with pytest.raises(ValueError, match="'lora_A' in `target_modules` is part of an adapter"):
        select(model, ["lm_head", "lora_A"])


COPY = "base_model.model.{}.modules_to_save.default{}.weight"


@pytest.mark.parametrize("wanted", ["all-linear", ["dense"], ["classifier.dense"]])
def test_modules_to_save_are_projected_where_the_rank_is_low(wanted):
    model = peft.get_peft_model(roberta(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    selection = select(model, wanted, rank=4)
    assert list(selection.projected) == [COPY.format("classifier", ".dense")]
    assert COPY.format("classifier", ".out_proj") in selection.full_size  # two rows: no rank is low
    assert not any("original_module" in name for name in selection.full_size)


def test_a_head_of_two_rows_stays_whole_unless_it_is_named():
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler", "classifier"])
    model = peft.get_peft_model(bert(), config)
    assert list(select(model, rank=4).projected) == [COPY.format("bert.pooler", ".dense")]
    assert list(select(model, ["classifier"], rank=4).projected) == [COPY.format("classifier", "")]


def test_saved_embeddings_stay_whole_and_a_saved_output_head_is_projected():
    config = peft.LoraConfig(r=2, modules_to_save=["lm_head", "embed_tokens", "up_proj"], **MLP)
    model = peft.get_peft_model(llama(), config)
    up = [COPY.format(f"model.model.layers.{i}.mlp.up_proj".removeprefix("model."), "") for i in range(2)]
    assert list(select(model, rank=4).projected) == [*up, COPY.format("lm_head", "")]
    assert COPY.format("model.embed_tokens", "") in select(model, rank=4).full_size
    assert list(select(model, exclude_modules=["lm_head"], rank=4).projected) == up


def test_all_but_a_name_is_meant_without_what_peft_adds_to_it():
    config = peft.LoraConfig(r=2, modules_to_save=["lm_head", "up_proj"], **MLP)
    model = peft.get_peft_model(llama(), config)
    found = select(model, r"(?!.*lm_head$).*", rank=4).projected
    assert len(found) == 2 and all("up_proj" in name for name in found)
    full = r"base_model\.model\..*\.layers\.0\..*"
    assert [name for name in select(model, full, rank=4).projected if "layers.0." in name] == [list(found)[0]]
    with pytest.raises(ValueError, match="The model has: act_fn"):
        select(model, ["zzz"])


@pytest.mark.parametrize("wanted", ["all-linear", ["experts"], ["experts.gate_up_proj", "experts.down_proj"]])
def test_experts_beside_adapters_of_their_own(wanted):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    model = peft.get_peft_model(mixtral(), config)
    stacks = {name: p for name, p in model.named_parameters() if p.ndim == 3 and "layers.1." in name}
    assert len(stacks) == 2
    for p in stacks.values():
        p.requires_grad_(True)
    assert select(model, wanted).projected.keys() == stacks.keys()
    with pytest.raises(ValueError, match="Nothing to project"):
        select(model, wanted, exclude_modules=["experts"])
    some = select(model, wanted, exclude_modules=["experts.down_proj"]).projected
    assert len(some) == 1 and all(name.endswith("gate_up_proj") for name in some)


def test_a_step_trains_all_and_the_projection_keeps_its_names():
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"], **MLP)
    model = peft.get_peft_model(llama(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_osd_optimizer(model, rank=4, lr=1e-2, weight_decay=0.0)
    tokens = torch.randint(80, (2, 8))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert list(ProjectionState.from_optimizer(optimizer)) == [COPY.format("lm_head", "")]
