"""`import hf_osd` and programs that have nothing to do with us: our callbacks leave alone what is not ours."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_osd import OSDCallback
from reference.tiny_models import tiny_llama


class Untouchable:
    """A model or arguments of another library, of which nothing is known."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")


def plain_function(inputs):
    return inputs


def kind(value):
    return type(value).__name__


@pytest.mark.parametrize("model", [Untouchable(), plain_function, None, {"first": nn.Linear(2, 2)}], ids=kind)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD([torch.zeros(2)], 0.1), [], None], ids=kind)
def test_no_event_touches_what_is_not_ours(optimizer, model):
    ours, state, logs = OSDCallback(), TrainerState(global_step=1), {"loss": 1.0}
    events = [name for name in vars(OSDCallback) if name.startswith("on_")]
    assert "on_train_begin" in events
    for event in events:
        args = SimpleNamespace()  # without a single argument
        getattr(ours, event)(args, state, TrainerControl(), model=model, optimizer=optimizer, logs=logs)
    assert logs == {"loss": 1.0}


class Hiding(Trainer):
    """Shows callbacks an object around its model and renames the loss, as SetFit's does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        handler = self.callback_handler
        call, shown = handler.call_event, SimpleNamespace(body=self.model)

        def call_event(event, args, state, control, **kwargs):
            model, handler.model = handler.model, shown
            try:
                return call(event, args, state, control, **kwargs)
            finally:
                handler.model = model

        handler.call_event = call_event

    def log(self, logs, *args, **kwargs):
        super().log({f"embedding_{key}" if key == "loss" else key: value for key, value in logs.items()})


@pytest.fixture
def hiding(tmp_path):
    def make(**given):
        defaults = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_steps": 2}
        defaults |= {"logging_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2}
        rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
        return Hiding(tiny_llama(), TrainingArguments(**defaults | given), train_dataset=rows)

    return make


@pytest.mark.parametrize("optim", ["adamw_torch", "osd_adamw", "osd_adamw_layerwise", "rso_adamw"])
def test_a_trainer_that_hides_its_model_trains(optim, hiding):
    trainer = hiding(optim=optim, optim_args=None if optim == "adamw_torch" else "rank=4")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "embedding_loss" in row]
    assert len(rows) == 2 and all(("osd/pca_loss" in row) == optim.startswith("osd") for row in rows)
