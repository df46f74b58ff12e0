"""A tiny LLaMA in a stock Trainer, with RSO."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from reference.tiny_models import tiny_llama


class Tokens(Dataset):
    """Sequences that count upwards from a random token: there is something to learn."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = torch.randint(64, (1,), generator=torch.Generator().manual_seed(index))
        ids = (start + torch.arange(16)) % 64
        return {"input_ids": ids, "labels": ids}


def make_trainer(folder: Path, optim: str = "rso_adamw", dtype: torch.dtype = torch.float32, **given: Any) -> Trainer:
    set_seed(0)
    model = given.pop("model", None) or tiny_llama(attention_dropout=0.1).to(dtype)
    defaults = {
        "optim_args": "rank=8,update_interval=4",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 10,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(output_dir=str(folder), optim=optim, **(defaults | given))
    return Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens())


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
