"""A stock Trainer with a model that `from_pretrained` has sharded: what it trains, and its checkpoints.

They go on with two, four and one process; one has the model whole. Experts lie on a mesh of their own.
"""

import copy
import json
import os
from pathlib import Path

import processes
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

from hf_osd import OSDTrainingArguments, create_osd_optimizer
from hf_osd.optim.osd import osd_of
from hf_osd.trainer.checkpoints import last_complete_checkpoint
from hf_osd.trainer.load_time import load_state, save_state


pytest.importorskip("transformers.distributed")
pytestmark = pytest.mark.distributed

STEPS, SAVED, BATCH, LR = 4, 2, 4, 1e-2
RUNS = {
    "dense": {"optim": "osd_adamw", "osd_rank": 8},
    # rows of 8 bits have 64 at least; so many singular vectors of the first gradient would be anybody's
    "8bit": {"optim": "osd_adamw8bit", "osd_rank": 64, "osd_init": "orthonormal"},
    "activations": {"optim": "osd_adamw", "osd_rank": 8, "osd_source": "activations"},
    "experts": {"optim": "osd_adamw", "osd_rank": 8},
    "tensor": {"optim": "osd_adamw", "osd_rank": 8},  # and expert parallelism, on all processes
}


def load(folder: Path, run: str, world: int):
    options = {}
    if world > 1:
        from accelerate.parallelism_config import ParallelismConfig
        from transformers.distributed import DistributedConfig

        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # accelerate asks, and finds the group made
        ParallelismConfig._validate_accelerator = lambda *args: None  # it knows of none on CPUs
        sizes = {"fsdp_size": world, "ep_size": 2 if run == "experts" else 1}
        if run == "tensor":
            sizes = {"tp_size": world, "tp_plan": "auto", "enable_expert_parallel": True}
        options["distributed_config"] = DistributedConfig(**sizes)
    name = "llama" if run in ("dense", "8bit", "activations") else "mixture"
    return AutoModelForCausalLM.from_pretrained(folder / name, **options)


def make_trainer(folder: Path, run: str, world: int, output: str, **options) -> Trainer:
    model = load(folder, run, world)
    tokens = torch.randint(0, 64, (20, 32), generator=torch.Generator().manual_seed(1))
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    args = OSDTrainingArguments(
        output_dir=str(folder / output),
        learning_rate=LR,
        weight_decay=0.01,
        max_steps=STEPS,
        save_steps=SAVED,
        logging_steps=1,
        per_device_train_batch_size=BATCH if run == "tensor" else BATCH // world,
        per_device_eval_batch_size=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, args, train_dataset=dataset, eval_dataset=dataset[:4])


def train(folder: Path, run: str, world: int, output: str, resume: str | None = None, **options) -> Trainer:
    options |= RUNS[run] | {"osd_projection_sample": 1}  # blocks would be of each process's own part
    trainer = make_trainer(folder, run, world, output, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = ((name, p.detach()) for name, p in trainer.model.named_parameters())
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in named}


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train_and_resume(rank: int, world: int, folder: Path):
    from torch.distributed.tensor import DTensor

    for run in RUNS:
        trainer = train(folder, run, world, run)
        sharded = [p for p in osd_of(trainer.optimizer).state if isinstance(p, DTensor)]
        assert len(sharded) == len(osd_of(trainer.optimizer).state) or run == "tensor" and sharded
        weights, losses = weights_of(trainer), logged(trainer, "loss")
        again = train(folder, run, world, f"{run}_again", resume=str(folder / run / f"checkpoint-{SAVED}"))
        for name, p in weights_of(again).items():
            assert torch.equal(p, weights[name]), name
        assert logged(again, "loss") == losses
        if rank == 0:
            torch.save(weights, folder / f"{run}.bin")
            (folder / f"{run}.json").write_text(json.dumps([losses, logged(trainer, "grad_norm")]))


def best_model(rank: int, world: int, folder: Path):
    """Weights alone are saved where that is asked for; they are read back, and others' checkpoints stay refused."""
    options = {"eval_strategy": "steps", "eval_steps": SAVED, "save_only_model": True, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}  # which is not the last
    trainer = train(folder, "dense", world, "best", **options)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{SAVED}" and not (best / "optimizer_dcp").exists()
    saved = LlamaForCausalLM.from_pretrained(best)
    for name, p in weights_of(trainer).items():
        assert torch.equal(p, saved.get_parameter(name)), name
    with pytest.raises(ValueError, match="save_only_model"):
        make_trainer(folder, "dense", world, "refused", optim="adamw_torch")


def resume(rank: int, world: int, folder: Path):
    for run in RUNS if world == 1 else ["dense", "activations", "experts"]:
        trainer = train(folder, run, world, f"{run}_{world}", resume=last_complete_checkpoint(folder / run))
        losses, _ = json.loads((folder / f"{run}.json").read_text())
        assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-5)
        # of 8-bit moments sums in another order change codes: a fifth of one step
        tolerance = LR / 5 if run == "8bit" else 1e-6
        weights = weights_of(trainer)
        for name, p in torch.load(folder / f"{run}.bin", weights_only=True).items():
            torch.testing.assert_close(weights[name], p, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load_time")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    # 130 rows: uneven on four processes
    LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=130, **sizes)).save_pretrained(folder / "llama")
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    mixture = MixtralForCausalLM(MixtralConfig(hidden_size=32, intermediate_size=24, **sizes))
    mixture.save_pretrained(folder / "mixture")
    results = processes.run(2, [best_model, train_and_resume], folder)
    for name, text in results.items():
        assert not text, f"{name}: {text}"
    for run in RUNS:  # killed while it wrote the last checkpoint
        (folder / run / f"checkpoint-{STEPS}" / "trainer_state.json").unlink()
    return folder


@pytest.mark.parametrize("run", [run for run in RUNS if run != "tensor"])  # which has sides that no option gives
def test_two_processes_train_what_one_trains(folder, run):
    side = {} if run == "activations" else {"osd_side": "right"}
    single = train(folder, run, 1, f"{run}_single", save_strategy="no", **side)
    losses, norms = json.loads((folder / f"{run}.json").read_text())
    # 8-bit moments of P, too, have blocks of rows when sharded
    assert losses == pytest.approx(logged(single, "loss"), abs=1e-3 if run == "8bit" else 1e-4)
    assert norms == pytest.approx(logged(single, "grad_norm"), rel=1e-3)
    # float32, and Adam divides by gradients near zero: a tenth of a step. In 8 bits, whose blocks are of rows when
    # sharded, a fifth, but where a second moment has the code of 0
    tolerance, far = (LR / 5, 1e-3) if run == "8bit" else (LR / 10, 0)
    weights = weights_of(single)
    for name, p in torch.load(folder / f"{run}.bin", weights_only=True).items():
        assert ((weights[name] - p).abs() > tolerance).float().mean() <= far, name


def test_one_process_goes_on(folder):
    resume(0, 1, folder)


def test_four_processes_go_on(folder):
    text = processes.run(4, [resume], folder)["resume"]
    assert not text, text


def test_a_load_that_is_refused_changes_nothing(tmp_path):
    def trained(optim):
        model = nn.Linear(12, 8, bias=False)
        optimizer = create_osd_optimizer(model, optim, lr=0.1, rank=4)
        for _ in range(3):
            model(torch.randn(5, 12)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    save_state(*trained("osd_adamw"), tmp_path)
    model, optimizer = trained("osd_lion")
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="another optimizer"):
        load_state(model, optimizer, tmp_path)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
