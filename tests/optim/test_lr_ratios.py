"""`task_head_lr_ratio`: the layer that a task adds to a pretrained model, which models have one, and presets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PvtConfig,
    PvtForImageClassification,
    RobertaConfig,
    T5Config,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_osd import OSDTrainingArguments, create_osd_optimizer
from hf_osd.hub.card.facts import CardFacts
from hf_osd.hub.card.section import render_section


SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


UNKNOWN = "No head of a task that is known as one is trained: give `task_head_lr_ratio` 1, or name its layer"


def bert(**changes: Any) -> BertConfig:
    return BertConfig(**SIZES, vocab_size=64, **changes)


def multiplied(model: nn.Module, lr: float = 0.01, **options: Any) -> dict[str, float]:
    """By name, how many times the learning rate each parameter has that has another one."""
    optimizer = create_osd_optimizer(model, rank=4, lr=lr, **options)
    rates = {name: group["lr"] / lr for group in optimizer.param_groups for name in group["param_names"]}
    return {name: round(times, 6) for name, times in rates.items() if times != pytest.approx(1)}


@pytest.mark.parametrize(
    ("load", "config", "names"),
    [
        (AutoModelForSequenceClassification, bert(num_labels=3), {"classifier.weight", "classifier.bias"}),
        (AutoModelForSequenceClassification, bert(num_labels=1), {"classifier.weight", "classifier.bias"}),
        (AutoModelForTokenClassification, bert(num_labels=5), {"classifier.weight", "classifier.bias"}),
        (AutoModelForQuestionAnswering, bert(), {"qa_outputs.weight", "qa_outputs.bias"}),
        (AutoModelForMultipleChoice, bert(), {"classifier.weight", "classifier.bias"}),
        (AutoModelForSequenceClassification, LlamaConfig(**SIZES, vocab_size=64, pad_token_id=0), {"score.weight"}),
        (  # its dense layer is as new, and as any other
            AutoModelForSequenceClassification,
            RobertaConfig(**SIZES, vocab_size=64),
            {"classifier.out_proj.weight", "classifier.out_proj.bias"},
        ),
        (  # which knows of no base model
            AutoModelForQuestionAnswering,
            T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=64),
            {"qa_outputs.weight", "qa_outputs.bias"},
        ),
        (  # spans, whatever the labels of the task before
            AutoModelForQuestionAnswering,
            LlamaConfig(**SIZES, vocab_size=64, num_labels=3),
            {"qa_outputs.weight", "qa_outputs.bias"},
        ),
        (AutoModel, bert(), set()),
        (AutoModelForMaskedLM, bert(), set()),
        (AutoModelForCausalLM, LlamaConfig(**SIZES, vocab_size=64), set()),
    ],
    ids=lambda value: getattr(value, "model_type", getattr(value, "__name__", None)),
)
def test_the_preset_trains_a_task_s_new_layer_faster(load: Any, config: PretrainedConfig, names: set[str]):
    assert multiplied(load.from_config(config), preset="finetune") == dict.fromkeys(names, 64)
    assert multiplied(load.from_config(config), preset="finetune", task_head_lr_ratio=1) == {}
    if names:
        assert multiplied(load.from_config(config), task_head_lr_ratio=8) == dict.fromkeys(names, 8)
    else:
        with pytest.raises(ValueError, match=UNKNOWN):
            multiplied(load.from_config(config), task_head_lr_ratio=8)


def test_of_images_and_of_what_peft_wraps():
    vit = ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3)
    assert set(multiplied(ViTForImageClassification(vit), task_head_lr_ratio=8)) == {
        "classifier.weight",
        "classifier.bias",
    }

    class Timm(nn.Sequential):
        def get_classifier(self) -> nn.Module:
            return self[-1]

    timm = Timm(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)), nn.Linear(16, 3))
    assert set(multiplied(timm, task_head_lr_ratio=8, target_modules=["0.0"])) == {"1.weight", "1.bias"}
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["intermediate.dense"])
    model = peft.get_peft_model(AutoModelForSequenceClassification.from_config(bert()), config)
    names = set(multiplied(model, task_head_lr_ratio=8))
    assert {name.rpartition(".")[2] for name in names} == {"weight", "bias"}
    assert len(names) == 2 and all("classifier" in name and "modules_to_save" in name for name in names)


def test_a_head_is_found_beside_what_only_looks_like_one():
    """A gate of one output, LoRA's factors of as many rows as labels, a table of as many words."""
    peft = pytest.importorskip("peft")
    base = AutoModelForSequenceClassification.from_config(RobertaConfig(**SIZES, vocab_size=64))
    base.gate = nn.Linear(16, 1)
    head = ["classifier.out_proj.weight", "classifier.out_proj.bias"]
    assert list(multiplied(base, task_head_lr_ratio=8)) == head
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], modules_to_save=["classifier", "key"])
    names = list(multiplied(peft.get_peft_model(base, config), task_head_lr_ratio=8))
    assert [name.replace("modules_to_save.default.", "").split("model.")[-1] for name in names] == head

    t5 = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=64)
    config = peft.LoraConfig(target_modules=["q"], modules_to_save=["qa_outputs", "wi"], task_type="QUESTION_ANS")
    model = peft.get_peft_model(AutoModelForQuestionAnswering.from_config(t5), config)
    assert len(multiplied(model, task_head_lr_ratio=8)) == 2

    tied = AutoModelForSequenceClassification.from_config(bert(num_labels=64))
    tied.classifier.weight = tied.bert.embeddings.word_embeddings.weight
    assert list(multiplied(tied, preset="finetune")) == ["classifier.bias"]


def test_a_configuration_without_names_of_labels():
    pvt = PvtForImageClassification(
        PvtConfig(hidden_sizes=[16] * 4, depths=[1] * 4, num_labels=5, num_attention_heads=[1] * 4)
    )
    assert pvt.config.id2label is None
    assert list(multiplied(pvt, task_head_lr_ratio=8)) == ["classifier.weight", "classifier.bias"]
    unnamed = AutoModelForSequenceClassification.from_config(bert())
    unnamed.config.id2label = None
    assert multiplied(unnamed, preset="finetune") == {}


def test_of_several_models_each_has_its_head_and_pretrained_ones_are_not_new():
    several = nn.ModuleList(
        [
            AutoModelForMaskedLM.from_config(bert()),
            AutoModelForSequenceClassification.from_config(bert()),
            AutoModelForNextSentencePrediction.from_config(bert()),
        ]
    )
    assert list(multiplied(several, task_head_lr_ratio=8)) == ["1.classifier.weight", "1.classifier.bias"]


def test_a_pattern_wins_and_both_ratios_go_together():
    model = AutoModelForSequenceClassification.from_config(bert())
    found = multiplied(model, task_head_lr_ratio=8, embedding_lr_ratio=2, lr_pattern=r"classifier\.bias:3")
    assert found.pop("classifier.weight") == 8 and found.pop("classifier.bias") == 3
    assert set(found.values()) == {2} and all("_embeddings.weight" in name for name in found)


def test_a_head_that_is_frozen_is_told():
    model = AutoModelForSequenceClassification.from_config(bert())
    model.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match=UNKNOWN):
        multiplied(model, task_head_lr_ratio=8)
    assert multiplied(model, preset="finetune") == {}
    with pytest.raises(ValueError, match="`task_head_lr_ratio` of create_osd_optimizer must be a number > 0, got 0"):
        multiplied(model, task_head_lr_ratio=0)


class Sentences(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": int(ids.sum()) % 2}


def trainer_of(folder: Path, arguments: type[TrainingArguments] = TrainingArguments, **options: Any) -> Trainer:
    torch.manual_seed(0)
    args = arguments(
        output_dir=str(folder),
        optim="osd_adamw",
        learning_rate=0.01,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    model = AutoModelForSequenceClassification.from_config(bert(attention_probs_dropout_prob=0.0))
    return Trainer(model, args, train_dataset=Sentences())


def test_trainer_logs_the_rate_itself_resumes_and_its_card_tells(tmp_path: Path):
    whole = trainer_of(tmp_path, optim_args="rank=4,preset=finetune")
    whole.train()
    logged = [row["learning_rate"] for row in whole.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    again = trainer_of(tmp_path / "b", OSDTrainingArguments, osd_rank=4, osd_preset="finetune")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    facts = CardFacts.from_run(again.optimizer, again.args, again.state, again.model)
    card = render_section(facts, picture=None, projections=True)
    assert "| task head's over it | 64 |" in card and "task_head_lr_ratio=64" in card
    for frozen, pattern in ((True, ""), (False, ",lr_pattern=classifier:2")):  # which has the last word
        run = trainer_of(tmp_path / "d", optim_args="rank=4,preset=finetune" + pattern)
        run.model.classifier.requires_grad_(not frozen)
        run.create_optimizer()
        assert not CardFacts.from_run(run.optimizer, run.args, run.state, run.model).lr_ratios
    other = trainer_of(
        tmp_path / "c", OSDTrainingArguments, osd_rank=4, osd_preset="finetune", osd_task_head_lr_ratio=1
    )
    with pytest.raises(ValueError, match="(?s)saved by another optimizer.*64 times lr"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
