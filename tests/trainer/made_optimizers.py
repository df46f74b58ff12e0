"""What a Trainer makes by its arguments."""

from transformers import Trainer, TrainingArguments

from hf_osd import OSD
from reference.tiny_models import tiny_llama


def optimizer_of(args: TrainingArguments, trainer: type[Trainer] = Trainer) -> OSD:
    optimizer = trainer(tiny_llama(), args).create_optimizer()
    assert isinstance(optimizer, OSD)
    return optimizer
