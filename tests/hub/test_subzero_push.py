"""The list of rho goes with the model of its step to the Hub, and alone; it is applied from there."""

import copy

import torch
from card_reading import code, head, section
from pushed_runs import REPO, folder_of, make_trainer
from safetensors.torch import load

from hf_osd.subzero import SubZeroLog, replay


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_every_push_has_the_log_of_its_model(hub, client, tmp_path):
    options = {"optim": "subzero", "optim_args": "rank=4", "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path / "out", push_to_hub=True, hub_strategy="every_save", **options)
    trainer.model.config._name_or_path = "tester/base"
    base = copy.deepcopy(trainer.model)
    base.push_to_hub("tester/base")
    trainer.train()
    trainer.push_to_hub()
    assert not same(trainer.model, base)
    pushed = [commit for commit in hub.commits(REPO) if commit.title != "initial commit"]
    assert len(pushed) == 3
    for commit, steps in zip(pushed, (4, 4, 2), strict=True):
        files = folder_of(hub.files(REPO, commit.oid))
        again = copy.deepcopy(base)
        log = SubZeroLog.from_pretrained(REPO, revision=commit.oid)
        assert len(log.rho) == steps
        replay(again, log)
        for name, value in load(files["model.safetensors"]).items():
            assert torch.equal(dict(again.named_parameters())[name], value)
        card = files["README.md"].decode()
        assert head(card)["base_model"] == "tester/base"
        assert f": {steps} steps without" in section(card)
    found: dict = {}
    exec(code(hub.files(REPO)["README.md"].decode()), found)  # which the card says makes the weights
    assert same(found["model"], trainer.model)
    SubZeroLog.from_optimizer(trainer.optimizer).push_to_hub("tester/log", private=True)
    replay(base, "tester/log")
    assert same(base, trainer.model) and {*hub.files("tester/log")} - {".gitattributes"} == {"subzero_log.safetensors"}
