"""A Trainer with peft's models: what is trained in full is projected, resumes bit for bit, and the summary tells."""

import logging
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_osd.hub import ProjectionState
from hf_osd.optim.summary import summary


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 80,
}
SAVED_AT, STEPS = 2, 4


class Tokens(Dataset):
    def __init__(self, labels: int | None):
        self.labels = labels

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        ids = torch.randint(80, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids if self.labels is None else index % self.labels}


def trainer(model: nn.Module, folder: Path, labels: int | None, **options) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        optim="osd_adamw8bit",
        optim_args="rank=4",
        learning_rate=1e-2,
        weight_decay=0.1,
        max_steps=STEPS,
        save_steps=SAVED_AT,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(model, args, train_dataset=Tokens(labels))


def adapted_bert() -> nn.Module:
    set_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler", "classifier", "layer.1.output.dense"]
    )
    return peft.get_peft_model(model, config)


def test_resume_is_bit_for_bit_and_the_summary_tells_what_is_projected(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_osd")
    run = trainer(adapted_bert(), tmp_path, labels=3)
    run.train()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "hf_osd"]
    assert line.startswith("OSD: 2 matrices projected to rank 4 (0.0M parameters: dense), ")
    assert "at full size (lora_A, lora_B, classifier, 3 vectors), 0.0M frozen; optimizer state" in line
    names = list(ProjectionState.from_pretrained(tmp_path / f"checkpoint-{SAVED_AT}"))
    assert [name.split(".modules_to_save")[0].split("bert.")[1] for name in names] == [
        "encoder.layer.1.output.dense",
        "pooler",
    ]
    other = trainer(adapted_bert(), tmp_path, labels=3)
    other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED_AT}"))
    for (name, p), q in zip(run.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    one, its = run.optimizer.optimizer, other.optimizer.optimizer
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert {id(p) for group in one.param_groups for p in group["params"]} == {id(p) for p in trained}
    for p, q in zip(one.state, its.state, strict=True):
        assert all(torch.equal(value, its.state[q][name]) for name, value in one.state[p].items())


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(folder)
    return folder


def quantised(folder: Path, bits: int, modules_to_save: list[str] | None) -> nn.Module:
    config = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], modules_to_save=modules_to_save
    )
    return peft.get_peft_model(model, lora)


@pytest.mark.parametrize("bits", [4, 8])
def test_beside_quantised_layers_the_rest_is_projected(bits: int, saved_llama: Path, tmp_path):
    run = trainer(quantised(saved_llama, bits, ["lm_head"]), tmp_path, labels=None)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    line = summary(run.optimizer.optimizer, run.model)
    assert line.startswith("OSD: 1 matrices projected to rank 4 (0.0M parameters: lm_head), ")
    assert "frozen (14 quantised layers)" in line
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_are_refused_with_the_way_out(bits: int, saved_llama: Path, tmp_path):
    way_out = "full precision, without `quantization_config`.*QLoRA"
    run = trainer(quantised(saved_llama, bits, ["lm_head"]), tmp_path, labels=None, optim_target_modules=["q_proj"])
    with pytest.raises(ValueError, match=f"`target_modules` names quantised layers.*{way_out}"):
        run.train()
    run = trainer(quantised(saved_llama, bits, None), tmp_path, labels=None)
    with pytest.raises(ValueError, match=f"Nothing to project: 14 layers are quantised.*{way_out}"):
        run.train()
