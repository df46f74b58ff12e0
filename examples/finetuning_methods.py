"""The ways to fine-tune that are compared: which optimizer, which weights, and what a rank means for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_osd.optim.factory import decay_groups
from hf_osd.optim.selection.targets import select
from hf_osd.optim.selection.task_heads import task_outputs


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        optim (`str`): Trainer's optimizer unless another one is asked for.
        optims (`str`): What its name must begin with; empty for any that does not project.
        has_rank (`bool`): Whether it has a rank.
    """

    optim: str
    optims: str
    has_rank: bool


METHODS = {
    "osd": Method("osd_adamw", "osd_", True),
    "galore": Method("galore_adamw", "galore_", True),
    "full": Method("adamw_torch_fused", "", False),
    "lora": Method("adamw_torch_fused", "", True),
    "head": Method("adamw_torch_fused", "", False),
    "subzero": Method("subzero", "subzero", True),
    "mezo": Method("subzero", "subzero", False),
}
DEFAULT_RANK = 8
ALL_LINEAR = ["all-linear"]  # the layers unless others are asked for
PROJECTING = ("osd_", "galore_", "apollo_", "subzero")


def method_options(method: str, rank: int | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Trainer that a method determines.

    Args:
        method (`str`): One of `METHODS`.
        rank (`int`, *optional*): r; defaults to 8 where there is one.
        given (`dict`): All arguments of the command line.

    Raises:
        ValueError: For arguments that do not go with the method, and ranks below 1.
    """
    if method not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {method!r}.")
    settings = METHODS[method]
    optim = given["optim"] or settings.optim
    if not (optim.startswith(settings.optims) if settings.optims else not optim.startswith(PROJECTING)):
        raise ValueError(f"--method {method} does not go with --optim {optim}.")
    if not settings.has_rank and rank is not None:
        raise ValueError(f"--rank has no effect with --method {method}: leave it out.")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank must be at least 1, got {rank}.")
    for name in ("osd_rank", "optim_target_modules"):
        if given[name] is not None:
            raise ValueError(
                f"--{name} is set by this script: use --rank, and --target_modules for the layers of every method."
            )
    options: dict[str, Any] = {"optim": optim}
    r = DEFAULT_RANK if rank is None else rank
    if method == "osd":
        options["osd_rank"] = r
    own = {"galore": f"rank={r}", "subzero": f"rank={r}", "mezo": "perturbation=dense"}.get(method)
    if own is not None:
        options["optim_args"] = ",".join(filter(None, (own, given["optim_args"])))
    return options


def prepare_model(
    model: PreTrainedModel,
    method: str,
    args: TrainingArguments,
    *,
    rank: int | None,
    lora_alpha: int | None,
    target_modules: str | list[str],
    trained: list[str] | None = None,
) -> nn.Module:
    """Choose the layers, the same for every method: they are projected, or get adapters.

    Args:
        model (`PreTrainedModel`): As loaded.
        method (`str`): One of `METHODS`.
        args (`TrainingArguments`): Gets the layers where Trainer's own argument holds them.
        rank (`int`, *optional*): r; defaults to 8.
        lora_alpha (`int`, *optional*): LoRA's updates are scaled by `lora_alpha / rank`; defaults to `2 * rank`.
        target_modules (`str` or `list[str]`): As `optim_target_modules`.
        trained (`list[str]`, *optional*): Parameters without any of these in their names are frozen.

    Returns:
        `nn.Module`: The model to train; a `PeftModel` for LoRA.

    Raises:
        ValueError: If one of `trained` is in no name.
    """
    if method == "head":
        model.base_model.requires_grad_(False)
    if trained is not None:
        names = dict(model.named_parameters())
        for part in trained:
            if not any(part in name for name in names):
                raise ValueError(f"--trained {part}: no parameter has it in its name, as {next(iter(names))}.")
        for name, p in names.items():
            p.requires_grad = any(part in name for part in trained)
    if method in ("full", "head", "mezo") or (method == "subzero" and target_modules == ALL_LINEAR):
        return model  # of SubZero that is every matrix, embeddings and heads as well
    if method in ("osd", "subzero"):
        args.optim_target_modules = target_modules
        return model
    names = [name.removesuffix(".weight") for name in select(model, target_modules).projected]
    if method == "galore":
        args.optim_target_modules = names
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    r = DEFAULT_RANK if rank is None else rank
    alpha = 2 * r if lora_alpha is None else lora_alpha
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
    return get_peft_model(model, config)


def adamw_with_head(model: nn.Module, args: TrainingArguments, ratio: float | None) -> torch.optim.AdamW | None:
    """AdamW with another learning rate for the classifier, beside what `preset=finetune` does.

    Args:
        model (`nn.Module`): The model.
        args (`TrainingArguments`): With learning rate, betas, eps and weight decay.
        ratio (`float`, *optional*): The classifier's learning rate over that of the rest.

    Returns:
        `None` without a ratio, for then it is Trainer's own.

    Raises:
        ValueError: If Trainer's optimizer is another one.
    """
    if ratio is None:
        return None
    if args.optim != "adamw_torch_fused":
        raise ValueError(f"--head_lr_ratio is for --optim adamw_torch_fused, not for {args.optim}.")
    head, groups = task_outputs(model), []
    for group in decay_groups(model, args.weight_decay):
        for times, chosen in ((ratio, True), (1, False)):
            params = [p for p in group["params"] if (p in head) == chosen]
            groups.append(group | {"params": params, "lr": times * args.learning_rate})
    groups = [group for group in groups if group["params"]]
    groups.sort(key=lambda group: group["lr"] != args.learning_rate)  # Trainer logs the first one's
    return torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)
