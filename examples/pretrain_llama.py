r"""Pretrains a LLaMA from scratch with an ordinary `transformers.Trainer`, as in section 5 of arXiv 2408.12857.

What it does: loads text, tokenizes and packs it, trains one of the models in `llama_configs/`, and writes the model,
`results.json` (perplexity, tokens per second, optimizer memory, all losses) and `loss.png` to `--output_dir`.
The optimizer is Trainer's `--optim`: `osd_adamw8bit` for Online Subspace Descent, `rso_adamw` for Randomized Subspace
Optimization, or a baseline: `adamw_torch_fused`, `adamw_bnb_8bit`, or `galore_adamw` with
`--optim_target_modules '.*(self_attn|mlp).*'` and `--optim_args rank=128,scale=0.25,update_proj_gap=200`.

What it needs: `pip install ".[examples]"` in a clone. The small command needs neither a GPU nor a network and takes
about two minutes on two CPU cores; the real one needs a GPU and streams C4 from the Hub.

    python examples/pretrain_llama.py --dataset docstrings --model llama_quickstart --optim osd_adamw8bit \
        --osd_rank 48 --osd_preset pretrain --learning_rate 5e-4 --max_steps 400 --per_device_train_batch_size 4 \
        --eval_steps 200 --output_dir runs/quickstart

    python examples/pretrain_llama.py --dataset allenai/c4 --model llama_60m --optim osd_adamw8bit \
        --osd_rank 128 --osd_preset pretrain --learning_rate 1e-3 --max_steps 10000 --per_device_train_batch_size 64 \
        --gradient_accumulation_steps 8 --eval_steps 1000 --dtype bfloat16 --osd_stochastic_rounding true \
        --output_dir runs/llama_60m

On several GPUs, each with all weights or with a shard of them (see the files for what they say), or on CPUs:

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/pretrain_llama.py \
        --model llama_60m --optim osd_adamw8bit --osd_rank 128 --osd_preset pretrain --learning_rate 1e-3 \
        --bf16 true --output_dir runs/ddp

    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/pretrain_llama.py \
        --model llama_7b --optim osd_adamw8bit --osd_rank 1024 --osd_preset pretrain --learning_rate 3e-4 \
        --gradient_checkpointing true --output_dir runs/fsdp2

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/pretrain_llama.py \
        --dataset docstrings --model llama_quickstart --optim osd_adamw8bit --osd_rank 48 --max_steps 4 \
        --per_device_train_batch_size 2 --use_cpu true --output_dir runs/ddp_cpu

Continue an interrupted run with the same command and `--resume_from_checkpoint true`. A run on one data set compares
optimizers; perplexities of different data sets or tokenizers do not compare.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_osd import OSDTrainingArguments, last_complete_checkpoint
from loss_plot import optimizer_named, save_loss_plot
from packing import collate_blocks, tokenize, training_blocks, validation_blocks
from pretraining_data import TextSplits, load_text
from pretraining_tokenizer import DEFAULT_TOKENIZER, load_tokenizer, trained_tokenizer
from run_report import PerplexityCallback, TrainingClock, build_results, write_results
from scaled_adamw import scaled_adamw


CONFIG_FOLDER = Path(__file__).parent / "llama_configs"
DOCSTRINGS_VOCABULARY = 4096

# Where Trainer's own defaults are made for fine-tuning. Each is an ordinary option of the command line.
SCRIPT_DEFAULTS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # GaLore's and the paper's code: a tenth of all steps
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 0.1,  # of all steps
    "dataloader_pin_memory": torch.cuda.is_available(),  # torch warns when there is nothing to pin memory for
}


@dataclass
class PretrainingArguments:
    """Model and data; everything else is an argument of Trainer or of the optimizer."""

    model: str = field(
        default="llama_60m", metadata={"help": "Name of a file in llama_configs/, or the path of such a file."}
    )
    dataset: str = field(
        default="allenai/c4",
        metadata={
            "help": "Data set on the Hub, local file or folder (.txt .json .jsonl .parquet, or .gz), or `docstrings`."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set; `en` for allenai/c4."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the documents."})
    streaming: bool | None = field(
        default=None, metadata={"help": "Read the data while training. Default: only for allenai/c4."}
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to validate on. Default: `validation` where there is one."}
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "Without a validation split, part of the training documents to hold out. Default: 0.02."},
    )
    max_eval_tokens: int = field(
        default=10_000_000, metadata={"help": "Upper bound of the validation tokens (the paper's number)."}
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens of a packed block."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer on the Hub or in a folder. Default: t5-base, as in the paper."}
    )
    train_tokenizer: int | None = field(
        default=None,
        metadata={"help": "Train a byte-level BPE of this size on the data. Default: 4096 for docstrings."},
    )

    dtype: str = field(
        default="float32", metadata={"help": "Precision of the weights: float32, or bfloat16 as in the paper."}
    )

    block_scale: float | None = field(
        default=None,
        metadata={
            "help": "With adamw_torch_fused: factor on the learning rate of the blocks' matrices, like osd_scale."
        },
    )

    embedding_ratio: float | None = field(
        default=None,
        metadata={
            "help": "With adamw_torch_fused: learning rate of embeddings and head over that of the rest, like "
            "osd_embedding_lr_ratio."
        },
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, got {self.dtype}.")
        if self.tokenizer is not None and self.train_tokenizer is not None:
            raise ValueError("--tokenizer and --train_tokenizer exclude each other: give one of them.")
        if self.sequence_length < 2:
            raise ValueError(f"--sequence_length must be at least 2, got {self.sequence_length}.")
        if self.dataset == "docstrings" and self.tokenizer is None and self.train_tokenizer is None:
            self.train_tokenizer = DOCSTRINGS_VOCABULARY


def parse_arguments(argv: list[str] | None) -> tuple[PretrainingArguments, OSDTrainingArguments]:
    """Parses the command line (`sys.argv` for `None`)."""
    parser = HfArgumentParser((PretrainingArguments, OSDTrainingArguments))
    parser.set_defaults(**SCRIPT_DEFAULTS)
    data_args, training_args = parser.parse_args_into_dataclasses(args=argv)
    if training_args.resume_from_checkpoint == "true":
        training_args.resume_from_checkpoint = True
    return data_args, training_args


def load_model_config(name: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> LlamaConfig:
    """Reads a model configuration and adapts it to the tokenizer.

    Args:
        name (`str`):
            Name of a file in `llama_configs/` without `.json`, or a path.
        tokenizer (`PreTrainedTokenizerBase`):
            Determines the vocabulary's size and the ids of the special tokens.
        sequence_length (`int`):
            Must not exceed the configuration's positions.
    """
    path = CONFIG_FOLDER / f"{name}.json" if "/" not in name and not name.endswith(".json") else Path(name)
    if not path.is_file():
        known = sorted((file.stem for file in CONFIG_FOLDER.glob("*.json")), key=lambda stem: (len(stem), stem))
        raise ValueError(f"--model {name} is neither a file nor one of {', '.join(known)}.")
    config = LlamaConfig.from_json_file(path)
    if sequence_length > config.max_position_embeddings:
        positions = config.max_position_embeddings
        raise ValueError(f"--sequence_length {sequence_length} is more than the {positions} positions of {name}.")
    config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config


def prepare_tokenizer(args: PretrainingArguments, texts: TextSplits) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the arguments name, or trains it on the training documents."""
    if args.train_tokenizer is not None:
        return trained_tokenizer(texts.train, args.text_column, args.train_tokenizer)
    return load_tokenizer(args.tokenizer or DEFAULT_TOKENIZER)


def summary(results: dict[str, Any], output_dir: str) -> str:
    """Returns the closing lines of a run."""
    used, adamw = results["optimizer_state_bytes"], results["adamw_state_bytes"]
    return "\n".join(
        [
            "",
            f"validation perplexity  {results['perplexity']:.2f} after {results['tokens_seen']:,} tokens",
            f"optimizer state        {used / 2**20:.1f} MiB, AdamW's would be {adamw / 2**20:.1f} MiB "
            f"({used / adamw:.0%})",
            f"throughput             {results['tokens_per_second']:,.0f} tokens per second",
            f"peak memory            {results['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"model and checkpoints  {output_dir}",
            *_projections(output_dir),
            f"all figures            {Path(output_dir, 'results.json')}",
            f"picture                {Path(output_dir, 'loss.png')}",
        ]
    )


def _projections(output_dir: str) -> list[str]:
    """The line that says where P is, if a checkpoint holds it."""
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is None or not Path(checkpoint, "osd_config.json").is_file():
        return []
    return [
        f"projections P          {Path(checkpoint, 'osd_projection.safetensors')} (look: hf-osd show {checkpoint})"
    ]


def build_trainer(
    args: PretrainingArguments, training_args: OSDTrainingArguments, callbacks: list[TrainerCallback]
) -> Trainer:
    """Prepares data, tokenizer and model, and puts them into a `Trainer`."""
    with training_args.main_process_first(desc="preparing the data"):
        texts = load_text(
            args.dataset,
            config=args.dataset_config,
            text_column=args.text_column,
            streaming=args.streaming,
            validation_split=args.validation_split,
            validation_fraction=args.validation_fraction,
            seed=training_args.seed,
        )
        tokenizer = prepare_tokenizer(args, texts)
        config = load_model_config(args.model, tokenizer, args.sequence_length)
        train_rows, validation_rows = (tokenize(split, args.text_column, tokenizer) for split in texts)
        train_blocks = training_blocks(train_rows, args.sequence_length)
        eval_blocks = validation_blocks(validation_rows, args.sequence_length, args.max_eval_tokens)

    set_seed(training_args.seed)  # before the weights are drawn
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    own = scaled_adamw(model, args.block_scale, args.embedding_ratio, training_args)
    return Trainer(
        model=model,
        args=training_args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=collate_blocks,
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizers=(own, None),
    )


def report(trainer: Trainer, clock: TrainingClock, args: PretrainingArguments) -> dict[str, Any]:
    """Writes `results.json` and `loss.png`, prints the closing lines and returns the results."""
    results = build_results(
        trainer, clock, model_name=args.model, dataset_name=args.dataset, sequence_length=args.sequence_length
    )
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_results(results, output_dir / "results.json")
        settings = results["settings"]
        save_loss_plot(
            results["log_history"],
            title=f"{args.model} on {args.dataset}",
            subtitle=f"{optimizer_named(settings)}, learning rate {settings['learning_rate']:g}, "
            f"{results['tokens_seen'] / 1e6:.1f}M tokens: perplexity {results['perplexity']:.2f}",
            path=output_dir / "loss.png",
        )
        print(summary(results, trainer.args.output_dir), flush=True)
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, evaluates, saves and reports.

    Args:
        argv (`list[str]`, *optional*):
            The command line; defaults to `sys.argv[1:]`.

    Returns:
        `dict[str, Any]`: the contents of `results.json`.
    """
    args, training_args = parse_arguments(argv)
    clock = TrainingClock()
    trainer = build_trainer(args, training_args, [clock, PerplexityCallback()])
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    state = trainer.state
    if not any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
        trainer.evaluate()
    trainer.save_model()  # with the tokenizer
    results = report(trainer, clock, args)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=args.dataset)
    return results


if __name__ == "__main__":
    main()
