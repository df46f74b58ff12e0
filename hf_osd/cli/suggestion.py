"""What `hf-osd estimate` suggests: options of a Trainer, and for what trl's script can load a command to copy."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..estimate import DTYPES
from ..hub.card.facts import is_causal_lm
from ..optim import OPTIM_NAMES
from ..optim.options.mode import LAYERWISE_SUFFIX
from ..subzero import NAME
from ..trainer.optim_args import parse_optim_args
from .estimate_options import DEFAULT_OPTIM


# Learning rates to start from with a preset, which are AdamW's: README.md, docs/finetuning.md.
PRESET_RATES = {
    "finetune": {"generates": 1e-4, "classifies": 5e-5},
    "pretrain": {"generates": 1e-3, "classifies": 1e-3},
}
# And without one for AdamW, (learning rate, scale): docs/choosing.md, "Fine-tuning".
STARTS = {"generates": (2e-4, 1.0), "classifies": (3e-4, 4.0)}
FROM_SCRATCH = "To train from scratch: estimate again with --preset pretrain."
# And with forward passes alone, whose slopes are not to be clipped: docs/forward_only.md.
FORWARD_ONLY = ["--learning_rate", "1e-6", "--max_grad_norm", "0"]
# Of plain text, so that any tokenizer will do.
DATASET = "stanfordnlp/imdb"
INT8 = "source=activations,weight_dtype=int8"
ADAMW = "adamw_torch_fused"
EXCLUDE = "--osd_exclude_modules"  # of OSDTrainingArguments: scripts that know nothing of hf_osd do not have it


def start_of(model: Any, method: str, given: Mapping[str, Any]) -> tuple[float | None, str]:
    """A learning rate to start a search with and, as text, a scale, where there are runs to take them from."""
    kind = "generates" if re.search("CausalLM|LMHead|ConditionalGeneration", type(model).__name__) else "classifies"
    if not method.startswith("osd_adamw"):
        return None, ""
    if "preset" in given:
        return PRESET_RATES.get(given["preset"], {}).get(kind), ""
    lr, scale = STARTS[kind]
    return lr, "" if "scale" in given else f"scale={scale:g}"


def suggestion(report: dict[str, Any], modules: Any, excluded: Any, model: Any) -> dict[str, Any] | None:
    """What to run of ours: as asked, else with checkpointing, a smaller batch, layerwise or, last, a smaller rank.

    Where none of that fits, forward passes alone.
    """
    ours = [row for row in report["rows"] if row["method"] in OPTIM_NAMES]  # layerwise ones, unasked, are the last
    rank, batch = report["rank"], report["batch"]
    found = next((row for row in ours if row["fits"]), None)
    if found is None and (smaller := [row for row in ours if row["largest_batch"]]):
        found = smaller[-1]
        batch = found["largest_batch"]
    elif found is None and ours[-1]["largest_rank"]:
        found = ours[-1]
        rank = found["largest_rank"]
    elif found is None:
        return _forward_only(report, model)
    given = report["optim_args"] or ""
    lr, scale = start_of(model, found["method"], parse_optim_args(given))
    words = ["--optim", found["method"], *([] if lr is None else ["--learning_rate", f"{lr:g}"])]
    words += ["--optim_args", ",".join(filter(None, [f"rank={rank}", scale, given]))]
    words += ["--optim_target_modules", modules if isinstance(modules, str) else ",".join(modules)]
    if excluded is not None:
        words += [EXCLUDE, excluded if isinstance(excluded, str) else ",".join(excluded)]
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
    words += ["--per_device_train_batch_size", str(batch)]
    loadable = is_causal_lm(model) and EXCLUDE not in words and _can_be_loaded(report["model"])
    if checkpointing or loadable:  # trl's default is to checkpoint
        words += ["--gradient_checkpointing", str(checkpointing)]
    command = None
    if loadable:
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
    else:
        text += [f"  {line}" for line in _advice(report, found["options"])]
    return text


def _advice(report: dict[str, Any], options: str) -> list[str]:
    """What to know before one takes the suggestion."""
    lines = []
    if "--learning_rate" not in options:
        lines.append("The learning rate is yours to choose: docs/choosing.md.")
    elif "preset=" not in options:
        lines.append("The learning rate and the scale are where to start: try a third and three times the rate.")
    if LAYERWISE_SUFFIX in options and "residual=" not in options:
        lines.append("It goes with gradient accumulation if you add residual=none.")
    if "preset=finetune" in options and "residual=none" not in options:
        lines.append(FROM_SCRATCH)
    plain = [row for row in report["rows"] if row["method"] == ADAMW and row["fits"]]
    if any(row["gradient_checkpointing"] <= report["suggestion"]["gradient_checkpointing"] for row in plain):
        lines.append("AdamW fits as well, at full size.")
    return lines


def before_forward_only(report: dict[str, Any]) -> str | None:
    """What to estimate before one takes the suggestion of forward passes alone, which need whole weights."""
    if report["suggestion"]["rank"] is not None or "weight_dtype" in (report["optim_args"] or ""):
        return None
    ours = next(row["method"] for row in report["rows"] if row["method"] in OPTIM_NAMES)
    other = (
        "" if ours.removesuffix(LAYERWISE_SUFFIX) + LAYERWISE_SUFFIX in OPTIM_NAMES else f"--optim {DEFAULT_OPTIM} "
    )
    return f"Or weights in 8 bits, with gradients: estimate again with {other}--layerwise --optim_args {INT8}."
