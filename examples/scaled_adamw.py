"""AdamW with multiples of the learning rate for matrices: what OSD would be without a subspace."""

import torch
from torch import nn
from transformers import TrainingArguments


def scaled_adamw(
    model: nn.Module, scale: float | None, ratio: float | None, args: TrainingArguments
) -> torch.optim.AdamW | None:
    """AdamW with these multiples of the learning rate for matrices.

    Args:
        model (`nn.Module`): A LLaMA.
        scale (`float`, *optional*): Of the blocks' matrices; defaults to 1.
        ratio (`float`, *optional*): Of embeddings and head; defaults to 1.
        args (`TrainingArguments`): The run's arguments.

    Returns:
        `None` without either, for then it is Trainer's own.
    """
    if scale is None and ratio is None:
        return None
    if args.optim != "adamw_torch_fused":
        raise ValueError(
            f"--block_scale and --embedding_ratio are for --optim adamw_torch_fused, not for {args.optim}."
        )
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        times = 1 if p.ndim != 2 else scale if ".layers." in name else ratio
        by_rate.setdefault(1 if times is None else times, []).append(p)
    groups = [{"params": params, "lr": times * args.learning_rate} for times, params in by_rate.items()]
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True)
