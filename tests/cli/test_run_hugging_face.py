"""The lines that the documentation names for scripts of Hugging Face: trl's, and those in the shape of run_glue.py."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_osd.cli.main import main
from hf_osd.cli.run import USAGE
from hf_osd.hub import ProjectionState


TEXTS = ["the film is good", "the film is bad", "good and long", "bad and long"] * 4
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<eos>' }}{% endfor %}"
OPTIONS = "--output_dir out --use_cpu --report_to none --max_steps 2 --logging_steps 1 --save_strategy no"
OURS = "--optim osd_adamw8bit --optim_args rank=4,alpha=2 --optim_target_modules all-linear"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tiny models, a conversation and a classification set in the current directory; sys is set back."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT
    sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": 0}
    for name, model in (
        ("llama", LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, eos_token_id=1, bos_token_id=None, **sizes))),
        ("bert", BertForSequenceClassification(BertConfig(max_position_embeddings=32, **sizes))),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    chats = [[{"role": "user", "content": "how is it?"}, {"role": "assistant", "content": text}] for text in TEXTS]
    rows = {"chats": [{"messages": chat} for chat in chats]}
    rows["labelled"] = [{"sentence": text, "label": int("good" in text)} for text in TEXTS]
    for name, found in rows.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / name / "train.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    return tmp_path


SFT = "-m trl.scripts.sft --optim osd_adamw8bit"
SFT_OPTIONS = f"--optim_args rank=4 --model_name_or_path llama --dataset_name chats --max_length 32 {OPTIONS}"


def test_trls_script_runs_by_the_line_in_the_usage(folder):
    pytest.importorskip("trl")
    assert f"hf-osd run {SFT} ..." in USAGE
    main(["run", *shlex.split(SFT), *shlex.split(SFT_OPTIONS.replace("--save_strategy no", "--save_steps 2"))])
    state = ProjectionState.from_pretrained(folder / "out" / "checkpoint-2")
    assert len(state) == 14 and state.config["optim"] == "osd_adamw8bit" and state.config["rank"] == 4
    (row,) = [row for row in logged(folder) if row["step"] == 2 and "loss" in row]
    assert row["loss"] > 0 and "osd/pca_loss" in row
    LlamaForCausalLM.from_pretrained(folder / "out")


@pytest.mark.parametrize("optim", ["osd_adamw8bit", "subzero"])
def test_the_command_that_an_estimate_suggests_runs_as_it_is(optim, folder, capsys):
    """But for the data, a network and a GPU."""
    pytest.importorskip("trl")
    limit = {"osd_adamw8bit": "10MB", "subzero": "0.3MB"}[optim]  # the latter holds little more than the weights
    small = f"llama --rank 4 --seq 32 --batch 2 --gpu {limit} --reserve 0KB --json --subzero_args rank=4"
    main(["estimate", *small.split()])
    command = json.loads(capsys.readouterr().out)["suggestion"]["command"]
    program, *words = shlex.split(command.replace("stanfordnlp/imdb", "chats"))
    assert program == "hf-osd" and f"--optim {optim} " in command
    main([*words, "--use_cpu", "--report_to", "none", "--max_steps", "1", "--save_strategy", "no"])
    args = torch.load(folder / "out" / "training_args.bin", weights_only=False)
    assert (args.optim, args.max_length, args.gradient_checkpointing) == (optim, 32, False)
    trained, base = (LlamaForCausalLM.from_pretrained(folder / name) for name in ("out", "llama"))
    assert trained.dtype == torch.bfloat16 != base.dtype
    (folder / "llama" / "model.safetensors").unlink()
    capsys.readouterr()
    main(["estimate", *small.split()])
    assert json.loads(capsys.readouterr().out)["suggestion"]["command"] is None


def logged(folder) -> list[dict]:
    return json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow  # two processes import everything
def test_trls_script_runs_under_accelerate(folder):
    pytest.importorskip("trl")
    assert f"accelerate launch -m hf_osd run {SFT} ..." in USAGE
    # One process: several on CPUs need MPI there, and torchrun's sometimes hang in gloo's destructor at the very end.
    launch = "-m accelerate.commands.launch --cpu --num_processes 1 -m hf_osd run"
    options = SFT_OPTIONS.replace("--save_strategy no", "--save_steps 2")
    words = shlex.split(f"{launch} {SFT} {options}")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(ProjectionState.from_pretrained(folder / "out" / "checkpoint-2")) == 14


@pytest.mark.distributed
def test_trls_command_trains_in_processes_that_know_the_names(folder):
    pytest.importorskip("trl")
    line = f"-m trl.cli.main sft --optim osd_adamw8bit {SFT_OPTIONS} --num_processes 2 --num_machines 1 --cpu"
    line = line.replace("--save_strategy no", "--save_steps 2")
    words = [sys.executable, "-m", "hf_osd", "run", *shlex.split(line)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(ProjectionState.from_pretrained(folder / "out" / "checkpoint-2")) == 14


# In the shape of the scripts in transformers' examples/pytorch.
RUN_GLUE = """
import os, sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding,
                          HfArgumentParser, Trainer, TrainingArguments, set_seed)


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None)
    max_seq_length: int = field(default=128)


@dataclass
class ModelArguments:
    model_name_or_path: str = field()


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("json", data_files={"train": data_args.train_file})["train"]
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)

    def preprocess(rows):
        return tokenizer(rows["sentence"], max_length=data_args.max_seq_length, truncation=True)

    def compute_metrics(p):
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    data = raw.map(preprocess, batched=True)
    trainer = Trainer(model=model, args=training_args, train_dataset=data if training_args.do_train else None,
                      eval_dataset=data if training_args.do_eval else None, compute_metrics=compute_metrics,
                      processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer))
    if training_args.do_train:
        result = trainer.train()
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
"""
GLUE_OPTIONS = "--model_name_or_path bert --train_file labelled/train.jsonl --do_train --do_eval"


@pytest.mark.parametrize("form", ["flags", "json"])
def test_run_glue_by_the_documented_line(form, folder):
    (folder / "run_glue.py").write_text(RUN_GLUE)
    words = shlex.split(f"{OURS} {GLUE_OPTIONS} {OPTIONS}")
    if form == "json":
        values = {}
        for word in words:
            if word.startswith("--"):
                key = word.removeprefix("--")
                values[key] = True
            else:
                values[key] = int(word) if word.isdigit() else word
        (folder / "arguments.json").write_text(json.dumps(values))
        words = ["arguments.json"]
    main(["run", "run_glue.py", *words])
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in history if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2] and all("osd/pca_loss" in row for row in rows)
    assert 0 <= json.loads((folder / "out" / "eval_results.json").read_text())["eval_accuracy"] <= 1
