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
from hf_osd.trainer.push import Destination, refresh_card
from hub_server import HubServer, run_client


USERS = "---\nlicense: mit\n---\n\n# Mine\n\nMy own words.\n"
TRAINERS = "generated automatically according to the information the Trainer had access to"

PUSHES = """
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import hf_osd
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
        name, optim=optim, optim_args="rank=4,preset=pretrain" if optim.startswith("osd") else None, max_steps=2,
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
push("like-trl-kept", LikeTrl, readme=USERS, checkpoint_card=True)
push("named", readme=USERS, tags="mine", language="en", license="apache-2.0", dataset_tags="some/data")
push("adamw", readme=USERS, optim="adamw_torch")
push("broken", readme=USERS + "<!-- hf_osd:start -->\\n")
try:
    push("fails", no_such_argument=1)
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
        names = ("stock", "kept", "started", "like-trl", "like-trl-kept", "named", "adamw", "broken")
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
    assert "| steps | 2 |" in card and "| preset | `pretrain` |" in card and "| optimizer | `osd_adamw` |" in card
    assert '.from_pretrained("tester/stock")' in card
    assert "| embeddings' over it | 16 |" in card and "embedding_lr_ratio=16" in card
    assert pushed.files["stock"][PICTURE_NAME].startswith(b"\x89PNG")
    assert {"model.safetensors", "config.json", "training_args.bin"} < set(pushed.files["stock"])
    assert not any(name.startswith("_") for name in pushed.files["stock"])


@pytest.mark.parametrize("name", ["kept", "started", "like-trl-kept"])
def test_a_users_text_is_kept(name, pushed):
    card = pushed.cards[name]
    assert "license: mit\n" in card and "\n---\n\n# Mine\n\nMy own words.\n\n" + START in card
    assert TRAINERS not in card and "Of trl" not in card
    assert (pushed.folder / name / "README.md").read_text() == card


def test_a_subclass_writes_its_card_anew_while_nobody_edits_it(pushed):
    card = pushed.cards["like-trl"]
    assert "\n# like-trl\n\nOf trl on other/data.\n\n" + START in card and TRAINERS not in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["trl", "online-subspace-descent", "hf_osd"]


def test_what_a_push_names_gets_into_a_users_metadata(pushed):
    data = yaml.safe_load(pushed.cards["named"].split("---")[1])
    assert data["license"] == "mit" and data["language"] == "en" and data["datasets"] == ["some/data"]
    assert data["tags"] == ["online-subspace-descent", "hf_osd", "mine"]


def test_other_optimizers_push_as_ever(pushed):
    assert START not in pushed.cards["adamw"] and TRAINERS in pushed.cards["adamw"]
    assert PICTURE_NAME not in pushed.files["adamw"]


def test_a_text_that_cannot_be_added_to_is_pushed_as_it_is(pushed):
    assert pushed.cards["broken"] == USERS + START + "\n"
    assert "model.safetensors" in pushed.files["broken"]


# In this process, without a Hub


@pytest.fixture
def on_hub(monkeypatch):
    """What the Hub has as README.md: a text, `None`, or an exception."""
    found = SimpleNamespace(card=None, asked=[])

    def card_on_hub(*access):
        found.asked.append(access)
        if isinstance(found.card, Exception):
            raise found.card
        return found.card

    monkeypatch.setattr(push, "card_on_hub", card_on_hub)
    return found


@pytest.fixture
def run(tmp_path, on_hub):
    """Everything that `refresh_card` needs, of a run that pushes."""
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model: nn.Module = LlamaForCausalLM(config)
    args = TrainingArguments(str(tmp_path / "out"), optim="osd_adamw", report_to="none", use_cpu=True)
    state = TrainerState(global_step=5, log_history=[{"step": 5, "loss": 1.0}])
    state.pushes_to = Destination("tester/out", "hf_tester", "main")
    return create_osd_optimizer(model, rank=4), args, state, model


@pytest.fixture
def readme(tmp_path):
    return tmp_path / "out" / "README.md"


def test_a_refresh_makes_a_card_and_later_only_its_section(run, readme):
    refresh_card(*run)
    card = readme.read_text()
    assert "| steps | 5 |" in card and "\n# out\n" in card
    run[2].global_step = 6
    refresh_card(*run)
    assert readme.read_text() == card.replace("| steps | 5 |", "| steps | 6 |")


def test_a_refresh_starts_from_what_a_user_wrote_on_the_hub(run, readme, on_hub):
    on_hub.card = USERS
    for _ in range(2):
        refresh_card(*run)
    assert on_hub.asked == [("tester/out", "hf_tester", "main")] * 2
    assert "My own words.\n\n" + START in readme.read_text() and readme.read_text().count(START) == 1


def test_without_a_push_under_way_there_is_nothing_to_refresh(run, readme, on_hub):
    del run[2].pushes_to
    refresh_card(*run)
    assert not on_hub.asked and not readme.exists()


@pytest.mark.parametrize("notes", ["", "[1]", "{", '{"a": true}'])
def test_notes_that_cannot_be_read_keep_every_text(notes, run, readme):
    readme.parent.mkdir()
    readme.write_text(USERS)
    readme.with_name(push.NOTES_NAME).write_text(notes)
    refresh_card(*run)
    assert "My own words.\n\n" + START in readme.read_text()


def test_a_refresh_never_raises(run, readme, caplog):
    readme.parent.mkdir()
    broken = "---\ntags: [a\n---\n# Mine\n"
    readme.write_text(broken)
    caplog.set_level(logging.WARNING, logger="hf_osd")
    refresh_card(*run)
    (record,) = caplog.records
    assert "README.md is left without news of this run: the metadata at the head" in record.getMessage()
    assert record.exc_info in (None, False) and readme.read_text() == broken


def trainer_of(run, kind=Trainer, optimizer=None):
    osd, args, state, model = run
    trainer = kind(model, args, optimizers=(optimizer or osd, None))
    trainer.state = state
    trainer.hub_model_id = "tester/out"
    Path(args.output_dir).mkdir(exist_ok=True)
    return trainer


def test_an_override_that_adds_to_trainers_card_is_made_once_and_renewed(run, readme):
    class Adds(Trainer):
        def create_model_card(self, *args, **kwargs):
            super().create_model_card(*args, **kwargs)
            with open(Path(self.args.output_dir, "README.md"), "a") as file:
                file.write("\nAn addition.\n")

    trainer = trainer_of(run, Adds)
    for step in (5, 6):
        trainer.state.global_step = step
        trainer.create_model_card(model_name="out")
        card = readme.read_text()
        assert (
            TRAINERS in card and card.count(START) == card.count("An addition.") == 1 and f"| steps | {step} |" in card
        )


def test_without_our_optimizer_nothing_is_added(run, readme, on_hub):
    trainer_of(run, optimizer=torch.optim.AdamW(run[-1].parameters())).create_model_card(model_name="out")
    assert TRAINERS in readme.read_text() and START not in readme.read_text() and not on_hub.asked


def test_what_fails_in_our_part_does_not_fail_the_push(run, readme, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("our mistake")

    monkeypatch.setattr(push, "update_card", broken)
    caplog.set_level(logging.WARNING, logger="hf_osd")
    trainer_of(run).create_model_card(model_name="out")
    assert "our mistake" in caplog.text and TRAINERS in readme.read_text()


def test_a_push_tells_its_token_and_revision_while_it_lasts(run, on_hub, monkeypatch):
    trainer = trainer_of(run)
    client = SimpleNamespace(upload_folder=lambda **given: "pushed")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: client)
    assert trainer.push_to_hub(token="hf_other", revision="side") == "pushed"
    assert on_hub.asked == [("tester/out", "hf_other", "side")] and not hasattr(trainer.state, "pushes_to")
    on_hub.card = ConnectionError("no Hub")
    assert trainer.push_to_hub() == "pushed"
    assert not Path(trainer.args.output_dir, "README.md").exists()
