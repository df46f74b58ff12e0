"""Every trl trainer takes the optimizer's name and nothing else: two steps each, with trl's own defaults."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_osd import OSD, OSDTrainingArguments
from hf_osd.hub.card.section import START
from hf_osd.optim.step.geometry import ProjectedGeometry


trl = pytest.importorskip("trl")

PROMPTS = ["the sky is", "two and two make", "grass is", "fire is"]
GOOD = [" blue", " four", " green", " hot"]
BAD = [" red", " five", " blue", " cold"]
LOG_KEYS = {"osd/pca_loss", "osd/orthogonality", "osd/skipped_steps"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Bytes and a few merges."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([p + g for p, g in zip(PROMPTS, GOOD, strict=True)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[type, str]:
    """A tiny language model and a tiny reward model, saved: trl loads reference models by the model's name."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
    )
    found = {}
    for cls in (LlamaForCausalLM, LlamaForSequenceClassification):
        found[cls] = str(tmp_path_factory.mktemp(cls.__name__))
        cls(config).save_pretrained(found[cls])
        tokenizer.save_pretrained(found[cls])
    return found


def rows(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict({name: values * 4 for name, values in columns.items()})


PREFERENCES = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}


def different_letters(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward under which the completions of a tiny random model differ."""
    return [float(len(set(text))) for text in completions]


# Trainer, config, columns, what else the trainer needs and what its config needs beyond the defaults.
CASES: dict[str, tuple[str, str, dict[str, list[Any]], dict[str, Any], dict[str, Any]]] = {
    "sft": ("SFTTrainer", "SFTConfig", {"prompt": PROMPTS, "completion": GOOD}, {}, {}),
    "sft packed": (
        "SFTTrainer",
        "SFTConfig",
        {"text": [p + g for p, g in zip(PROMPTS, GOOD, strict=True)]},
        {},
        {"packing": True, "max_length": 16},
    ),
    "dpo": ("DPOTrainer", "DPOConfig", PREFERENCES, {}, {}),
    "reward": ("RewardTrainer", "RewardConfig", PREFERENCES, {}, {}),
    "kto": (
        "KTOTrainer",
        "KTOConfig",
        {"prompt": PROMPTS, "completion": GOOD[:2] + BAD[2:], "label": [True, True, False, False]},
        {},
        {},
    ),
    "grpo": (
        "GRPOTrainer",
        "GRPOConfig",
        {"prompt": PROMPTS},
        {"reward_funcs": different_letters},
        {"num_generations": 2, "max_completion_length": 4},
    ),
    "rloo": (
        "RLOOTrainer",
        "RLOOConfig",
        {"prompt": PROMPTS},
        {"reward_funcs": different_letters},
        {"num_generations": 2, "max_completion_length": 4},
    ),
}


@pytest.mark.parametrize("case", ["sft", "grpo"])
def test_subzero_takes_losses_that_tell_a_slope(case, folders, tmp_path):
    """SFT's is made outside of the model; it counts tokens once, and its metrics are those of training."""
    trainer_name, config_name, columns, needs, options = CASES[case]
    options = options | {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 2,
        "logging_steps": 1,
    }
    options |= {
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "bf16": False,
        "lr_scheduler_type": "constant",
    }
    logs = []
    for optim, optim_args in (("subzero", "rank=4"), ("adamw_torch", None))[: 2 if case == "sft" else 1]:
        args = getattr(trl, config_name)(
            str(tmp_path), optim=optim, optim_args=optim_args, learning_rate=0.0, **options
        )
        model = folders[LlamaForCausalLM]
        trainer = getattr(trl, trainer_name)(model=model, args=args, train_dataset=rows(**columns), **needs)
        if case == "grpo":
            with pytest.raises(ValueError, match="cannot train with GRPOTrainer, whose loss tells no slope"):
                trainer.train()
            return
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
    for seen, expected in zip(*logs, strict=True):
        assert seen["num_tokens"] == expected["num_tokens"] > 0
        for key in ("loss", "entropy"):
            assert seen[key] == pytest.approx(expected[key], abs=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_two_steps_with_trls_defaults(case, folders, tmp_path):
    trainer_name, config_name, columns, needs, options = CASES[case]
    args = getattr(trl, config_name)(
        output_dir=str(tmp_path),
        optim="osd_adamw8bit",
        optim_args="rank=4",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,  # a rate for reinforcement learning, 1e-6, would be below what float32 shows in two steps
        lr_scheduler_type="constant",
        save_strategy="no",
        per_device_train_batch_size=4,
        **options,
    )
    assert args.bf16 and args.gradient_checkpointing and args.max_grad_norm == 1.0  # trl's choice
    cls = LlamaForSequenceClassification if trainer_name == "RewardTrainer" else LlamaForCausalLM
    before = dict(cls.from_pretrained(folders[cls]).named_parameters())
    trainer = getattr(trl, trainer_name)(model=folders[cls], args=args, train_dataset=rows(**columns), **needs)
    trainer.train()

    osd = trainer.optimizer.optimizer
    assert isinstance(osd, OSD)
    projected = {
        name
        for group in osd.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if isinstance(osd.weight_of(p).geometry, ProjectedGeometry)
    }
    assert len(projected) == 14 and all(".layers." in name for name in projected)  # seven in each of two blocks
    after = dict(trainer.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(p.isfinite().all() for p in after.values())
    assert all(not torch.equal(after[name], before[name]) for name in projected)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row.keys() >= LOG_KEYS for row in logged)
    assert all(row["grad_norm"] > 0 and row["osd/skipped_steps"] == 0 for row in logged)


@pytest.mark.parametrize("optim", ["osd_adamw", "rso_adamw"])
def test_dpo_with_a_synchronized_reference(optim: str, folders, tmp_path):
    options = {"output_dir": str(tmp_path), "optim": optim, "optim_args": "rank=4", "max_steps": 3}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 4}
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "bf16": False}
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(copy.deepcopy(model.state_dict()))

    trainer = trl.DPOTrainer(
        model=folders[LlamaForCausalLM],
        args=trl.DPOConfig(**options, **quiet, **sync, learning_rate=1e-2, lr_scheduler_type="constant"),
        train_dataset=rows(**PREFERENCES),
        callbacks=[Look()],
    )
    start = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    for name, value in trainer.ref_model.state_dict().items():
        torch.testing.assert_close(value, (start[name] + seen[1][name]) / 2)
    assert all(not torch.equal(value, start[name]) for name, value in seen[1].items() if "_proj" in name)


def test_trls_card_at_every_checkpoint_keeps_ours_and_a_users(folders, tmp_path):
    readme, seen = tmp_path / "README.md", []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(readme.read_text())
            if state.global_step == 2:
                readme.write_text("# Mine\n\nMy own words.\n")

    options = {"output_dir": str(tmp_path), "optim": "osd_adamw", "optim_args": "rank=4", "max_steps": 3}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 4}
    trainer = trl.SFTTrainer(
        model=folders[LlamaForCausalLM],
        args=trl.SFTConfig(**options, **quiet, save_steps=1, logging_steps=1),
        train_dataset=rows(prompt=PROMPTS, completion=GOOD),
        callbacks=[Look()],
    )
    trainer.train()
    trainer.create_model_card(model_name="run", dataset_name="some/data")
    made, again, users = seen
    for step, card in enumerate((made, again), start=1):
        assert "It has been trained using [TRL]" in card and card.count(START) == 1 and f"| steps | {step} |" in card
    assert users.count("My own words.") == users.count(START) == 1 and "[TRL]" not in users
    last = readme.read_text()
    assert "My own words." in last and "- some/data" in last and last.count(START) == 1


CONFIGS = sorted({config for _, config, *_ in CASES.values()})


@pytest.mark.parametrize("name", CONFIGS)
def test_typed_fields_join_any_config_and_its_defaults_stay(name, tmp_path):
    config = getattr(trl, name)
    joined = dataclasses.make_dataclass("Joined", [], bases=(config, OSDTrainingArguments))
    plain = config(output_dir=str(tmp_path), use_cpu=True)
    args = joined(output_dir=str(tmp_path), use_cpu=True, optim="osd_adamw", osd_rank=4, osd_exclude_modules=".*q_.*")
    assert args.osd_rank == 4 and args.osd_exclude_modules == ".*q_.*"
    both, own = args.to_dict(), plain.to_dict()
    assert {key for key in own if both[key] != own[key]} == {"optim"}
    with pytest.raises(ValueError, match="osd_rank needs an OSD optimizer"):
        joined(output_dir=str(tmp_path), use_cpu=True, osd_rank=4)


def test_the_wrong_order_of_bases_is_refused():
    with pytest.raises(TypeError, match=r"class Wrong\(SFTConfig, OSDTrainingArguments\)"):
        type("Wrong", (OSDTrainingArguments, trl.SFTConfig), {})
