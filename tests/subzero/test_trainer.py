"""`optim="subzero"` in a stock Trainer: accumulation, clipping, all kinds of losses, evaluation, resume, refusals."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_osd import OSDTrainingArguments, ProjectionState, SubZero
from hf_osd.subzero import SubZeroLog, replay, subzero_of
from hf_osd.trainer.forward_only import save_log
from hf_osd.trainer.ignored_by_ddp import MARK, ignore_all_but_one, unmark
from reference.tiny_models import tiny_llama


class Tokens(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def make(folder: Path, dtype: torch.dtype = torch.float32, trainer: Any = {}, **options: Any) -> Trainer:  # noqa: B006
    set_seed(0)
    model = tiny_llama(attention_dropout=0.1).to(dtype)
    defaults = {
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "optim_args": "rank=8,eps=1e-3,update_interval=4",
    }
    defaults |= {"per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    args = TrainingArguments(str(folder), optim="subzero", disable_tqdm=True, **(defaults | options))
    return Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(), **trainer)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


def logged(trainer: Trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row and "train_runtime" not in row]


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["by the model", "label smoothing"])
def test_accumulation_is_one_large_batch_and_a_schedule_is_followed(tmp_path: Path, smoothing: float):
    options = {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "label_smoothing_factor": smoothing}
    one = make(tmp_path, torch.float64, **options)
    two = make(tmp_path, torch.float64, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    for trainer in (one, two):
        trainer.train()
    for p, q in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)  # the model computes its loss in float32
    start = tiny_llama(attention_dropout=0.1).double()
    assert max((p - q).abs().max() for p, q in zip(weights(one), start.parameters(), strict=True)) > 5e-3
    log = SubZeroLog.from_optimizer(one.optimizer)
    assert log.lr[:, 0].tolist() == pytest.approx(logged(one, "learning_rate"))
    replay(start, log)
    assert all(torch.equal(p, q) for p, q in zip(weights(one), start.parameters(), strict=True))


def test_rho_is_what_is_clipped_and_logged(tmp_path: Path):
    free, clipped = make(tmp_path, max_grad_norm=0), make(tmp_path, max_grad_norm=0.01)
    for trainer in (free, clipped):
        trainer.train()
    norms, rho = logged(free, "grad_norm"), SubZeroLog.from_optimizer(free.optimizer).rho.abs().flatten()
    assert norms == pytest.approx(rho.tolist())
    norms, rho = logged(clipped, "grad_norm"), SubZeroLog.from_optimizer(clipped.optimizer).rho.abs().flatten()
    assert max(norms) > 1
    assert rho.tolist() == pytest.approx([min(norm, 0.01) for norm in norms], rel=1e-3)


class Watch(TrainerCallback):
    """Evaluates within a step, before it and after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        batch = {name: value[None] for name, value in Tokens()[0].items()}
        training = model.training
        with torch.no_grad():
            self.losses.append(model.eval()(**batch).loss.item())
        model.train(training)


def test_nobody_sees_a_perturbed_model(tmp_path: Path):
    watch = Watch()
    trainer = make(tmp_path, learning_rate=0.0, eval_strategy="steps", eval_steps=2, trainer={"callbacks": [watch]})
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert watch.losses == [watch.losses[0]] * 6
    assert logged(trainer, "eval_loss") == [before] * 3
    assert len(set(logged(trainer, "loss"))) == 6 and trainer.model.training is False


def test_a_loss_outside_of_the_model_gives_the_same(tmp_path: Path):
    def outside(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    own, inside = make(tmp_path, trainer={"compute_loss_func": outside}), make(tmp_path)
    for trainer in (own, inside):
        trainer.train()
    # Trainer counts all labels of a batch, the model leaves each sequence's first one out of its sum alone
    assert logged(own, "loss") == pytest.approx(logged(inside, "loss"), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(tmp_path: Path, dtype: torch.dtype):
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    whole = make(tmp_path, dtype, **options)
    whole.train()
    resumed = make(tmp_path, dtype, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(p, q) for p, q in zip(weights(whole), weights(resumed), strict=True))
    assert logged(whole, "loss") == logged(resumed, "loss")
    for trainer in (whole, resumed):
        again = tiny_llama(attention_dropout=0.1).to(dtype)
        replay(again, SubZeroLog.from_optimizer(trainer.optimizer))
        assert all(torch.equal(p, q) for p, q in zip(weights(whole), again.parameters(), strict=True))
    half = tiny_llama(attention_dropout=0.1).to(dtype)
    replay(half, tmp_path / "checkpoint-3")
    saved = type(half).from_pretrained(tmp_path / "checkpoint-3", dtype=dtype)
    assert all(torch.equal(p, q) for p, q in zip(half.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "fp16's GradScaler: use bf16=True"),
        ({"optim_args": "rank=8,layerwise=true"}, "instead of 'layerwise' in `optim_args`"),
        ({"optim_args": "residual=scaled"}, "Unknown option `residual`"),
        ({"optim_args": "side=two_sided"}, "Unknown option `side`"),
        ({"optim_args": "subspace=power"}, "Unknown option `subspace`"),
        ({"optim_args": "rnak=8"}, "Did you mean `rank`"),
        ({"optim_args": "rank=8,perturbation=dense"}, "`rank` of SubZero has no effect with perturbation='dense'"),
        ({"optim_args": "queries=0"}, "`queries` of SubZero must be an integer >= 1"),
        ({"adam_beta1": 0.8}, "`adam_beta1` has no effect"),
        ({"torch_compile": True}, "leave `torch_compile` out"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` has no effect"),
        (
            {"optim_args": "perturbation=dense", "optim_target_modules": ["q_proj"]},
            "`optim_target_modules` of SubZero has no effect with perturbation='dense'",
        ),
    ],
)
def test_what_would_not_work_is_refused_at_once(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


@pytest.mark.parametrize("options", [{"torch_compile": True}, {"fp16": True}, {"neftune_noise_alpha": 5.0}, {}])
def test_what_would_not_work_is_refused_for_an_optimizer_of_ones_own(tmp_path: Path, options: dict, monkeypatch):
    if not options:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # as `accelerate launch --dynamo_backend` does
    model = tiny_llama()
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    with pytest.raises(ValueError, match="use bf16=True" if "fp16" in options else "leave `torch_comp|has no effect"):
        Trainer(model, args, train_dataset=Tokens(), optimizers=(SubZero(model, rank=8), None))
    if options.get("neftune_noise_alpha"):
        trainer = Trainer(model, args, train_dataset=Tokens())
        trainer.create_optimizer = lambda: setattr(trainer, "optimizer", SubZero(model, rank=8))
        with pytest.raises(ValueError, match="has no effect"):
            trainer.train()


@pytest.mark.parametrize("version", [1, 2])
def test_engines_that_divide_the_weights_are_refused(tmp_path: Path, version: int, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", str(version))
    with pytest.raises(ValueError, match="cannot be used with FSDP.*use DDP"):
        OSDTrainingArguments(str(tmp_path), optim="subzero", use_cpu=True)


def test_typed_options_of_osd_are_refused_and_others_work(tmp_path: Path):
    with pytest.raises(ValueError, match="osd_rank need an OSD optimizer"):
        OSDTrainingArguments(str(tmp_path), optim="subzero", osd_rank=8, use_cpu=True)
    trainer = make(tmp_path, optim_target_modules=["q_proj"])
    low_rank = [name for name, w in subzero_of(trainer.create_optimizer()).weights.weights.items() if hasattr(w, "U")]
    assert len(low_rank) == 2 and all("q_proj" in name for name in low_rank)


def test_v_that_follows_inputs_resumes_exactly_and_leaves_no_log(tmp_path: Path, caplog):
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "max_steps": 8}
    options["optim_args"] = "rank=8,update_interval=6,source=activations"
    whole, resumed, random = (make(tmp_path / str(i), torch.bfloat16, **options) for i in range(3))
    random.args.optim_args = "rank=8,update_interval=6"
    with caplog.at_level("INFO", "hf_osd"):
        whole.train()
    assert "V of 15 matrices follows their inputs, which no log can tell" in caplog.text
    resumed.train(resume_from_checkpoint=str(tmp_path / "0" / "checkpoint-3"))  # moved after 1 and 2, goes on after 4
    random.train()
    assert all(torch.equal(p, q) for p, q in zip(weights(whole), weights(resumed), strict=True))
    assert logged(whole, "loss") == logged(resumed, "loss") != logged(random, "loss")
    logs = [sorted(path.parent.name for path in folder.rglob("subzero_log*")) for folder in sorted(tmp_path.iterdir())]
    assert logs == [[], [], ["checkpoint-3", "checkpoint-6", "checkpoint-8"]]


def test_subspaces_of_another_run(tmp_path: Path):
    osd = make(tmp_path, optim_args="rank=8")
    osd.args.optim, osd.args.optim_args = "osd_adamw", "rank=8"
    osd.train()
    ProjectionState.from_optimizer(osd.optimizer).save_pretrained(tmp_path / "P")
    trainer = make(tmp_path, optim_args=f"rank=4,init={tmp_path / 'P'}")
    trainer.train()
    own = subzero_of(trainer.optimizer)
    assert isinstance(own, SubZero) and sum(bool(getattr(w, "given", {})) for w in own.weights.weights.values()) == 14
    again = tiny_llama(attention_dropout=0.1)
    log = SubZeroLog.from_optimizer(own)
    with pytest.raises(ValueError, match="The run had an `init`: give it"):
        replay(again, log)
    replay(again, log, init=str(tmp_path / "P"))
    assert all(torch.equal(p, q) for p, q in zip(weights(trainer), again.parameters(), strict=True))


class BrokenOff(Exception):
    """What ends a run between two micro-batches."""


class Break(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise BrokenOff


@pytest.mark.parametrize("resume", [False, True], ids=["anew", "resumed"])
def test_a_run_that_was_broken_off_leaves_no_rho(tmp_path: Path, resume: bool):
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options["max_grad_norm"] = 0  # clipped, two rho of one sign would be the same
    broken, whole = make(tmp_path / "0", **options), make(tmp_path / "1", **options)
    broken.add_callback(Break(2 if resume else 0))
    with pytest.raises(BrokenOff):
        broken.train()
    broken.pop_callback(Break)
    broken.train(resume_from_checkpoint=resume)
    whole.train()
    assert all(torch.equal(p, q) for p, q in zip(weights(broken), weights(whole), strict=True))


class Modes(Trainer):
    """Asks which mode it is in, as trl's do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.asked = self.model.training
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_loss_on_the_object_stays_and_no_forward_pass_is_in_training_mode(tmp_path: Path):
    trainer = make(tmp_path, max_steps=3)
    trainer.__class__ = Modes
    model, seen, calls = trainer.model, [], []
    forward, compute_loss = model.forward, trainer.compute_loss

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(any(module.training for module in model.modules()))
        return forward(*args, **kwargs)

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(trainer.model.training)
        return compute_loss(*args, **kwargs)

    model.forward, trainer.compute_loss = watched, mine
    trainer.train()
    assert trainer.compute_loss is mine and calls == [True] * 6 and trainer.asked
    assert seen == [False] * 6 and all(module.training for module in model.modules())
    trainer.evaluate()
    assert not hasattr(model, MARK)  # which would leave another optimizer's gradients alone


def test_a_log_is_of_the_weights_that_it_says(tmp_path: Path, caplog):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"learning_rate": 0.3, "max_grad_norm": 0, "load_best_model_at_end": True}
    trainer = make(tmp_path, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("-3")
    with pytest.raises(ValueError, match=r"use SubZeroLog.from_pretrained\(trainer.state.best_model_checkpoint\)"):
        SubZeroLog.from_optimizer(trainer.optimizer)
    save_log(subzero_of(trainer.optimizer), tmp_path / "checkpoint-3", trainer.args)  # as a push does
    replay(tiny_llama(attention_dropout=0.1), tmp_path / "checkpoint-3")  # which is of its own weights still
    again = tiny_llama(attention_dropout=0.1)
    replay(again, best)
    assert all(torch.equal(p, q) for p, q in zip(weights(trainer), again.parameters(), strict=True))
    trainer.args.load_best_model_at_end = False
    with caplog.at_level("WARNING", "hf_osd"):
        trainer.train()  # from the best ones
    assert "SubZero and its log start anew" in caplog.text
    replay(again, SubZeroLog.from_optimizer(trainer.optimizer))
    assert all(torch.equal(p, q) for p, q in zip(weights(trainer), again.parameters(), strict=True))


def test_a_resume_without_a_state_is_told(tmp_path: Path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "max_steps": 4}
    make(tmp_path, **options).train()
    resumed = make(tmp_path, **options)
    with caplog.at_level("WARNING", "hf_osd"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "checkpoint-2 has no state of the optimizer: directions, schedule and the log start anew" in caplog.text
    log, again = SubZeroLog.from_optimizer(resumed.optimizer), tiny_llama(attention_dropout=0.1)
    with pytest.raises(ValueError, match="or the checkpoint that it went on from without the optimizer's state"):
        replay(again, log)
    half = type(again).from_pretrained(tmp_path / "checkpoint-2")
    replay(half, log)
    assert all(torch.equal(p, q) for p, q in zip(weights(resumed), half.parameters(), strict=True))


def test_ddp_is_told_of_every_name_and_what_a_user_has_told_it_stays():
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False))
    net[2].weight = net[0].weight
    net.own = nn.Parameter(torch.zeros(5))
    for users in (None, ["mask"]):
        if users is not None:
            setattr(net, MARK, users)
        for _ in range(2):  # the second as after a training that never began
            ignore_all_but_one(net)
        told = set(getattr(net, MARK))
        assert told == {"0.weight", "2.weight", ".own", "own", "1.bias", *(users or ())}
        unmark(net)
        unmark(net)
        assert getattr(net, MARK, None) == users


def test_a_resume_that_is_refused_leaves_no_mark(tmp_path: Path):
    trainer = make(tmp_path, save_steps=1, save_strategy="steps", max_steps=1)
    trainer.train()
    other = make(tmp_path, optim_args="rank=3")
    with pytest.raises(ValueError, match="saved with rank"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(other.model, args, train_dataset=Tokens()).train()
    assert not hasattr(other.model, MARK)


def test_weights_that_change_between_two_trainings_begin_a_log(tmp_path: Path, caplog):
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    assert "start anew" not in caplog.text and len(SubZeroLog.from_optimizer(trainer.optimizer).rho) == 4
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(1e-3)
    trainer.train()
    assert "start anew" in caplog.text and len(SubZeroLog.from_optimizer(trainer.optimizer).rho) == 2
    next(trainer.model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="has been frozen since this optimizer was made"):
        trainer.train()
