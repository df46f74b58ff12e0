"""The list of rho goes with the model of its step to the Hub, and alone; it is applied from there."""

import copy

import torch
from card_reading import code, head, section
from pushed_runs import OSD_FILES, REPO, folder_of, make_trainer
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


def test_what_other_runs_left_in_the_folder_is_not_pushed(hub, client, tmp_path):
    """Nor a user's text lost; of a V that follows the inputs there is no log, but a section."""
    folder, own = tmp_path / "out", {"optim": "subzero", "logging_steps": 1}
    ours, words = OSD_FILES | {"osd_loss.png"}, "Fine-tuned with [SubZero]"

    def push(repo: str, **given) -> dict[str, bytes]:
        trainer = make_trainer(folder, push_to_hub=True, hub_strategy="every_save", hub_model_id=repo, **given)
        trainer.train()
        trainer.push_to_hub(tags="mine", language="en", dataset_tags="some/data")
        (first, *_) = [commit for commit in hub.commits(repo) if commit.title.startswith("Training in")][::-1]
        card = hub.files(repo, first.oid)["README.md"].decode()  # before Trainer makes one
        assert ("without a backward" in card) == (given["optim"] == "subzero") != ("subspace-descent" in card)
        return folder_of(hub.files(repo))

    assert push("tester/osd", optim="osd_adamw", logging_steps=1).keys() >= ours
    files = push("tester/logged", optim_args="rank=4", **own)
    assert not ours & files.keys() and "subzero_log.safetensors" in files
    assert {f"_{name}" for name in ours} <= {path.name for path in folder.iterdir()}  # and not lost
    (folder / "README.md").write_text("# Mine\n")
    files = push("tester/follows", optim_args="rank=4,source=activations", **own)
    card = files["README.md"].decode()
    assert "subzero_log.safetensors" not in files and words in section(card) and "replay" not in card
    assert "\n# Mine\n" in card and head(card)["datasets"] == ["some/data"] and head(card)["language"] == "en"
    assert head(card)["tags"] == ["hf_osd", "mine"]
    files = push("tester/osd-again", optim="osd_adamw")
    assert files.keys() >= OSD_FILES and words not in files["README.md"].decode()
