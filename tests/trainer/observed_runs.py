"""Runs of a tiny LLaMA with a file of statistics, and its lines."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_osd.trainer.statistics_file import STATISTICS_NAME, read_lines
from reference.tiny_models import tiny_llama


def make_trainer(folder: Path, **given: Any) -> Trainer:
    """A stock Trainer of 8 steps that logs every second one and saves after four."""
    tokens = torch.randint(0, 64, (32, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "osd_adamw",
        "optim_args": "rank=4",
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
    }
    return Trainer(tiny_llama(), TrainingArguments(**{**defaults, **given}), train_dataset=rows)


def lines(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines(folder / STATISTICS_NAME))
