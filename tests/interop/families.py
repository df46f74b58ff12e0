"""Tiny models of families whose layers an adapter cannot all take in the same way."""

import copy

import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WavLMConfig,
    WavLMForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = SIZES | {"vocab_size": 32, "max_position_embeddings": 16}
TEXT = WORDS | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
EXPERTS = {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
EXPERTS |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = EXPERTS | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
ERNIE = {"moe_intermediate_size": 8, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
JAMBA = {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
PICTURES = {"image_size": 16, "patch_size": 8}
SOUND = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4}
SOUND |= {"num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2}
XLNET = {"vocab_size": 32, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
CLIP = {"text_config": WORDS | {"eos_token_id": 31}, "vision_config": SIZES | PICTURES, "projection_dim": 8}
FALCON = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MAMBA = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
FAMILIES = {
    "beit": lambda: BeitForImageClassification(BeitConfig(**SIZES, **PICTURES, layer_scale_init_value=0.1)),
    "bert_mlm": lambda: BertForMaskedLM(BertConfig(**WORDS)),
    "clip": lambda: CLIPModel(CLIPConfig(**CLIP)),
    "deepseek_v2": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**TEXT, **LATENT)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**TEXT, **LATENT)),
    "ernie4_5_moe": lambda: Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**TEXT, **ERNIE)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**FALCON)),
    "glm4_moe": lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**TEXT, **EXPERTS)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**TEXT, head_dim=8, num_local_experts=4)),
    "jamba": lambda: JambaForCausalLM(JambaConfig(**TEXT, **JAMBA)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "llama4": lambda: Llama4ForCausalLM(Llama4TextConfig(**TEXT, head_dim=8, num_local_experts=2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**MAMBA)),
    "phimoe": lambda: PhimoeForCausalLM(PhimoeConfig(**TEXT, num_local_experts=4)),
    "roberta_mlm": lambda: RobertaForMaskedLM(RobertaConfig(**WORDS, pad_token_id=1)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **PICTURES)),
    "wavlm": lambda: WavLMForSequenceClassification(WavLMConfig(**SIZES, **SOUND)),
    "xlnet": lambda: XLNetForSequenceClassification(XLNetConfig(**XLNET)),
}
FLOAT32 = ("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "jamba", "phimoe")  # of _grouped_mm


def outputs(model: torch.nn.Module) -> torch.Tensor:
    generator, dtype = torch.Generator().manual_seed(1), next(model.parameters()).dtype
    ids = torch.randint(2, 31, (3, 6), generator=generator)
    pictures = torch.randn(3, 3, 16, 16, generator=generator, dtype=dtype)
    sound = torch.randn(3, 400, generator=generator, dtype=dtype)
    inputs = {"input_ids": ids, "pixel_values": pictures, "input_values": sound}
    wanted = {model.main_input_name, *(["pixel_values"] if model.config.model_type == "clip" else [])}
    with torch.no_grad():
        found = model.eval()(**{name: value for name, value in inputs.items() if name in wanted})
    return next(found[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in found)


def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A tuned model, of which every weight changed, and its base."""
    torch.manual_seed(0)
    base = FAMILIES[name]().to(torch.float32 if name in FLOAT32 else torch.float64).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return tuned, base
