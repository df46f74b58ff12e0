"""A model from its config alone, on the meta device, and inputs of the size that is asked for."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.selection.quantised import WAY_OUT


CHOICES = 4  # answers to each question of a multiple choice, as SWAG has
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "bfloat16": torch.bfloat16, "float32": torch.float32}


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever others' code raises of a user's model, as a `ValueError` of one sentence that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a message, or all of it where that one only announces the others."""
    text = str(error).strip() or type(error).__name__
    first = text.split("\n")[0].strip()
    return " ".join((text if first.endswith(":") else first).split())


def load_config(source: str, revision: str | None = None) -> Any:
    """The config of a folder, a `config.json` or a repository on the Hub; nothing else is downloaded.

    Raises:
        ValueError: In one sentence, where there is none, where it cannot be had without a token, where a value in it
            is impossible, and for quantised weights.
    """
    from huggingface_hub.errors import GatedRepoError
    from transformers import AutoConfig

    if source.endswith(".json") and not Path(source).is_file():
        raise ValueError(f"there is no file {source!r}.")
    try:
        config = AutoConfig.from_pretrained(source, **({"revision": revision} if revision else {}))
    except Exception as error:  # a value that its class refuses is no ValueError
        causes = [error, error.__cause__, error.__context__]
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            raise ValueError(
                f"{source!r} is gated: accept its terms on its page on the Hub, then log in with `hf auth login` or "
                "set HF_TOKEN."
            ) from error
        raise ValueError(f"{source!r} has no config that could be read: {_reason(error)}") from error
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{source!r} has quantised weights, which cannot be trained. {WAY_OUT} To estimate the former, take "
            "`quantization_config` out of a copy of its config.json."
        )
    return config


def meta_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model that is trained with this config: its `architectures` where they name one, a causal one else."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    named = getattr(transformers, (config.architectures or [""])[0], None)
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    with torch.device("meta"):
        if named is not None and getattr(named, "config_class", None) is type(config):
            model = named._from_config(config, dtype=dtype)
        else:
            model = auto.from_config(config, dtype=dtype)
    if not all(p.is_meta for p in model.parameters()):  # XLNet's come from torch.FloatTensor, which knows no devices
        model.to("meta", dtype)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # as Trainer does
    if getattr(model.config, "is_encoder_decoder", False) and not hasattr(model.config, "decoder_start_token_id"):
        model.config.decoder_start_token_id = 0  # T5's files may lack it; no token matters here
    classifies = type(model).__name__.endswith("SequenceClassification")
    if classifies and type(config) in AutoModelForCausalLM._model_mapping and model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # they look for the last token that is none of these
    model.train()
    return model


def enable_checkpointing(model: nn.Module) -> None:
    """As `gradient_checkpointing=True` of a Trainer does; there is no random state on the meta device to keep."""
    # its name from transformers 5.23 on
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})


def disable_checkpointing(model: nn.Module) -> None:
    """Undo that, or do nothing."""
    disable: Any = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()


def inputs_of(model: nn.Module, batch: int, sequence: int) -> dict[str, Tensor]:
    """A batch on the meta device: `sequence` tokens each with labels, or pictures of the model's own size.

    Raises:
        ValueError: For a sequence that is longer than the model's positions, and for models of neither.
    """
    config: Any = model.config
    kind = getattr(model, "main_input_name", "input_ids")
    if kind == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
        return {kind: torch.empty(batch, config.num_channels, *size, device="meta", dtype=model.dtype)}  # type: ignore
    if kind != "input_ids":
        raise ValueError(f"{type(model).__name__} takes `{kind}`: only models of text and pictures can be estimated.")
    positions = getattr(config, "max_position_embeddings", None) or sequence
    if sequence > positions > 0:  # -1 of XLNet: any number
        raise ValueError(f"--seq {sequence} is more than the {positions} positions of the model.")
    choices = [CHOICES] if type(model).__name__.endswith("MultipleChoice") else []
    ids = torch.empty(batch, *choices, sequence, dtype=torch.long, device="meta")
    names = inspect.signature(model.forward).parameters
    found = {"input_ids": ids, "labels": _labels(model, ids)}
    found |= dict.fromkeys(("start_positions", "end_positions"), torch.empty_like(ids[:, 0]))
    return {name: value for name, value in found.items() if name in names}


def _labels(model: nn.Module, ids: Tensor) -> Tensor:
    """A label for each token, for each sequence, or a number for each of a sequence's labels."""
    config: Any = model.config
    if not re.search("SequenceClassification$|SequencePrediction$|SentencePrediction$|Choice$", type(model).__name__):
        return torch.empty_like(ids)
    several = (config.num_labels,) if config.num_labels > 1 else ()
    if getattr(config, "problem_type", None) in ("multi_label_classification", "regression"):
        return torch.empty(ids.shape[0], *several, device="meta")
    return torch.empty(ids.shape[0], dtype=torch.long, device="meta")
