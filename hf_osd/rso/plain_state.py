"""The state dict of a model that is trained with RSO is that of the plain model: W + P B under W's name."""

from typing import Any

import torch
from torch import nn


ADAPTER = "rso"  # name of the adapter in peft's layers


def keep_plain(layer: nn.Module) -> None:
    """Let one LoRA layer of peft's save and load what its `base_layer` alone would."""
    layer.register_state_dict_post_hook(_merge)
    layer.register_load_state_dict_pre_hook(_split)


@torch.no_grad()
def merged_weight(layer: Any) -> torch.Tensor:
    """W + P B, bit for bit what the merge at the end of the interval would give now."""
    return layer.base_layer.weight + layer.get_delta_weight(ADAPTER)


def _merge(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """`q.base_layer.weight`, `q.lora_A.rso.weight`, ... -> `q.weight`."""
    inner = f"{prefix}base_layer."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        if key == f"{inner}weight":
            value = merged_weight(layer)
        if key.startswith(inner):
            state_dict[prefix + key.removeprefix(inner)] = value


def _split(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A plain W is loaded as W, and B = 0: the model then is the one that was saved."""
    if f"{prefix}weight" not in state_dict:  # another shard of the checkpoint has it
        return
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state_dict.pop(key)
    A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    state_dict[f"{prefix}lora_A.{ADAPTER}.weight"] = A.detach()
    state_dict[f"{prefix}lora_B.{ADAPTER}.weight"] = torch.zeros_like(B)
