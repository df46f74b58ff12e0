"""RSO in a stock Trainer: it learns, resumes bit for bit within an interval, and leaves plain checkpoints."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from rso_runs import Tokens, losses, make_trainer
from transformers import LlamaForCausalLM, Trainer

from hf_osd.rso import create_rso_model, outer_loop, unload_rso_model
from reference.tiny_models import tiny_llama


def assert_identical(a: Trainer, b: Trainer) -> None:
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):  # W, P, B and the rest
        assert torch.equal(p, q), name
    left, right = a.optimizer.optimizer.state, b.optimizer.optimizer.state
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert left.get(p, {}).keys() == right.get(q, {}).keys()
        for name, value in left.get(p, {}).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, right[q][name]), name
    assert losses(b) == losses(a)


@pytest.mark.parametrize(
    "optim, dtype, saved_at",  # in the first interval, at its end, in the second
    [("rso_adamw", torch.float32, step) for step in (2, 4, 6)]
    + [("rso_adamw", torch.bfloat16, 6), ("rso_adamw8bit", torch.float32, 4), ("rso_adamw8bit", torch.bfloat16, 6)],
)
def test_resumes_exactly(tmp_path: Path, optim: str, dtype: torch.dtype, saved_at: int):
    inner = torch.optim.AdamW if optim == "rso_adamw" else bitsandbytes.optim.AdamW8bit
    # 128 x 64 factors: large enough to be kept in 8 bits
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "attention_dropout": 0.1}
    options = {"optim_args": "rank=40,interval=4,eta=10", "gradient_accumulation_steps": 2, "max_steps": 7}
    whole = make_trainer(tmp_path, optim, model=tiny_llama(**config).to(dtype), **options)
    whole.train()
    assert type(whole.optimizer.optimizer) is inner and outer_loop(whole.model).index == 1
    resumed = make_trainer(tmp_path, optim, model=tiny_llama(**config).to(dtype), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert_identical(whole, resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))  # into a model that was trained on
    assert_identical(whole, resumed)


@pytest.mark.parametrize("optim", ["rso_adamw", "rso_adamw8bit"])
def test_learns_and_saves_plain_models(tmp_path: Path, optim: str):
    options = {
        "optim_args": "rank=8,interval=10,seed=1",
        "max_steps": 40,
        "save_steps": 15,
        "per_device_train_batch_size": 8,
    }
    trainer = make_trainer(tmp_path, optim, learning_rate=2e-2, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert before > 4 and after < 2
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-15"):  # 15: B is not 0
        model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert not [path.name for path in Path(folder).iterdir() if "adapter" in path.name]
    ids = Tokens()[0]["input_ids"][None]
    live, saved = trainer.model.eval(), LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(saved(ids).logits, live(ids).logits, rtol=1e-3, atol=1e-4)  # W + P B is rounded once
    state = torch.load(tmp_path / "checkpoint-15" / "optimizer.pt", weights_only=True)
    assert [name for name in state["state"][0] if name.startswith("rso")] == ["rso_weight", "rso_factor"]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "max_steps": 6, "learning_rate": 0.02}
    trainer = make_trainer(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", **options)
    trainer.train()
    best = LlamaForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(value, best.state_dict()[name]) for name, value in trainer.model.state_dict().items())
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-5)


def test_a_prepared_model_trains_with_any_optim(tmp_path: Path):
    def run(**options) -> Trainer:
        model = create_rso_model(tiny_llama(), 8, interval=3, seed=4)
        return make_trainer(tmp_path, "adamw_torch", model=model, optim_args=None, max_steps=8, **options)

    whole = run()
    whole.train()
    assert outer_loop(whole.model).index == 2 and losses(whole)[-1] < losses(whole)[0]
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_identical(whole, resumed)


def test_a_second_training_starts_from_p_0_and_without_moments_of_b(tmp_path: Path):
    trainer = make_trainer(tmp_path, max_steps=6, save_strategy="no")
    first = outer_loop(trainer.model)
    assert first is None  # the model is prepared when training begins
    trainer.train()
    saved = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    loop = outer_loop(trainer.model)
    assert loop.index == 1
    loop.begin(trainer.optimizer.optimizer, 0)
    assert loop.index == 0
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())
    assert all(B not in trainer.optimizer.optimizer.state for _, B in loop.factors())


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    make_trainer(tmp_path, max_steps=2).train()
    for wrong in ("interval=5", "seed=3", "sampling=orthonormal", "rank=4"):
        given = {"rank": "8", "interval": "4"} | dict([wrong.split("=")])
        optim_args = ",".join(f"{key}={value}" for key, value in given.items())
        trainer = make_trainer(tmp_path, optim_args=optim_args)
        with pytest.raises(ValueError, match=f"trained with {wrong.split('=')[0]}=.*Continue it with the same"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("saved_at", [2, 4])  # in the first interval, at its end
@pytest.mark.parametrize("optim", ["rso_adamw", "rso_adamw8bit"])
def test_a_checkpoint_of_osd_is_refused(tmp_path: Path, optim: str, saved_at: int):
    make_trainer(tmp_path, "osd_adamw", optim_args="rank=8", max_steps=4).train()
    with pytest.raises(ValueError, match="state is not of RSO: its checkpoint was trained with another optimizer"):
        make_trainer(tmp_path, optim).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))


def test_osd_on_a_prepared_model_names_the_way_back(tmp_path: Path):
    model = create_rso_model(tiny_llama(), 8)
    options = {"optim_args": "rank=8", "max_steps": 1, "save_strategy": "no"}
    with pytest.raises(
        ValueError, match="14 matching layers are frozen; .*prepared for RSO.*unload_rso_model"
    ) as error:
        make_trainer(tmp_path, "osd_adamw", model=model, **options).train()
    assert "modules_to_save" not in str(error.value)
    make_trainer(tmp_path, "osd_adamw", model=unload_rso_model(model), **options).train()
