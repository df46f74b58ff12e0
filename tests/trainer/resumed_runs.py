"""Runs of a small LLaMA whose moments and P are large enough for 8 bits, whole and resumed."""

from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import hf_osd  # noqa: F401 - makes the names of `optim` known


# 96 x 160 matrices at rank 48: moments and P are large enough to be kept in 8 bits
CONFIG = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "attention_dropout": 0.1,  # the random state must continue too
}
STEPS, SAVED_AT = 6, 3


class Tokens(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def make_trainer(folder: Path, optim: str, dtype: torch.dtype = torch.float32, **options) -> Trainer:
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype)
    defaults = {
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "max_steps": STEPS,
        "save_steps": SAVED_AT,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "optim_args": "rank=48",
        "warmup_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(output_dir=str(folder), optim=optim, **(defaults | options))
    return Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens())


def assert_identical(a: Trainer, b: Trainer) -> None:
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    left, right = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    assert left.keys() == right.keys()
    for index, entries in left.items():
        assert entries.keys() == right[index].keys()
        for name, value in entries.items():
            assert value.dtype == right[index][name].dtype and torch.equal(value, right[index][name]), name
    for x, y in zip(a.state.log_history, b.state.log_history, strict=True):
        assert _without_times(x) == _without_times(y)


def _without_times(row: dict) -> dict:
    return {k: v for k, v in row.items() if "train_" not in k and "_per_second" not in k and "runtime" not in k}


def run_twice(folder: Path, optim: str, dtype: torch.dtype = torch.float32, **options) -> tuple[Trainer, Trainer]:
    whole = make_trainer(folder, optim, dtype, **options)
    whole.train()
    resumed = make_trainer(folder, optim, dtype, **options)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AT}"))
    return whole, resumed
