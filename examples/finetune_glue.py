r"""Fine-tunes a classifier on GLUE with OSD, GaLore, LoRA, full AdamW or forward passes alone, on the same data.

What it does: for each task and seed, fine-tunes a sequence-classification model in an ordinary `Trainer`, evaluates it
with the benchmark's metrics, and writes `results.json` and `results.md` (mean and spread over seeds, trained
parameters, optimizer state, peak memory, time) to `--output_dir`. `--method osd|galore|full` trains all weights,
`lora` adapters, `head` the classifier, and `subzero|mezo` all weights without a backward pass; `--trained pooler
classifier` keeps all weights of other names as they are. Everything else is an argument of Trainer (early stopping:
`--early_stopping_patience 3 --load_best_model_at_end true --eval_strategy steps --save_strategy steps`) or of OSD.

What it needs: `pip install ".[examples]"` in a clone. Data is `nyu-mll/glue` from the Hub, or `--data_dir` with
`<task>/train.jsonl` and so on. The first command takes minutes on a laptop, the second one wants a GPU.

    python examples/finetune_glue.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --task mrpc \
        --method osd --rank 128 --osd_preset finetune --learning_rate 1e-4 --num_train_epochs 2 \
        --output_dir runs/mrpc

    python examples/finetune_glue.py --model_name_or_path FacebookAI/roberta-base \
        --task cola sst2 mrpc qqp stsb mnli qnli rte --method osd --rank 128 --osd_preset finetune \
        --learning_rate 3e-5 --num_train_epochs 3 --seeds 1 2 3 --bf16 --output_dir runs/glue
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from extracted_adapters import evaluate_adapters
from finetuning_methods import adamw_with_head, method_options, prepare_model
from glue_metrics import metric_function
from glue_report import GlueRun, finished_run, score_of, write_report
from glue_tasks import TASKS, Task, load_task
from hf_osd import OSDTrainingArguments
from run_report import TrainingClock


SCRIPT_DEFAULTS = {
    "optim": None,  # the method's
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,  # of all steps, as in RoBERTa's fine-tuning (arXiv 1907.11692, table 10)
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
    "train_sampling_strategy": "group_by_length",
    "dataloader_pin_memory": torch.cuda.is_available(),  # torch warns when there is nothing to pin memory for
}


@dataclass
class GlueArguments:
    """Model, tasks and method; everything else is an argument of Trainer or of the optimizer."""

    model_name_or_path: str = field(metadata={"help": "Model on the Hub or in a folder."})
    task: list[str] = field(metadata={"help": f"One or more of {', '.join(TASKS)}.", "nargs": "+"})
    method: str = field(default="osd", metadata={"help": "osd, galore, lora, full, head, subzero or mezo."})
    rank: int | None = field(default=None, metadata={"help": "Rank for osd, galore, lora and subzero. Default: 8."})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's alpha. Default: twice the rank."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Layers that are projected or get adapters: names, or all-linear.", "nargs": "+"},
    )
    head_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "The classifier's learning rate over the rest's, for full. For osd it is --osd_task_head_lr_ratio."
        },
    )
    trained: list[str] | None = field(
        default=None,
        metadata={"help": "Train only parameters whose names hold one of these, as encoder.", "nargs": "+"},
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with <task>/<split>.jsonl or .parquet."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Labelled split to validate on, instead of the benchmark's."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision of the weights: float32 or bfloat16."})
    max_length: int = field(default=128, metadata={"help": "Tokens that an example is cut to."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on a random subset, the same for every seed and method."}
    )
    class_weights: str = field(
        default="none", metadata={"help": "balanced: weight the loss of each class by its inverse frequency."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without improvement to stop after."}
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "One run for each. Default: --seed alone.", "nargs": "+"}
    )
    extract_lora: list[int] | None = field(
        default=None,
        metadata={"help": "Also evaluate LoRA adapters of these ranks, made of the trained weights.", "nargs": "+"},
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.task if name not in TASKS]
        if unknown:
            raise ValueError(f"Unknown --task {', '.join(unknown)}; there are {', '.join(TASKS)}.")
        if self.lora_alpha is not None and self.method != "lora":
            raise ValueError(f"--lora_alpha has no effect with --method {self.method}.")
        if self.trained is not None and self.method in ("head", "lora"):
            raise ValueError(f"--trained has no effect with --method {self.method}, which says itself what it trains.")
        if self.head_lr_ratio is not None and self.method != "full":
            raise ValueError("--head_lr_ratio is for --method full. Of OSD it is --osd_task_head_lr_ratio.")
        if self.extract_lora and self.method == "lora":
            raise ValueError("--extract_lora is for methods that train the weights themselves, not for lora.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, got {self.dtype}.")
        if self.class_weights not in ("none", "balanced"):
            raise ValueError(f"--class_weights must be none or balanced, got {self.class_weights!r}.")
        if self.class_weights == "balanced" and any(not TASKS[name].labels for name in self.task):
            raise ValueError("--class_weights balanced needs classes: stsb is a regression.")


def parse_arguments(argv: list[str] | None) -> tuple[GlueArguments, OSDTrainingArguments]:
    """Parses the command line (`sys.argv` for `None`); the method fills in its optimizer."""
    parser = HfArgumentParser((GlueArguments, OSDTrainingArguments))
    parser.set_defaults(**SCRIPT_DEFAULTS)
    given = vars(parser.parse_args(argv))
    options = method_options(given["method"], given["rank"], given)
    args, training_args = parser.parse_dict(given | options)
    if args.seeds is not None and len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds has duplicates: {args.seeds}.")
    return args, training_args


def tokenize(data: Dataset, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Texts or pairs of texts as token ids of at most `max_length`, with their length."""

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    return data.map(encode, batched=True, remove_columns=list(columns), load_from_cache_file=False)


def balanced_loss(labels: list[int], num_labels: int):
    """Cross entropy with classes weighted by inverse frequency, as `compute_loss_func` of a Trainer."""
    counts = torch.bincount(torch.tensor(labels), minlength=num_labels)
    if (counts == 0).any():
        missing = [label for label, count in enumerate(counts.tolist()) if not count]
        raise ValueError(f"--class_weights balanced: no training examples for classes {missing}.")
    weights = len(labels) / (num_labels * counts)

    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, weights.to(outputs["logits"]))

    return loss


def load_model(name_or_path: str, task: Task, dtype: str) -> PreTrainedModel:
    """The pretrained model with a new classifier, whose outputs are named after the task's labels."""
    if task.labels:
        labels = dict(enumerate(task.labels))
        outputs: dict[str, Any] = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    else:
        outputs = {"num_labels": 1, "problem_type": "regression"}
    # A classifier of another task, with other outputs, is replaced too; transformers says so.
    return AutoModelForSequenceClassification.from_pretrained(
        name_or_path, dtype=getattr(torch, dtype), ignore_mismatched_sizes=True, **outputs
    )


def run_task(name: str, args: GlueArguments, training_args: OSDTrainingArguments) -> list[GlueRun]:
    """All seeds of one task."""
    task = TASKS[name]
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    with training_args.main_process_first(desc="preparing the data"):
        train, validation = load_task(name, args.data_dir, args.validation_split, args.max_train_samples)
        train = tokenize(train, task.columns, tokenizer, args.max_length)
        validation = {
            split: tokenize(data, task.columns, tokenizer, args.max_length) for split, data in validation.items()
        }
    compute_metrics, source = metric_function(name)
    runs = []
    for seed in args.seeds or [training_args.seed]:
        own = copy.copy(training_args)
        own.seed, own.output_dir = seed, str(Path(training_args.output_dir, name, f"seed-{seed}"))
        set_seed(seed)  # before the classifier's weights are drawn
        model = load_model(args.model_name_or_path, task, args.dtype)
        base = copy.deepcopy(model) if args.extract_lora else None
        model = prepare_model(
            model,
            args.method,
            own,
            rank=args.rank,
            lora_alpha=args.lora_alpha,
            target_modules=args.target_modules,
            trained=args.trained,
        )
        clock = TrainingClock()
        patience = args.early_stopping_patience
        trainer = Trainer(
            model=model,
            args=own,
            train_dataset=train,
            eval_dataset=validation if len(validation) > 1 else next(iter(validation.values())),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            compute_loss_func=balanced_loss(train["label"], task.num_labels)
            if args.class_weights == "balanced"
            else None,
            optimizers=(adamw_with_head(model, own, args.head_lr_ratio), None),
            callbacks=[clock] + ([EarlyStoppingCallback(patience)] if patience is not None else []),
        )
        trainer.train(resume_from_checkpoint=own.resume_from_checkpoint)
        if own.save_strategy != "no":
            trainer.save_model()
        runs.append(finished_run(trainer, clock, name, seed, source))
        if base is not None:
            adapters = evaluate_adapters(
                trainer, base.to(trainer.args.device), args.extract_lora, Path(own.output_dir)
            )
            runs[-1].extracted = [entry | {"score": score_of(entry["metrics"])} for entry in adapters]
    return runs


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains and evaluates every task with every seed, writes and prints the results and returns them."""
    args, training_args = parse_arguments(argv)
    runs = [run for name in args.task for run in run_task(name, args, training_args)]
    return write_report(runs, args, training_args)


if __name__ == "__main__":
    main()
