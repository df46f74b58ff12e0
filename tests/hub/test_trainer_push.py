"""What a Trainer pushes: P beside the model it belongs to, of the same step, and other runs that start from it."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load as load_safetensors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_osd import OSDTrainer, OSDTrainingArguments
from hf_osd.hub import ProjectionState
from hf_osd.optim import OSD
from hub_server import run_client


REPO = "tester/run"
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
OSD_FILES = {"osd_config.json", "osd_projection.safetensors"}
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "training_args.bin"}
STATE_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
CARD_FILES = {"README.md", "osd_loss.png"}  # for people; other tests look at them


class Record(TrainerCallback):
    """The weights and every P after each step, by name."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.projections: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = dict(model.named_parameters())
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in parameters.items()}
        states = {name: getattr(optimizer, "optimizer", optimizer).state[p] for name, p in parameters.items()}
        self.projections[state.global_step] = {
            name: entry["projection"].clone() for name, entry in states.items() if "projection" in entry
        }


class WaitForPushes(TrainerCallback):
    """Steps that take longer than an upload, so that no save finds the push of the one before still under way."""

    trainer: Trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()


class At(TrainerCallback):
    """Does something before a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def tiny_llama(layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))


def rows(count: int = 32) -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 4, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def make_trainer(
    folder: Path | str,
    kind: type[Trainer] = Trainer,
    arguments: type[TrainingArguments] = TrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
    layers: int = 1,
    **given: Any,
) -> Trainer:
    """A Trainer of four steps that saves every second one."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "osd_adamw",
        "optim_args": "rank=4" if arguments is TrainingArguments else None,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "hub_model_id": REPO,
    }
    args = arguments(**{**defaults, **given})
    wait = WaitForPushes()
    trainer = kind(
        tiny_llama(layers), args, train_dataset=rows(), eval_dataset=rows(4), callbacks=[*(callbacks or []), wait]
    )
    wait.trainer = trainer
    return trainer


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """The client that transformers pushes with in this process; it speaks to the local server, as all others do."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    client = HfApi(endpoint=hub.endpoint, token=hub.token)
    monkeypatch.setattr("transformers.utils.hub._hf_api", client)
    return client


def step_of(weights: dict[str, Tensor], record: Record) -> int:
    """After which step the model had these weights."""
    found = [
        step
        for step, known in record.weights.items()
        if all(torch.equal(value, known[name]) for name, value in weights.items())
    ]
    assert len(found) == 1 and weights
    return found[0]


def check_set(files: dict[str, bytes], record: Record, scratch: Path, names: set[str]) -> int:
    """Whether these are `names`, with P of the model's step, as the optimizer held it; returns the step."""
    assert files.keys() - CARD_FILES == names
    step = step_of(load_safetensors(files["model.safetensors"]), record)
    for name, content in files.items():
        (scratch / name).write_bytes(content)
    state = ProjectionState.from_pretrained(scratch)  # compares sizes and hashes
    assert state.config["step"] == step
    wanted = record.projections[step]
    assert len(wanted) == 7 and state.keys() == wanted.keys()
    assert all(torch.equal(state[name].projection, P) for name, P in wanted.items())
    if "trainer_state.json" in files:
        assert json.loads(files["trainer_state.json"])["global_step"] == step
    if "optimizer.pt" in files:
        saved = torch.load(scratch / "optimizer.pt", weights_only=True)
        indices = {
            name: index
            for group in saved["param_groups"]
            for name, index in zip(group["param_names"], group["params"], strict=True)
        }
        assert all(torch.equal(saved["state"][indices[name]]["projection"], P) for name, P in wanted.items())
    return step


def folder_of(files: dict[str, bytes], folder: str = "") -> dict[str, bytes]:
    """The files directly in a folder of a repository."""
    start = f"{folder}/" if folder else ""
    inside = {path.removeprefix(start): content for path, content in files.items() if path.startswith(start)}
    return {path: content for path, content in inside.items() if "/" not in path}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


CHECKPOINT_FILES = MODEL_FILES | OSD_FILES | STATE_FILES | {"trainer_state.json"}
ROOT_FILES = MODEL_FILES | OSD_FILES


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_pushes_p_with_its_model(strategy, hub, client, tmp_path):
    record = Record()
    folder, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    trainer = make_trainer(folder, push_to_hub=True, hub_strategy=strategy, callbacks=[record])
    trainer.train()
    for step in (2, 4):
        assert check_set(on_disk(folder / f"checkpoint-{step}"), record, scratch, CHECKPOINT_FILES) == step

    pushed = [commit for commit in reversed(hub.commits(REPO)) if commit.title != "initial commit"]
    titles = [commit.title for commit in pushed]
    saves = [f"Training in progress, step {step}" for step in (2, 4)]
    with_checkpoints = [title for save in saves for title in (save, f"{save}, checkpoint")]
    assert titles == {"end": [], "every_save": saves}.get(strategy, with_checkpoints)
    for commit in pushed:
        step = int(re.search(r"step (\d+)", commit.title)[1])
        files = hub.files(REPO, commit.oid)
        assert check_set(folder_of(files), record, scratch, ROOT_FILES) == step
        if commit.title.endswith("checkpoint"):
            name = "last-checkpoint" if strategy == "checkpoint" else f"checkpoint-{step}"
            assert check_set(folder_of(files, name), record, scratch, CHECKPOINT_FILES) == step

    trainer.push_to_hub()
    files = hub.files(REPO)
    assert check_set(folder_of(files), record, scratch, ROOT_FILES) == 4
    assert hub.commits(REPO)[0].title == "End of training"
    folders = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert {path.rpartition("/")[0] for path in files} == {""} | folders.get(strategy, set())
    assert any(request.startswith("PUT /lfs") for request in hub.requests)


def test_osd_trainer_with_typed_arguments(hub, client, tmp_path):
    record = Record()
    trainer = make_trainer(
        *(tmp_path / "out", OSDTrainer, OSDTrainingArguments, [record]),
        osd_rank=4,
        optim="osd_lion",
        push_to_hub=True,
        hub_strategy="all_checkpoints",
    )
    trainer.train()
    trainer.save_model()  # which pushes
    files = hub.files(REPO)
    assert check_set(folder_of(files), record, tmp_path, ROOT_FILES) == 4
    for step in (2, 4):
        assert check_set(folder_of(files, f"checkpoint-{step}"), record, tmp_path, CHECKPOINT_FILES) == step
    assert json.loads(files["osd_config.json"])["optim"] == "osd_lion"


@pytest.mark.parametrize("always", [False, True])
def test_saves_while_a_push_is_under_way(always, hub, client, tmp_path, monkeypatch):
    """No upload gets anywhere until training has ended."""
    ended, create_commit = threading.Event(), client.create_commit

    def wait_and_commit(*args, **options):
        assert ended.wait(60)
        return create_commit(*args, **options)

    class End(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            ended.set()

    monkeypatch.setattr(client, "create_commit", wait_and_commit)
    monkeypatch.setattr(WaitForPushes, "on_step_begin", TrainerCallback.on_step_begin)
    record, options = Record(), {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_steps": 1}
    trainer = make_trainer(tmp_path / "out", callbacks=[record, End()], hub_always_push=always, **options)
    trainer.train()
    files = hub.files(REPO)
    steps = (1, 2, 3, 4) if always else (1,)
    assert {path.rpartition("/")[0] for path in files} == {"", *(f"checkpoint-{step}" for step in steps)}
    for step in steps:
        assert check_set(folder_of(files, f"checkpoint-{step}"), record, tmp_path, CHECKPOINT_FILES) == step
    assert check_set(folder_of(files), record, tmp_path, ROOT_FILES) == steps[-1]
    trainer.push_to_hub()
    assert check_set(folder_of(hub.files(REPO)), record, tmp_path, ROOT_FILES) == 4


def test_an_upload_during_a_save_takes_no_unfinished_file(hub, client, tmp_path, monkeypatch):
    """With `hub_always_push` an earlier push may list the folder at any moment of a later save."""
    trainer = make_trainer(tmp_path / "out", push_to_hub=True, save_strategy="no")
    trainer.train()
    seen: list[set[str]] = []
    original = os.replace

    def upload_and_replace(source, target):
        folder = Path(target).parent
        if folder == tmp_path / "out":
            seen.append({path.name for path in folder.iterdir()})
            client.upload_folder(repo_id=REPO, folder_path=folder, ignore_patterns=["_*", "checkpoint-*"])
        original(source, target)

    monkeypatch.setattr("hf_osd.hub.files.os.replace", upload_and_replace)
    trainer.push_to_hub()
    assert seen and all(names - ROOT_FILES for names in seen)
    for commit in hub.commits(REPO):
        assert set(hub.files(REPO, commit.oid)) <= ROOT_FILES | CARD_FILES


@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_are_removed_whole(limit, hub, client, tmp_path):
    record = Record()
    options = {"save_total_limit": limit, "save_steps": 1, "push_to_hub": True, "hub_strategy": "checkpoint"}
    make_trainer(tmp_path / "out", callbacks=[record], **options).train()
    kept = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert [int(path.name.split("-")[1]) for path in kept] == list(range(5 - limit, 5))
    for path in kept:
        check_set(on_disk(path), record, tmp_path, CHECKPOINT_FILES)
    files = hub.files(REPO)
    assert check_set(folder_of(files), record, tmp_path, ROOT_FILES) == 4
    assert check_set(folder_of(files, "last-checkpoint"), record, tmp_path, CHECKPOINT_FILES) == 4


def test_checkpoints_with_the_model_only(hub, client, tmp_path):
    record = Record()
    options = {"save_only_model": True, "push_to_hub": True, "hub_strategy": "all_checkpoints"}
    make_trainer(tmp_path / "out", callbacks=[record], **options).train()
    files = hub.files(REPO)
    for step in (2, 4):
        names = ROOT_FILES | {"trainer_state.json"}
        assert check_set(on_disk(tmp_path / "out" / f"checkpoint-{step}"), record, tmp_path, names) == step
        assert check_set(folder_of(files, f"checkpoint-{step}"), record, tmp_path, names) == step


def test_a_push_without_checkpoints_into_a_private_repository(hub, client, tmp_path):
    record = Record()
    options = {"save_strategy": "no", "hub_private_repo": True}
    trainer = make_trainer(tmp_path / "out", callbacks=[record], **options)
    trainer.train()
    assert hub.repos == {}
    trainer.push_to_hub()
    assert hub.repos[REPO].private
    assert check_set(hub.files(REPO), record, tmp_path, ROOT_FILES) == 4


def test_saves_by_epoch(hub, client, tmp_path):
    record = Record()
    options = {"save_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 16}
    make_trainer(tmp_path / "out", callbacks=[record], push_to_hub=True, **options).train()
    epochs = [commit for commit in hub.commits(REPO) if "epoch" in commit.title]
    assert [commit.title[-1] for commit in epochs] == ["2", "1"]
    steps = [check_set(hub.files(REPO, commit.oid), record, tmp_path, ROOT_FILES) for commit in epochs]
    assert steps == [4, 2]


def test_the_best_model_is_pushed_with_its_own_p(hub, client, tmp_path):
    class Worsens(Trainer):
        """Every evaluation is worse than the one before."""

        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_loss": float(self.state.global_step)}

    record = Record()
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path / "out", Worsens, callbacks=[record], push_to_hub=True, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.push_to_hub()
    assert check_set(hub.files(REPO), record, tmp_path, ROOT_FILES) == 2


def test_training_again_replaces_p(hub, client, tmp_path):
    """The second run of a Trainer reaches the same steps, in the same folders, with other P."""
    trainer = make_trainer(tmp_path / "out", push_to_hub=True, hub_strategy="all_checkpoints")
    trainer.train()
    trainer.push_to_hub()
    record = Record()
    trainer.add_callback(record)
    trainer.train()
    trainer.push_to_hub()
    for step in (2, 4):
        saved = ProjectionState.from_pretrained(tmp_path / "out" / f"checkpoint-{step}").initial_projections()
        assert all(torch.equal(saved[name], P) for name, P in record.projections[step].items())
    (tmp_path / "osd_config.json").write_bytes(hub.files(REPO)["osd_config.json"])
    (tmp_path / "osd_projection.safetensors").write_bytes(hub.files(REPO)["osd_projection.safetensors"])
    saved = ProjectionState.from_pretrained(tmp_path).initial_projections()
    assert all(torch.equal(saved[name], P) for name, P in record.projections[4].items())


def test_other_optimizers_push_none(hub, client, tmp_path):
    options = {"optim": "adamw_torch", "optim_args": None, "push_to_hub": True, "hub_strategy": "all_checkpoints"}
    trainer = make_trainer(tmp_path / "out", **options)
    trainer.train()
    trainer.push_to_hub()
    assert {"model.safetensors", "checkpoint-4/model.safetensors"} <= set(hub.files(REPO))
    assert not any("osd_" in path for path in hub.files(REPO)) and not list(tmp_path.rglob("osd_*"))


# Failures


def test_a_wrong_token_is_refused_before_training(hub, client, tmp_path):
    with pytest.raises(HfHubHTTPError) as stock:
        make_trainer(tmp_path, optim="adamw_torch", optim_args=None, push_to_hub=True, hub_token="hf_wrong")
    with pytest.raises(HfHubHTTPError) as ours:
        make_trainer(tmp_path, push_to_hub=True, hub_token="hf_wrong")
    assert ours.value.response.status_code == stock.value.response.status_code == 401
    assert type(ours.value) is type(stock.value)


def test_a_wrong_token_at_the_end_loses_nothing(hub, client, tmp_path):
    record = Record()
    trainer = make_trainer(tmp_path / "out", callbacks=[record])
    trainer.train()
    with pytest.raises(HfHubHTTPError, match="401"):
        trainer.push_to_hub(token="hf_wrong")
    assert hub.repos == {}
    assert check_set(on_disk(tmp_path / "out" / "checkpoint-4"), record, tmp_path, CHECKPOINT_FILES) == 4
    trainer.push_to_hub()
    assert check_set(hub.files(REPO), record, tmp_path, ROOT_FILES) == 4


@pytest.mark.parametrize("failure", ["busy", "cut"])
@pytest.mark.parametrize("request_", ["preupload", "PUT /lfs", "/commit/"])
def test_a_push_that_fails_is_made_good_by_the_next(request_, failure, hub, client, tmp_path, client_waits_little):
    def break_down():
        (hub.fail_next if failure == "busy" else hub.cut_connection)(n=1000, match=request_)

    record = Record()
    options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "callbacks": [record, At(1, break_down)]}
    trainer = make_trainer(tmp_path / "out", **options)
    trainer.add_callback(At(3, hub.heal))  # after the wait for the push of step 2
    result = trainer.train()
    assert result.global_step == 4 and sorted(record.weights) == [1, 2, 3, 4]
    assert sum(request_ in request for request in hub.requests) >= 2
    files = hub.files(REPO)
    pushed = [commit.title for commit in hub.commits(REPO) if commit.title != "initial commit"]
    assert pushed == ["Training in progress, step 4, checkpoint", "Training in progress, step 4"]
    assert check_set(folder_of(files), record, tmp_path, ROOT_FILES) == 4
    assert check_set(folder_of(files, "checkpoint-4"), record, tmp_path, CHECKPOINT_FILES) == 4
    assert check_set(on_disk(tmp_path / "out" / "checkpoint-2"), record, tmp_path, CHECKPOINT_FILES) == 2


# Other processes


XET = """
import torch
from test_trainer_push import Record, make_trainer
record = Record()
trainer = make_trainer("out", callbacks=[record], push_to_hub=True, hub_strategy="checkpoint")
trainer.train()
trainer.push_to_hub()
torch.save((record.weights, record.projections), "record.pt")
"""
PATH = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])


def test_xet(hub, tmp_path):
    pytest.importorskip("hf_xet")
    run_client(XET, hub, PYTHONPATH=PATH, HF_HUB_DISABLE_XET="0")
    record = Record()
    record.weights, record.projections = torch.load(hub.directory / "client" / "record.pt")
    files = hub.files(REPO)
    assert check_set(folder_of(files), record, tmp_path, ROOT_FILES) == 4
    assert check_set(folder_of(files, "last-checkpoint"), record, tmp_path, CHECKPOINT_FILES) == 4
    assert any("xet-write-token" in request for request in hub.requests)
    assert not any("PUT /lfs" in request for request in hub.requests)


TWO = """
import os, torch
from hf_osd.hub import ProjectionState
from test_trainer_push import Record, make_trainer
folders, original = [], ProjectionState.save_pretrained
def save_pretrained(self, folder, **options):
    folders.append(os.path.basename(folder))
    return original(self, folder, **options)
ProjectionState.save_pretrained = save_pretrained
record = Record()
trainer = make_trainer("out", callbacks=[record], push_to_hub=True, hub_strategy="all_checkpoints")
trainer.train()
assert trainer.args.world_size == 2
trainer.push_to_hub()
weights = {step: {name.removeprefix("module."): p for name, p in ps.items()} for step, ps in record.weights.items()}
projections = {step: {name.removeprefix("module."): P for name, P in ps.items()} for step, ps in
               record.projections.items()}
torch.save((weights, projections, folders), f"record_{trainer.args.process_index}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_write_and_push_p_once(hub, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PATH,
    }
    done = subprocess.run(
        [*launcher, "two.py"], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = Record()
    record.weights, record.projections, folders = torch.load(tmp_path / "record_0.pt")
    assert folders == ["checkpoint-2", "out", "checkpoint-4", "out"]
    assert torch.load(tmp_path / "record_1.pt")[2] == []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    names = (CHECKPOINT_FILES - {"rng_state.pth"}) | {"rng_state_0.pth", "rng_state_1.pth"}
    for step in (2, 4):
        check_set(on_disk(tmp_path / "out" / f"checkpoint-{step}"), record, scratch, names)
    files = hub.files(REPO)
    assert check_set(folder_of(files), record, scratch, ROOT_FILES) == 4
    titles = [commit.title for commit in hub.commits(REPO)]
    assert len(titles) == len(set(titles)) == 6  # one process has pushed: two saves, their checkpoints, the end


START = """
import pytest, torch
from hf_osd import OSDTrainer, OSDTrainingArguments, create_osd_optimizer
from hf_osd.hub import ProjectionState
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from test_trainer_push import REPO, make_trainer, projections_of, rows, tiny_llama

wanted, revisions = torch.load("wanted.pt")

def same(got, step):
    return got.keys() == wanted[step].keys() and all(torch.equal(got[name], P) for name, P in wanted[step].items())

# Reading
with pytest.raises(LocalEntryNotFoundError):
    ProjectionState.from_pretrained(REPO, local_files_only=True)
for token in (False, "hf_wrong", "hf_other"):  # none, unknown, another user's
    with pytest.raises(OSError) as error:
        ProjectionState.from_pretrained(REPO, token=token)
    assert isinstance(error.value, HfHubHTTPError) and error.value.response.status_code in (401, 404), error.value
states = {step: ProjectionState.from_pretrained(REPO, revision=oid) for step, oid in revisions.items()}
assert all(state.config["step"] == step and same(state.initial_projections(), step) for step, state in states.items())
main = ProjectionState.from_pretrained(REPO, token="hf_tester")
assert main.config["step"] == 4
cached = ProjectionState.from_pretrained(REPO, local_files_only=True, token=False)
assert same(cached.initial_projections(), 4)
for step in (2, 4):
    checkpoint = ProjectionState.from_pretrained(REPO, subfolder=f"checkpoint-{step}")
    assert checkpoint.config["step"] == step and same(checkpoint.initial_projections(), step)

# Starting: with a learning rate of zero P is after the first step what it was before
options = {"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no"}
for optim_args in (f"init={REPO}", f"rank=4,init={REPO}"):
    trainer = make_trainer("new", optim_args=optim_args, **options)
    trainer.train()
    assert same(projections_of(trainer.model, trainer.optimizer), 4)
typed = {"osd_init": REPO, "osd_rank": 4, "optim": "osd_lion"}
trainer = make_trainer("new", OSDTrainer, OSDTrainingArguments, **options, **typed)
trainer.train()
assert same(projections_of(trainer.model, trainer.optimizer), 4)
model = tiny_llama()
optimizer = create_osd_optimizer(model, lr=0.0, rank=4, init=states[2])
model(**{name: value[None] for name, value in rows()[0].items()}).loss.backward()
optimizer.step()
assert same(projections_of(model, optimizer), 2)

# What does not fit
for arguments in ({"optim_args": f"init={REPO}", "layers": 2}, {"optim_args": f"rank=4,init={REPO}", "layers": 2}):
    with pytest.raises(ValueError, match="`init` has no P for model.layers.1.self_attn.q_proj.weight, "):
        make_trainer("new", **options, **arguments).train()
rank = r"`init` for model.layers.0.self_attn.q_proj.weight must be .* shape \\(16, 3\\), got shape \\(16, 4\\)"
with pytest.raises(ValueError, match=rank):
    make_trainer("new", optim_args=f"rank=3,init={REPO}", **options).train()
with pytest.raises(ValueError, match=rank):
    make_trainer("new", OSDTrainer, OSDTrainingArguments, osd_init=REPO, osd_rank=3, **options).train()
with pytest.raises(ValueError, match=rank):
    create_osd_optimizer(tiny_llama(), rank=3, init=main)
with pytest.raises(ValueError, match="has no P for"):
    create_osd_optimizer(tiny_llama(2), rank=4, init=main)
with pytest.raises(RepositoryNotFoundError):
    make_trainer("new", optim_args="rank=4,init=tester/missing", **options).train()
"""


def projections_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    osd = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(osd, OSD)
    states = {name: osd.state[p] for name, p in model.named_parameters()}
    return {name: state["projection"] for name, state in states.items() if "projection" in state}


def test_a_new_process_starts_from_what_was_pushed(hub, client, tmp_path):
    hub.add_user("other")
    record = Record()
    options = {"push_to_hub": True, "hub_private_repo": True, "hub_strategy": "all_checkpoints"}
    make_trainer(tmp_path / "out", callbacks=[record], **options).train()
    revisions = {
        step: next(commit.oid for commit in hub.commits(REPO) if commit.title.endswith(f"step {step}"))
        for step in (2, 4)
    }
    (hub.directory / "client").mkdir()
    torch.save((record.projections, revisions), hub.directory / "client" / "wanted.pt")
    run_client(START, hub, PYTHONPATH=PATH, HF_HUB_DISABLE_XET="1")
