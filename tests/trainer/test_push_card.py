"""`Trainer.push_to_hub` with the card of our optimizer, against a local Hub: one client makes all pushes."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerState, TrainingArguments

from hf_osd import create_osd_optimizer
from hf_osd.hub.card.model_card import PICTURE_NAME
from hf_osd.hub.card.section import END, START
from hf_osd.trainer import push
from hf_osd.trainer.push import refresh_card, register_push
from hub_server import HubServer, run_client


USERS = "---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n"
TRAINERS = "generated automatically according to the information the Trainer had access to"

PUSHES = """
import sys, types
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from hf_osd.trainer.push import register_push

USERS, stock_push = sys.modules["__main__"].USERS, Trainer.push_to_hub
register_push()  # importing hf_osd has done it: once is enough
assert Trainer.push_to_hub is stock_push and not hasattr(stock_push.__wrapped__, "__wrapped__")
from huggingface_hub import HfApi
api = HfApi()


class LikeTrl(Trainer):
    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        data = f" on {dataset_name}" if dataset_name else ""
        text = f"---\\ntags: [trl]\\n---\\n\\n# {model_name}\\n\\nOf trl{data}.\\n"
        Path(self.args.output_dir, "README.md").write_text(text)


def push(name, kind=Trainer, readme=None, hub=None, optim="osd_adamw", checkpoint_card=False, **given):
    if hub is not None:
        api.create_repo("tester/" + name, exist_ok=True)
        api.upload_file(path_or_fileobj=hub.encode(), path_in_repo="README.md", repo_id="tester/" + name)
    Path(name).mkdir(exist_ok=True)
    if readme is not None:
        Path(name, "README.md").write_bytes(readme.encode() if isinstance(readme, str) else readme)
    torch.manual_seed(0)
    config = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    args = TrainingArguments(
        name, optim=optim, optim_args="rank=4,preset=reference" if optim.startswith("osd") else None, max_steps=2,
        logging_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True,
    )
    trainer = kind(LlamaForCausalLM(LlamaConfig(**config)), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    if checkpoint_card:
        trainer.create_model_card(model_name=name)
    trainer.push_to_hub(**given)
    assert "create_model_card" not in vars(trainer)
    return trainer


first = push("stock", dataset_tags="some/data", dataset="Some data")
first.push_to_hub("again", dataset_tags="some/data", dataset="Some data")
push("kept", readme=USERS)
push("started", hub=USERS)
push("like-trl", LikeTrl, checkpoint_card=True, dataset_name="some/data")
push("like-trl", LikeTrl, dataset_name="other/data")
push("like-trl-kept", LikeTrl, readme=USERS)
push("adamw", readme=USERS, optim="adamw_torch")
push("broken", readme=USERS + "<!-- hf_osd:start -->\\n")
try:
    push("fails", revision=3, no_such_argument=1)
except TypeError as error:
    assert "no_such_argument" in str(error)
else:
    raise AssertionError("an unknown argument was taken")
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What the client left: the local folders, and the README.md of each repository."""
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        code = f"USERS = {USERS!r}\n{PUSHES}"
        output = run_client(code, hub, HF_HUB_DISABLE_XET="1")
        names = ("stock", "kept", "started", "like-trl", "like-trl-kept", "adamw", "broken")
        files = {name: hub.files(f"tester/{name}") for name in names}
        commits = {name: len(hub.commits(f"tester/{name}")) for name in names}
        yield SimpleNamespace(
            cards={name: found["README.md"].decode() for name, found in files.items()},
            files=files,
            commits=commits,
            output=output,
            folder=Path(hub.directory, "client"),
        )


def test_a_stock_trainer_pushes_its_own_card_with_our_section(pushed):
    card = pushed.cards["stock"]
    assert TRAINERS in card and card.count(START) == card.count(END) == 1 and card.index(TRAINERS) < card.index(START)
    data = yaml.safe_load(card.split("---")[1])
    assert set(data["tags"]) == {"generated_from_trainer", "online-subspace-descent", "hf_osd"}
    assert data["datasets"] == ["some/data"] and data["metrics"] == ["perplexity"]
    assert data["model-index"][0]["results"][0]["metrics"][0]["type"] == "perplexity"
    assert "| steps | 2 |" in card and "| preset | `reference` |" in card and "| optimizer | `osd_adamw` |" in card
    assert '.from_pretrained("tester/stock")' in card
    assert pushed.files["stock"][PICTURE_NAME].startswith(b"\x89PNG")
    assert {"model.safetensors", "config.json", "training_args.bin"} < set(pushed.files["stock"])
    assert not any(name.startswith("_") for name in pushed.files["stock"])


@pytest.mark.parametrize("name", ["kept", "started", "like-trl-kept"])
def test_a_users_text_is_kept(name, pushed):
    card = pushed.cards[name]
    assert "license: mit\n" in card and "\n---\n\n# Mine\n\nMy own words.\n\n" + START in card
    assert TRAINERS not in card and "Of trl" not in card and "sha256" not in card
    assert (pushed.folder / name / "README.md").read_text() == card


def test_a_subclass_writes_its_card_anew_while_nobody_edits_it(pushed):
    card = pushed.cards["like-trl"]
    assert "\n# like-trl\n\nOf trl on other/data.\n\n" + START in card and TRAINERS not in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["trl", "online-subspace-descent", "hf_osd"]


def test_other_optimizers_push_as_ever(pushed):
    assert START not in pushed.cards["adamw"] and TRAINERS in pushed.cards["adamw"]
    assert PICTURE_NAME not in pushed.files["adamw"]


def test_a_text_that_cannot_be_added_to_is_pushed_as_it_is(pushed):
    assert pushed.cards["broken"] == USERS + START + "\n"
    assert "model.safetensors" in pushed.files["broken"]


# In this process, without a Hub


@pytest.fixture
def run(tmp_path):
    """Everything that `refresh_card` needs, of a run that is offline."""
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model: nn.Module = LlamaForCausalLM(config)
    args = TrainingArguments(str(tmp_path / "out"), optim="osd_adamw", report_to="none", use_cpu=True)
    state = TrainerState(global_step=5, log_history=[{"step": 5, "loss": 1.0}])
    return tmp_path / "out", create_osd_optimizer(model, rank=4), args, state, model


def test_registering_twice_wraps_once(monkeypatch):
    monkeypatch.setattr(Trainer, "push_to_hub", Trainer.push_to_hub)
    register_push()
    once = Trainer.push_to_hub
    register_push()
    assert Trainer.push_to_hub is once and once.__doc__ and once.__name__ == "push_to_hub"


def test_a_refresh_makes_a_card_and_later_only_its_section(run):
    folder = run[0]
    refresh_card(*run)
    card = (folder / "README.md").read_text()
    assert "| steps | 5 |" in card and "\n# out\n" in card
    run[3].global_step = 6
    refresh_card(*run)
    assert (folder / "README.md").read_text() == card.replace("| steps | 5 |", "| steps | 6 |")


def test_a_refresh_starts_from_what_a_user_wrote_on_the_hub(run, monkeypatch):
    asked = []

    def on_hub(*access):
        asked.append(access)
        return USERS

    monkeypatch.setattr(push, "_card_on_hub", on_hub)
    for _ in range(2):
        refresh_card(*run, repo_id="tester/model")
    assert asked == [("tester/model", None, None)]  # then there is a local one
    assert "My own words.\n\n" + START in (run[0] / "README.md").read_text()


def test_a_refresh_never_raises(run, caplog):
    folder = run[0]
    folder.mkdir()
    broken = "---\ntags: [a\n---\n# Mine\n"
    (folder / "README.md").write_text(broken)
    caplog.set_level(logging.WARNING, logger="hf_osd")
    refresh_card(*run)
    (record,) = caplog.records
    assert "README.md is left without news of this run: the metadata at the head" in record.getMessage()
    assert record.exc_info in (None, False) and (folder / "README.md").read_text() == broken


@pytest.fixture
def uploads(monkeypatch):
    """Instead of the stock push: makes the card and may fail."""
    calls = []

    def stock(self, commit_message="End of training", blocking=True, token=None, revision=None, fail=False, **kwargs):
        calls.append(vars(self).get("create_model_card"))
        self.create_model_card(model_name="out", **kwargs)
        if fail:
            raise ConnectionError("no Hub")
        return "pushed"

    monkeypatch.setattr(Trainer, "push_to_hub", stock)
    register_push()
    return calls


def trainer_of(run, kind=Trainer, optimizer=None):
    _, osd, args, state, model = run
    trainer = kind(model, args, optimizers=(optimizer or osd, None))
    trainer.state = state
    trainer.hub_model_id = "tester/out"
    run[0].mkdir(exist_ok=True)
    return trainer


def test_the_attribute_is_gone_after_a_failure_and_ones_own_is_back(run, uploads):
    trainer = trainer_of(run)
    with pytest.raises(ConnectionError, match="no Hub"):
        trainer.push_to_hub(fail=True)
    assert "create_model_card" not in vars(trainer) and uploads[0] is not None
    made = []
    own = trainer.create_model_card = lambda **kwargs: made.append(kwargs)
    assert trainer.push_to_hub("message", tags=["a"]) == "pushed"
    assert trainer.create_model_card is own and made == [{"model_name": "out", "tags": ["a"]}]


def test_without_our_optimizer_nothing_is_replaced(run, uploads):
    adamw = torch.optim.AdamW(run[-1].parameters())
    assert trainer_of(run, optimizer=adamw).push_to_hub() == "pushed"
    assert uploads == [None] and START not in (run[0] / "README.md").read_text()


def test_what_fails_in_our_part_does_not_fail_the_push(run, uploads, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("our mistake")

    monkeypatch.setattr(push, "update_card", broken)
    caplog.set_level(logging.WARNING, logger="hf_osd")
    assert trainer_of(run).push_to_hub() == "pushed"
    assert "our mistake" in caplog.text and TRAINERS in (run[0] / "README.md").read_text()
