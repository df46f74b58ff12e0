"""The command that `hf-osd estimate` suggests."""

import re
import shlex
from typing import Any

from ..estimate import DTYPES
from ..subzero import NAME
from ..trainer.optim_args import parse_optim_args


# Where a search may start with AdamW, (learning rate, scale): docs/choosing.md, "Fine-tuning".
STARTS = {"generates": (2e-4, 1.0), "classifies": (3e-4, 4.0)}
# And with forward passes alone, whose slopes are not to be clipped: docs/forward_only.md.
FORWARD_ONLY = ["--learning_rate", "1e-6", "--max_grad_norm", "0"]
INT8 = "source=activations,weight_dtype=int8"


def start_of(model: Any) -> tuple[float, float]:
    """A learning rate and a scale to start a search with."""
    generates = re.search("CausalLM|LMHead|ConditionalGeneration", type(model).__name__)
    return STARTS["generates" if generates else "classifies"]


def suggestion(report: dict[str, Any], modules: Any, start: tuple[float, float]) -> dict[str, Any] | None:
    """What to run of ours: as asked, else with checkpointing, a smaller batch or, last, a smaller rank.

    Where none of that fits, forward passes alone. `start` is a learning rate and a scale, for AdamW alone: there are
    no runs to take other rules' from. A preset has a scale, and goes with AdamW's learning rates.
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
            return _forward_only(report)
    checkpointing = found["gradient_checkpointing"]
    given = report["optim_args"] or ""
    keys = parse_optim_args(given)
    known = "adamw" in found["method"] and "preset" not in keys
    scale = f"scale={start[1]:g}" if known and "scale" not in keys else ""
    optim_args = ",".join(filter(None, [f"rank={rank}", scale, given]))
    words = [*_command(report), "--optim", found["method"]]
    words += ["--learning_rate", f"{start[0]:g}"] if known else []
    words += ["--optim_args", optim_args]
    words += ["--optim_target_modules", modules if isinstance(modules, str) else ",".join(modules)]
    words += ["--per_device_train_batch_size", str(batch), *(["--gradient_checkpointing"] if checkpointing else [])]
    return {"rank": rank, "batch": batch, "gradient_checkpointing": checkpointing, "command": shlex.join(words)}


def _forward_only(report: dict[str, Any]) -> dict[str, Any] | None:
    """SubZero, where its forward passes fit."""
    row = next((row for row in report["rows"] if row["method"] == NAME and row["largest_batch"]), None)
    if row is None:
        return None
    batch = min(report["batch"], row["largest_batch"])
    own = ["--optim_args", report["subzero_args"]] if report["subzero_args"] else []
    words = [*_command(report), "--optim", NAME, *own, *FORWARD_ONLY, "--per_device_train_batch_size", str(batch)]
    return {"rank": None, "batch": batch, "gradient_checkpointing": False, "command": shlex.join(words)}


def before_forward_only(report: dict[str, Any]) -> str | None:
    """What to estimate before one takes the suggestion of forward passes alone, which need whole weights."""
    if report["suggestion"]["rank"] is not None or "weight_dtype" in (report["optim_args"] or ""):
        return None
    return f"Or weights in 8 bits, with gradients: estimate again with --layerwise --optim_args {INT8}."


def _command(report: dict[str, Any]) -> list[str]:
    """Its beginning."""
    dtype = str(DTYPES[report["dtype"]]).removeprefix("torch.")
    return ["hf-osd", "run", "train.py", "--model_name_or_path", report["model"], "--dtype", dtype]
