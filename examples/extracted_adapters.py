"""How good the LoRA adapters are that `hf_osd.extract_lora` makes of a fine-tuned classifier."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_osd import extract_lora


CARRIED = ("auto", "all")  # with norms, biases and the classifier; and with the embeddings too


def evaluate_adapters(trainer: Trainer, base: torch.nn.Module, ranks: list[int], folder: Path) -> list[dict[str, Any]]:
    """Extracts, saves, loads and evaluates an adapter for each rank and each choice of what else it carries.

    Args:
        trainer (`Trainer`): After training; its model is left as it is.
        base (`torch.nn.Module`): The model before training, its classifier included.
        ranks (`list[int]`): Ranks of the adapters.
        folder (`Path`): Where they are saved.

    Returns:
        `list[dict]`: rank, carry, bytes, kept share of the matrices' change (in all and in the worst layer), and
        Trainer's evaluation.
    """
    from peft import PeftModel

    tuned, found = trainer.model, []
    for rank in ranks:
        for carry in CARRIED:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it tells what is left out: the embeddings, as asked
                adapter = extract_lora(tuned, base, rank=rank, carry=carry)
                adapter.save_pretrained(folder / f"rank-{rank}-{carry}")
            trainer.model = PeftModel.from_pretrained(copy.deepcopy(base), folder / f"rank-{rank}-{carry}")
            metrics = trainer.evaluate()
            found.append(
                {
                    "rank": rank,
                    "carry": carry,
                    "bytes": adapter.bytes,
                    "kept": adapter.kept,
                    "kept_in_worst_layer": min(layer.kept for layer in adapter.layers.values()),
                    "metrics": {key: value for key, value in metrics.items() if isinstance(value, float)},
                }
            )
    trainer.model = tuned
    return found
