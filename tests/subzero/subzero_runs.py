"""A tiny LLaMA in a stock Trainer, with SubZero."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from reference.tiny_models import tiny_llama


class Tokens(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def make(folder: Path, dtype: torch.dtype = torch.float32, trainer: Any = {}, **options: Any) -> Trainer:  # noqa: B006
    set_seed(0)
    model = tiny_llama(attention_dropout=0.1).to(dtype)
    defaults = {
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "optim_args": "rank=8,eps=1e-3,update_interval=4",
    }
    defaults |= {"per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    args = TrainingArguments(str(folder), optim="subzero", disable_tqdm=True, **(defaults | options))
    return Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(), **trainer)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


def logged(trainer: Trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row and "train_runtime" not in row]


def same(one: Trainer | nn.Module, other: Trainer | nn.Module) -> bool:
    """Whether two trainings, or a training and a model, have the same weights to the bit."""
    models = [run.model if isinstance(run, Trainer) else run for run in (one, other)]
    return all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))
