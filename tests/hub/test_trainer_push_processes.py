"""Pushes from other processes: by Xet, by two ranks, and a run that starts from what another one has pushed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pushed_runs import CHECKPOINT_FILES, REPO, ROOT_FILES, Record, check_set, folder_of, make_trainer, on_disk

from hub_server import run_client


XET = """
import torch
from pushed_runs import Record, make_trainer
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
from pushed_runs import Record, make_trainer
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
from pushed_runs import REPO, make_trainer, projections_of, rows, tiny_llama

wanted, revisions = torch.load("wanted.pt")

def same(got, step):
    return got.keys() == wanted[step].keys() and all(torch.equal(got[name], P) for name, P in wanted[step].items())

# Reading
with pytest.raises(LocalEntryNotFoundError, match=f"{REPO} is no folder here"):
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
