"""`lr_pattern` and `full_size_optim`: groups as by hand, through Trainer's schedule, log and checkpoints."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_osd import OSD, OSDTrainingArguments, create_osd_optimizer
from hf_osd.hub.card.facts import CardFacts
from hf_osd.hub.card.section import render_section
from reference.tiny_models import tiny_llama


TEXT, RATES = "embed_tokens|lm_head:4;layers.0.*:0.5", {"embed_tokens|lm_head": 4, "layers.0.*": 0.5}


def rates_by_parameter(optimizer: OSD) -> dict[str, float]:
    return {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}


def trained_on_noise(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 4) -> None:
    """Steps with gradients that do not depend on the weights."""
    for step in range(steps):
        for seed, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + seed), dtype=p.dtype)
        optimizer.step()


@pytest.mark.parametrize("source", ["gradients", "activations"])
def test_every_parameter_has_its_multiple(source: str):
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, rank=4, lr=0.01, lr_pattern=TEXT, source=source)
    rates = rates_by_parameter(optimizer)
    for name, _ in tiny_llama().named_parameters():
        times = 4 if "embed_tokens" in name or "lm_head" in name else 0.5 if ".layers.0." in name else 1
        assert rates[name] == 0.01 * times, name
    assert optimizer.param_groups[0]["lr"] == 0.01  # what Trainer logs
    as_mapping = rates_by_parameter(create_osd_optimizer(tiny_llama(), rank=4, lr=0.01, lr_pattern=RATES))
    assert as_mapping.items() <= rates.items()
    given = {"rank": 4, "lr": 0.01, "embedding_lr_ratio": 8, "lr_pattern": "lm_head:2"}
    for name, rate in rates_by_parameter(create_osd_optimizer(tiny_llama(), **given)).items():
        assert rate == pytest.approx(0.01 * ({"lm_head": 2, "embed_tokens": 8}.get(name.split(".")[-2], 1))), name
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = [group["lr"] for group in optimizer.param_groups]
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 2 for lr in before]


class Plain(nn.Module):
    """A language model of plain torch, which tells nobody what its head is."""

    def __init__(self, head: str, looked_up: type[nn.Module] = nn.Embedding):
        super().__init__()
        self.wte, self.wpe = looked_up(40, 16), nn.Embedding(12, 16)
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2))
        self.into, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)  # at full size, and neither of them
        setattr(self, head, nn.Linear(16, 40 if head == "to_tokens" else 5))


@pytest.mark.parametrize("looked_up", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("head", ["lm_head", "classifier", "to_tokens"])
def test_heads_of_models_of_plain_torch_have_the_ratio_of_heads(head: str, looked_up: type[nn.Module]):
    optimizer = create_osd_optimizer(Plain(head, looked_up), rank=4, lr=0.01, preset="pretrain")
    faster = {name for name, rate in rates_by_parameter(optimizer).items() if rate == pytest.approx(0.16)}
    assert faster == {"wte.weight", "wpe.weight", f"{head}.weight"}


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_a_schedule_that_sets_all_groups_alike_is_told(lr: Any):
    """What OneCycleLR and CyclicLR do, unless they are given lists."""

    def first_step(schedule: type, **rates: Any) -> list[float]:
        net = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 9))
        options = {"capturable": isinstance(lr, torch.Tensor), "lr_pattern": "1:4"}
        optimizer = create_osd_optimizer(net, rank=3, lr=lr, target_modules=["0"], **options)
        schedule(optimizer, **{key: value(optimizer) if callable(value) else value for key, value in rates.items()})
        trained_on_noise(optimizer, list(net.parameters()), steps=2)
        return sorted(
            {round(float(group["lr"]) / float(optimizer.param_groups[0]["lr"])) for group in optimizer.param_groups}
        )

    def each(times: float) -> Any:
        return lambda optimizer: [times * float(group["lr"]) for group in optimizer.param_groups]

    schedules = torch.optim.lr_scheduler
    for schedule, rates in (
        (schedules.OneCycleLR, {"max_lr": 0.1, "total_steps": 9}),
        (schedules.CyclicLR, {"base_lr": 0.01, "max_lr": 0.1}),
    ):
        with pytest.warns(
            UserWarning, match="`lr_pattern` and ratios have no effect. Give OneCycleLR and CyclicLR lists"
        ) as told:
            assert first_step(schedule, **rates) == [1]
        assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_step(schedules.OneCycleLR, max_lr=each(10), total_steps=9) == [1, 4]
        assert first_step(schedules.CyclicLR, base_lr=each(1), max_lr=each(10)) == [1, 4]
        assert first_step(schedules.LinearLR) == [1, 4]


def test_it_steps_as_groups_with_these_rates():
    nets = [nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 9, bias=False)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    made = create_osd_optimizer(
        nets[0], rank=3, lr=0.02, target_modules=["0", "1"], lr_pattern={"1": 0.25, r"0\.bias": 2}, weight_decay=0.1
    )
    first, bias, second = nets[1].parameters()
    own = OSD(
        [
            {"params": [first], "rank": 3, "weight_decay": 0.1},
            {"params": [second], "rank": 3, "lr": 0.005, "weight_decay": 0.1},
            {"params": [bias], "lr": 0.04},
        ],
        lr=0.02,
    )
    trained_on_noise(made, list(nets[0].parameters()))
    trained_on_noise(own, list(nets[1].parameters()))
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rule", ["sgd", "adafactor"])
def test_parameters_at_full_size_are_stepped_by_a_rule_of_their_own(rule: str):
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6)).double()
    twin = copy.deepcopy(net)
    options: dict[str, Any] = {"momentum": 0.5} if rule == "sgd" else {}
    options |= {"lr_pattern": "0:0.5", "betas": (0.9, 0.95)}
    optimizer = create_osd_optimizer(net, rank=2, lr=0.02, full_size_optim=rule, **options)
    (projected,) = (group for group in optimizer.param_groups if group["rank"] is not None)
    assert projected["weight_rule"] == "adamw" and projected["betas"] == (0.9, 0.95)
    trained_on_noise(optimizer, list(net.parameters()))
    moments = {"sgd": {"momentum_buffer"}, "adafactor": {"exp_avg_sq_row", "exp_avg_sq_col"}}[rule]
    assert optimizer.state[net[0].weight].keys() - {"step", "skipped_steps"} == moments
    assert "exp_avg_sq" in optimizer.state[net[1].weight]
    if rule == "sgd":
        trained_on_noise(torch.optim.SGD([twin[0].weight], lr=0.01, momentum=0.5), list(twin.parameters()))
        torch.testing.assert_close(net[0].weight, twin[0].weight, rtol=1e-12, atol=0)


def test_layerwise_steps_alike():
    models = [tiny_llama() for _ in range(2)]
    for model, name in zip(models, ("osd_adamw", "osd_adamw_layerwise"), strict=True):
        optimizer = create_osd_optimizer(model, name, rank=4, lr=0.01, lr_pattern=RATES, full_size_optim="lion")
        for _ in range(2):
            model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_what_is_wrong_or_has_no_effect_is_refused():
    for options, message in (
        ({"lr_pattern": "q_porj:2"}, "'q_porj' in `lr_pattern` matches no .* has not taken. Did you mean 'q_proj'"),
        # a word that is right, and taken, is no hint
        ({"lr_pattern": "layers.*:2;q_proj:3"}, "'q_proj' in `lr_pattern` .* has not taken. They are"),
        ({"rank_pattern": "layers.*:2;q_proj:3"}, "'q_proj' in `rank_pattern` .* has not taken. They are"),
        ({"learning_rate": 1e-3}, "`learning_rate` in .*: it is `lr` here"),
        ({"lr_pattern": "q_proj:0"}, "`lr_pattern` must name modules and their multiples of the learning rate"),
        ({"lr_pattern": "q_proj:1e400"}, "must name modules"),
        ({"lr_pattern": {"q_proj": -1}}, "must name modules"),
        ({"embedding_lr_ratio": 0}, "`embedding_lr_ratio` of create_osd_optimizer must be a number > 0, got 0"),
        ({"full_size_optim": "sdg"}, "`full_size_optim` of .* must be one of .*did you mean 'sgd'"),
        ({"full_size_optim": "lion", "momentum": 0.5}, "`momentum` .* no effect with the update rule adamw"),
    ):
        with pytest.raises(ValueError, match=message):
            create_osd_optimizer(tiny_llama(), rank=4, **options)
    with pytest.raises(
        ValueError, match="'lm_head' .* matches lm_head.weight, which is model.embed_tokens.weight as well"
    ):
        create_osd_optimizer(tiny_llama(tie_word_embeddings=True), rank=4, lr_pattern="lm_head:4")
    with pytest.raises(ValueError, match="`full_size_optim` has no effect: all that is trained is projected"):
        create_osd_optimizer(nn.Sequential(nn.Linear(6, 5, bias=False)), rank=4, full_size_optim="sgd")
    with pytest.raises(ValueError, match="trained at full size: give `embedding_lr_ratio` 1, .* names, as wte:16"):
        create_osd_optimizer(nn.Sequential(nn.Linear(6, 5, bias=False)), rank=4, embedding_lr_ratio=2)
    with pytest.raises(ValueError, match="or leave preset='pretrain', which sets it, out. `lr_pattern` takes names"):
        create_osd_optimizer(nn.Sequential(nn.Linear(6, 5, bias=False)), rank=4, preset="pretrain")
    with pytest.raises(TypeError, match="takes the model, .* not a generator. OSD takes parameters."):
        create_osd_optimizer(nn.Linear(6, 5).parameters(), rank=4)
    with pytest.raises(ValueError, match="Unknown optimizer 'subzero'. In a loop of your own it is hf_osd.SubZero"):
        create_osd_optimizer(nn.Linear(6, 5), "subzero")


class Tokens(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def make_trainer(folder: Path, arguments: type[TrainingArguments] = TrainingArguments, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"learning_rate": 0.01, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "linear"}
    args = arguments(output_dir=str(folder), optim="osd_adamw", **(defaults | options))
    return Trainer(tiny_llama(), args, train_dataset=Tokens())


def test_trainer_logs_the_rate_itself_and_resumes(tmp_path: Path):
    everywhere = f"{TEXT};.*:2"  # no group has the learning rate itself
    whole = make_trainer(tmp_path, optim_args=f"rank=4,full_size_optim=sgd,momentum=0.5,lr_pattern={everywhere}")
    whole.train()
    logged = [row["learning_rate"] for row in whole.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([0.01, 0.0075, 0.005, 0.0025])

    typed = {"osd_rank": 4, "osd_full_size_optim": "sgd", "osd_momentum": 0.5}
    again = make_trainer(tmp_path / "b", OSDTrainingArguments, osd_lr_pattern=everywhere, **typed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)

    facts = CardFacts.from_run(again.optimizer, again.args, again.state, again.model)
    card = render_section(facts, picture=None, projections=True)
    assert "| learning rate | 0.01, linear schedule |" in card and "| rule at full size | `sgd` |" in card
    assert f'lr_pattern="{everywhere}"' in card and 'full_size_optim="sgd"' in card

    for changed, message in (({"osd_lr_pattern": TEXT}, "2 times lr"), ({"osd_full_size_optim": "lion"}, "lion")):
        options = typed | {"osd_lr_pattern": everywhere} | changed
        if changed.get("osd_full_size_optim"):
            del options["osd_momentum"]
        other = make_trainer(tmp_path / "c", OSDTrainingArguments, **options)
        with pytest.raises(ValueError, match=f"(?s)saved by another optimizer.*{message}"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_partial_load_keeps_states_under_other_multiples():
    first, model = create_osd_optimizer(tiny_llama(), rank=4, lr=0.01, lr_pattern=RATES), tiny_llama()
    params = [p for group in first.param_groups for p in group["params"]]
    trained_on_noise(first, params)
    for group in first.param_groups:
        group["lr"] *= 0.5  # a schedule's
    second = create_osd_optimizer(model, rank=4, lr=0.01, lr_pattern="embed_tokens:3", partial_load=True)
    second.load_state_dict(first.state_dict())
    rates = rates_by_parameter(second)
    assert {name: rate for name, rate in rates.items() if rate != pytest.approx(0.005)} == {
        "model.embed_tokens.weight": pytest.approx(0.015)
    }
    assert all(second.state[p]["step"] == 4 for p in model.parameters())
