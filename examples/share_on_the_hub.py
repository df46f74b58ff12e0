r"""Shares a model together with its learned subspaces, and continues from both in a new process on other text.

What it does: pretrains a LLaMA as `pretrain_llama.py` does and pushes it to the Hub; its projections P go with it. A
new process then downloads both and trains the first steps on text that the model has not seen, three times: with P
from the Hub, with P from the SVD of the first gradient, and with a random P. Everything else is the same. The losses
are printed side by side and written to `continued.json` and `continued.png` in `--output_dir`. P from the Hub need not
be the better start: after 150 steps on docstrings the SVD of the first gradient was, at each of three learning rates.

What it needs: `pip install ".[examples]"` in a clone and a token that may write (`hf auth login`). `HF_ENDPOINT` names
another Hub. Every option of `pretrain_llama.py` is one of this script. The small command takes about five minutes on
two CPU cores, the real one needs a GPU.

    python examples/share_on_the_hub.py --repo_id USER/llama-docstrings --dataset docstrings \
        --model llama_quickstart --osd_rank 32 --learning_rate 2.5e-3 --max_steps 400 \
        --per_device_train_batch_size 4 --output_dir runs/shared

    python examples/share_on_the_hub.py --repo_id USER/llama-60m-c4 --dataset allenai/c4 --model llama_60m \
        --osd_rank 128 --osd_preset pretrain --learning_rate 1e-3 --max_steps 10000 --per_device_train_batch_size 64 \
        --gradient_accumulation_steps 8 --dtype bfloat16 --osd_stochastic_rounding true \
        --continue_dataset Salesforce/wikitext \
        --continue_dataset_config wikitext-103-raw-v1 --continue_steps 100 --output_dir runs/shared_60m

The new process is `python examples/share_on_the_hub.py continue` with the same options; it can be run alone, too.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoTokenizer, HfArgumentParser, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer, set_seed

import pretrain_llama
from hf_osd import OSDTrainingArguments
from hf_osd.hub import ProjectionState
from packing import collate_blocks, tokenize, validation_blocks
from pretrain_llama import PretrainingArguments
from pretraining_data import load_text


# Name of a run -> how its P begins (None: from the Hub), its heading and its colour.
RUNS = {
    "hub": (None, "P from the Hub", "#2f5fa8"),
    "svd": ("svd", "SVD of 1st gradient", "#c4442f"),
    "random": ("orthonormal", "random P", "#6b6b6b"),
}
DEFAULTS = ["--optim", "osd_adamw8bit"]  # an option given twice counts as it was given last
CONTINUED = {
    "lr_scheduler_type": "constant",  # three beginnings are compared: no warmup that would hide them
    "warmup_steps": "0",
    "logging_steps": "1",
    "eval_strategy": "no",
    "save_strategy": "no",
    "push_to_hub": "false",
    "disable_tqdm": "true",
    "report_to": "none",
}


@dataclass
class SharingArguments:
    """Where to share, and what to continue on; everything else is an option of `pretrain_llama.py`."""

    repo_id: str = field(metadata={"help": "Repository to push to, such as user/name; created if need be."})
    continue_dataset: str | None = field(
        default=None,
        metadata={"help": "Data set of the new process. Default: the documents that pretraining has held out."},
    )
    continue_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    continue_text_column: str = field(default="text", metadata={"help": "Its column with the documents."})
    continue_steps: int = field(default=20, metadata={"help": "Steps to compare."})
    continue_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of these steps. Default: the one of pretraining."}
    )


def parse_arguments(argv: list[str]) -> tuple[SharingArguments, list[str]]:
    """Splits a command line into the options of this script and those of `pretrain_llama.py`."""
    parser = HfArgumentParser(SharingArguments, description="All other options are those of pretrain_llama.py.")
    own, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if own.continue_steps < 1:
        raise ValueError(f"--continue_steps must be at least 1, got {own.continue_steps}.")
    return own, [*DEFAULTS, *rest]


def run_arguments(
    own: SharingArguments, rest: list[str], init: str | None
) -> tuple[PretrainingArguments, OSDTrainingArguments]:
    """The arguments of one continued run: those of pretraining but for `CONTINUED`, the steps and P."""
    changes = CONTINUED | {"osd_init": init or own.repo_id, "max_steps": str(own.continue_steps)}
    if own.continue_learning_rate is not None:
        changes["learning_rate"] = str(own.continue_learning_rate)
    options = [text for name, value in changes.items() for text in (f"--{name}", value)]
    return pretrain_llama.parse_arguments([*rest, *options])


def other_text(
    own: SharingArguments, args: PretrainingArguments, tokenizer: PreTrainedTokenizerBase, blocks: int
) -> Dataset:
    """Blocks that the model was not trained on: of another data set, or of what pretraining has held out.

    Args:
        own (`SharingArguments`): Names the other data set, if there is one.
        args (`PretrainingArguments`): The arguments of pretraining.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        blocks (`int`): How many blocks are needed.
    """
    if own.continue_dataset is None:
        column = args.text_column
        documents = load_text(
            args.dataset,
            config=args.dataset_config,
            text_column=column,
            streaming=args.streaming,
            validation_split=args.validation_split,
            validation_fraction=args.validation_fraction,
        ).validation
    else:
        column, config = own.continue_text_column, own.continue_dataset_config
        documents = load_text(own.continue_dataset, config=config, text_column=column, streaming=args.streaming).train
    rows = tokenize(documents, column, tokenizer)
    found = validation_blocks(rows, args.sequence_length, max_tokens=blocks * args.sequence_length)
    if len(found) < blocks:
        raise ValueError(
            f"The text to continue on has {len(found)} blocks of {args.sequence_length} tokens, {blocks} are needed: "
            "lower --continue_steps, raise --validation_fraction, or name another --continue_dataset."
        )
    return found


def continue_once(
    repo_id: str, args: PretrainingArguments, training_args: OSDTrainingArguments, blocks: Dataset
) -> dict[str, list[float]]:
    """Trains the model from the Hub for the first steps; returns the loss and the PCA loss of each."""
    set_seed(training_args.seed)
    model = LlamaForCausalLM.from_pretrained(repo_id, dtype=getattr(torch, args.dtype))
    trainer = Trainer(model=model, args=training_args, train_dataset=blocks, data_collator=collate_blocks)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"loss": [step["loss"] for step in steps], "pca_loss": [step["osd/pca_loss"] for step in steps]}


def fingerprint(state: ProjectionState) -> str:
    """SHA-256 of all P, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].projection.float().numpy().tobytes())
    return digest.hexdigest()


def continue_training(argv: list[str]) -> dict[str, Any]:
    """The new process: knows nothing but the repository, the options and the other text."""
    own, rest = parse_arguments(argv)
    state = ProjectionState.from_pretrained(own.repo_id)
    print(f"From {own.repo_id}: {state}, learned in {state.config['step']} steps.", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(own.repo_id)
    blocks, runs = None, {}
    for name, (init, heading, _) in RUNS.items():
        args, training_args = run_arguments(own, rest, init)
        if blocks is None:
            batch = training_args.train_batch_size * training_args.gradient_accumulation_steps
            blocks = other_text(own, args, tokenizer, own.continue_steps * batch)
        print(f"{own.continue_steps} steps with {heading}", flush=True)
        runs[name] = continue_once(own.repo_id, args, training_args, blocks)
    results = {
        "repo_id": own.repo_id,
        "dataset": own.continue_dataset or f"{args.dataset}, held out",
        "learning_rate": training_args.learning_rate,
        "optim": str(training_args.optim.value),
        "projection": {"step": state.config["step"], "rank": state.config["rank"], "sha256": fingerprint(state)},
        "runs": runs,
    }
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "continued.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    save_plot(results, folder / "continued.png")
    print(f"{table(runs)}\n\nall figures  {folder / 'continued.json'}\npicture      {folder / 'continued.png'}")
    return results


def table(runs: dict[str, dict[str, list[float]]]) -> str:
    """The losses side by side, their mean, and what part of the gradients the subspaces hold."""
    losses = [runs[name]["loss"] for name in RUNS]
    lines = [("step", *(heading for _, heading, _ in RUNS.values()))]
    lines += [(str(i), *(f"{loss:.4f}" for loss in step)) for i, step in enumerate(zip(*losses, strict=True), 1)]
    lines.append(("mean", *(f"{fmean(values):.4f}" for values in losses)))
    inside = [[1 - value for value in runs[name]["pca_loss"]] for name in RUNS]
    lines.append(("inside P, 1st step", *(f"{values[0]:.1%}" for values in inside)))
    lines.append(("inside P, mean", *(f"{fmean(values):.1%}" for values in inside)))
    rows = ["".join([f"{first:<20}", *(f"{cell:>22}" for cell in cells)]) for first, *cells in lines]
    return "\n".join(["", "Loss (nats per token), and the share of the gradients' energy inside the subspaces", *rows])


def save_plot(results: dict[str, Any], path: Path) -> None:
    """Draws the three losses and, because batches differ more than runs do, each run's distance from the SVD's."""
    figure = Figure(figsize=(8, 6.2), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    runs = results["runs"]
    for name, (_, heading, color) in RUNS.items():
        losses = runs[name]["loss"]
        steps = range(1, len(losses) + 1)
        upper.plot(steps, losses, "o-", color=color, markersize=3.5, linewidth=1.4, label=heading)
        differences = [loss - other for loss, other in zip(losses, runs["svd"]["loss"], strict=True)]
        lower.plot(steps, differences, "o-", color=color, markersize=3.5, linewidth=1.4)
    upper.set_title("The first steps on other text", loc="left", fontsize=13, fontweight="bold", pad=24)
    subtitle = f"{results['repo_id']} continued on {results['dataset']}: {results['optim']}, "
    subtitle += f"rank {results['projection']['rank']}, learning rate {results['learning_rate']:g}"
    upper.text(0, 1.04, subtitle, transform=upper.transAxes, fontsize=9, color="#5a5a5a")
    upper.set_ylabel("loss (nats per token)")
    lower.set_ylabel("loss minus the SVD's")
    lower.set_xlabel("step")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    upper.legend(frameon=False)
    figure.savefig(path)


def share(argv: list[str]) -> None:
    """Pretrains and pushes, then lets a new process continue."""
    own, rest = parse_arguments(argv)
    for init, _, _ in RUNS.values():
        run_arguments(own, rest, init)  # what would be refused later is refused now
    pretrain_llama.main([*rest, "--push_to_hub", "true", "--hub_model_id", own.repo_id])
    subprocess.run([sys.executable, str(Path(__file__).resolve()), "continue", *argv], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["continue"]:
        continue_training(sys.argv[2:])
    else:
        share(sys.argv[1:])
