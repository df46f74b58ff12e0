"""The ways to train a whole model that `memory.py` and `training_step.py` compare, each by its name.

A name is that of an optimizer, or `lora`; options of ours, and of peft, follow it as in `optim_args`:
`osd_adamw:source=activations,subspace=random`, `lora:modules_to_save=embed_tokens+lm_head`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, set_seed

import hf_osd
from contenders import LR, galore_group
from hf_osd.optim import select
from hf_osd.trainer.optim_args import parse_optim_args
from shapes import config_file


BASELINE = "adamw_torch_fused"
GALORE = "galore_adamw"
PEERS = (BASELINE, "adamw_bnb_8bit", GALORE, "lora")


def parse_name(name: str) -> tuple[str, dict[str, Any]]:
    """The optimizer and its options."""
    optim, _, options = name.partition(":")
    if optim.startswith("osd_"):
        return optim, parse_optim_args(options)
    return optim, dict(option.split("=") for option in options.split(",") if option)


def load_config(model: str, layers: int = 0) -> PretrainedConfig:
    """That of a file in `llama_configs/`, or of another such file, with this many blocks (0: all)."""
    config = AutoConfig.from_pretrained(config_file(model))
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.use_cache = False
    return config


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model with random weights."""
    set_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def prepare_model(model: torch.nn.Module, name: str, rank: int) -> torch.nn.Module:
    """The model as it is trained: with adapters on all linear layers but the head, for `lora`."""
    optim, options = parse_name(name)
    if optim != "lora":
        return model
    from peft import LoraConfig, get_peft_model

    given: dict[str, Any] = {key: value.split("+") for key, value in options.items()}
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", **given))


@contextmanager
def make_optimizer(model: torch.nn.Module, name: str, rank: int, lr: float = LR) -> Iterator[torch.optim.Optimizer]:
    """The optimizer, as Trainer makes it."""
    params = [p for p in model.parameters() if p.requires_grad]
    optim, options = parse_name(name)
    if optim.startswith("osd_"):
        optimizer = hf_osd.create_osd_optimizer(model, optim, lr=lr, rank=rank, **options)
        yield optimizer
        optimizer.remove()
    elif optim == "adamw_bnb_8bit":
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
        yield bitsandbytes.optim.AdamW8bit(params, lr=lr)
        manager.initialize()  # it knows parameters by their ids, which come again
    elif optim == GALORE:
        from galore_torch import GaLoreAdamW

        projected = {p for p in select(model).projected.values() if p.ndim == 2}
        others = {"params": [p for p in params if p not in projected]}
        yield GaLoreAdamW([galore_group(list(projected), rank), others], lr=lr, no_deprecation_warning=True)
    else:
        yield torch.optim.AdamW(params, lr=lr, fused=True)
