"""Small runs that push to the local Hub, and what of them must be found there: P beside the model of its step."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_osd.hub import ProjectionState
from hf_osd.optim import OSD
from reference import tiny_models


REPO = "tester/run"
OSD_FILES = {"osd_config.json", "osd_projection.safetensors"}
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "training_args.bin"}
STATE_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
CARD_FILES = {"README.md", "osd_loss.png"}  # for people; other tests look at them


class Record(TrainerCallback):
    """The weights and every P after each step, by name."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.projections: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = dict(model.named_parameters())
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in parameters.items()}
        states = {name: getattr(optimizer, "optimizer", optimizer).state[p] for name, p in parameters.items()}
        self.projections[state.global_step] = {
            name: entry["projection"].clone() for name, entry in states.items() if "projection" in entry
        }


class WaitForPushes(TrainerCallback):
    """Steps that take longer than an upload, so that no save finds the push of the one before still under way."""

    trainer: Trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()


def tiny_llama(layers: int = 1) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    return tiny_models.tiny_llama(**sizes, num_hidden_layers=layers)


def rows(count: int = 32) -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 4, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def make_trainer(
    folder: Path | str,
    kind: type[Trainer] = Trainer,
    arguments: type[TrainingArguments] = TrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
    layers: int = 1,
    **given: Any,
) -> Trainer:
    """A Trainer of four steps that saves every second one."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "osd_adamw",
        "optim_args": "rank=4" if arguments is TrainingArguments else None,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "hub_model_id": REPO,
    }
    args = arguments(**{**defaults, **given})
    wait = WaitForPushes()
    trainer = kind(
        tiny_llama(layers), args, train_dataset=rows(), eval_dataset=rows(4), callbacks=[*(callbacks or []), wait]
    )
    wait.trainer = trainer
    return trainer


def step_of(weights: dict[str, Tensor], record: Record) -> int:
    """After which step the model had these weights."""
    found = [
        step
        for step, known in record.weights.items()
        if all(torch.equal(value, known[name]) for name, value in weights.items())
    ]
    assert len(found) == 1 and weights
    return found[0]


def check_set(files: dict[str, bytes], record: Record, scratch: Path, names: set[str]) -> int:
    """Whether these are `names`, with P of the model's step, as the optimizer held it; returns the step."""
    assert files.keys() - CARD_FILES == names
    step = step_of(load_safetensors(files["model.safetensors"]), record)
    for name, content in files.items():
        (scratch / name).write_bytes(content)
    state = ProjectionState.from_pretrained(scratch)  # compares sizes and hashes
    assert state.config["step"] == step
    wanted = record.projections[step]
    assert len(wanted) == 7 and state.keys() == wanted.keys()
    assert all(torch.equal(state[name].projection, P) for name, P in wanted.items())
    if "trainer_state.json" in files:
        assert json.loads(files["trainer_state.json"])["global_step"] == step
    if "optimizer.pt" in files:
        saved = torch.load(scratch / "optimizer.pt", weights_only=True)
        indices = {
            name: index
            for group in saved["param_groups"]
            for name, index in zip(group["param_names"], group["params"], strict=True)
        }
        assert all(torch.equal(saved["state"][indices[name]]["projection"], P) for name, P in wanted.items())
    return step


def folder_of(files: dict[str, bytes], folder: str = "") -> dict[str, bytes]:
    """The files directly in a folder of a repository."""
    start = f"{folder}/" if folder else ""
    inside = {path.removeprefix(start): content for path, content in files.items() if path.startswith(start)}
    return {path: content for path, content in inside.items() if "/" not in path}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


CHECKPOINT_FILES = MODEL_FILES | OSD_FILES | STATE_FILES | {"trainer_state.json"}
ROOT_FILES = MODEL_FILES | OSD_FILES


def projections_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    osd = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(osd, OSD)
    states = {name: osd.state[p] for name, p in model.named_parameters()}
    return {name: state["projection"] for name, state in states.items() if "projection" in state}


class At(TrainerCallback):
    """Does something before a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()
