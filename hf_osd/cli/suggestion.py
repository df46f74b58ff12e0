"""What `hf-osd estimate` suggests: options of a Trainer, and for what trl's script can load a command to copy."""

import re
import shlex
from pathlib import Path
from typing import Any

from ..estimate import DTYPES
from ..hub.card.facts import is_causal_lm
from ..subzero import NAME
from ..trainer.optim_args import parse_optim_args


# Where a search may start with AdamW, (learning rate, scale): docs/choosing.md, "Fine-tuning".
STARTS = {"generates": (2e-4, 1.0), "classifies": (3e-4, 4.0)}
# What did better than these, and is counted with what it sets: docs/choosing.md, "Presets".
WITH_PRESET = "Better, at AdamW's learning rates: estimate again with --preset finetune, or pretrain."
# And with forward passes alone, whose slopes are not to be clipped: docs/forward_only.md.
FORWARD_ONLY = ["--learning_rate", "1e-6", "--max_grad_norm", "0"]
# Of plain text, so that any tokenizer will do.
DATASET = "stanfordnlp/imdb"
INT8 = "source=activations,weight_dtype=int8"


def start_of(model: Any) -> tuple[float, float]:
    """A learning rate and a scale to start a search with."""
    generates = re.search("CausalLM|LMHead|ConditionalGeneration", type(model).__name__)
    return STARTS["generates" if generates else "classifies"]


def suggestion(report: dict[str, Any], modules: Any, model: Any) -> dict[str, Any] | None:
    """What to run of ours: as asked, else with checkpointing, a smaller batch or, last, a smaller rank.

    Where none of that fits, forward passes alone. A learning rate and a scale to start with are for AdamW alone: there
    are no runs to take other rules' from. A preset has a scale, and goes with AdamW's learning rates.
    """
    ours = [row for row in report["rows"] if row["method"].startswith("osd_")]
    rank, batch = report["rank"], report["batch"]
    found = next((row for row in ours if row["fits"]), ours[-1])
    if not found["fits"]:
        if found["largest_batch"]:
            batch = found["largest_batch"]
        elif found["largest_rank"]:
            rank = found["largest_rank"]
        else:
            return _forward_only(report, model)
    given = report["optim_args"] or ""
    keys, start = parse_optim_args(given), start_of(model)
    known = "adamw" in found["method"] and "preset" not in keys
    scale = f"scale={start[1]:g}" if known and "scale" not in keys else ""
    words = ["--optim", found["method"], *(["--learning_rate", f"{start[0]:g}"] if known else [])]
    words += ["--optim_args", ",".join(filter(None, [f"rank={rank}", scale, given]))]
    words += ["--optim_target_modules", modules if isinstance(modules, str) else ",".join(modules)]
    return _told(report, model, words, rank, batch, found["gradient_checkpointing"])


def _forward_only(report: dict[str, Any], model: Any) -> dict[str, Any] | None:
    """SubZero, where its forward passes fit."""
    row = next((row for row in report["rows"] if row["method"] == NAME and row["largest_batch"]), None)
    if row is None:
        return None
    own = ["--optim_args", report["subzero_args"]] if report["subzero_args"] else []
    batch = min(report["batch"], row["largest_batch"])
    return _told(report, model, ["--optim", NAME, *own, *FORWARD_ONLY], None, batch, False)


def _told(
    report: dict[str, Any], model: Any, words: list[str], rank: int | None, batch: int, checkpointing: bool
) -> dict[str, Any]:
    """As JSON. `command` is there where it can be copied as it is."""
    # trl's default is to checkpoint
    words += ["--per_device_train_batch_size", str(batch), "--gradient_checkpointing", str(checkpointing)]
    command = None
    if is_causal_lm(model) and _can_be_loaded(report["model"]):
        start = ["hf-osd", "run", "-m", "trl.scripts.sft", "--model_name_or_path", report["model"]]
        start += ["--model_revision", report["revision"]] if report["revision"] else []
        start += ["--dtype", _dtype(report), "--dataset_name", DATASET, "--max_length", str(report["seq"])]
        command = shlex.join([*start, *words, "--output_dir", "out"])
    found = {"rank": rank, "batch": batch, "gradient_checkpointing": checkpointing}
    return {**found, "options": shlex.join(words), "command": command}


def _can_be_loaded(source: str) -> bool:
    """Whether there are weights and a tokenizer, not a config alone; a repository on the Hub is taken to have both."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

    folder = Path(source)
    if not folder.is_dir():
        return not source.endswith(".json")
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    return (folder / "tokenizer_config.json").is_file() and any((folder / name).is_file() for name in names)


def _dtype(report: dict[str, Any]) -> str:
    """As torch calls it."""
    return str(DTYPES[report["dtype"]]).removeprefix("torch.")


def suggestion_text(report: dict[str, Any]) -> list[str]:
    """Its lines."""
    found = report["suggestion"]
    if found is None:
        return ["", f"nothing fits {report['gpu']}"]
    if found["command"] is None:
        kind = f"{_dtype(report)} weights and {report['seq']} tokens"
        text = ["", f"suggested options of a Trainer's script, with {kind}:", f"  {found['options']}"]
    else:
        text = ["", "suggested (it needs trl; put your data in the place of --dataset_name):", f"  {found['command']}"]
    if hint := before_forward_only(report):
        text.append(f"  {hint}")
    elif "--learning_rate" in found["options"] and found["rank"] is not None:
        text.append("  The learning rate and the scale are where to start: try a third and three times the rate.")
        if "source=activations" not in found["options"]:  # which has no residual
            text.append(f"  {WITH_PRESET}")
    return text


def before_forward_only(report: dict[str, Any]) -> str | None:
    """What to estimate before one takes the suggestion of forward passes alone, which need whole weights."""
    if report["suggestion"]["rank"] is not None or "weight_dtype" in (report["optim_args"] or ""):
        return None
    return f"Or weights in 8 bits, with gradients: estimate again with --layerwise --optim_args {INT8}."
