"""Runs to report about: what stock Trainers of a tiny LLaMA leave behind."""

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from reference.tiny_models import tiny_llama


SECRET = "hf_thisIsNobodysToken"


def train_runs(root: Path) -> dict[str, Path]:
    """OSD with its state saved at the end, and AdamW without."""
    tokens = torch.randint(0, 64, (36, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
    own = {
        "osd": {"optim": "osd_adamw", "optim_args": "rank=4", "learning_rate": 1e-2},
        "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
    }
    for name, given in own.items():
        args = TrainingArguments(
            output_dir=str(root / name),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            max_steps=12,
            save_steps=6,
            logging_steps=2,
            eval_strategy="steps",
            eval_steps=4,
            per_device_train_batch_size=2,
            hub_token=SECRET,
            **given,
        )
        trainer = Trainer(tiny_llama(), args, train_dataset=rows[4:], eval_dataset=rows[:4])
        trainer.train()
        if name == "osd":
            trainer.save_state()
    return {name: root / name for name in own}
