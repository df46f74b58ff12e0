"""Models of a few thousand numbers, built from configs, with the same weights at each call."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """
    Two layers of seven matrices each, an embedding and a head.

    Args:
        **changes: Fields of `LlamaConfig` that shall differ.
    """
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
