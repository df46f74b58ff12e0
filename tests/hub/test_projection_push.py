"""A push of P is one commit that touches its own files only; a download reads the files of one commit."""

from pathlib import Path

import pytest
from projection_sets import assert_same, some_state

from hf_osd.hub import ProjectionFileError, ProjectionState
from hub_server import run_client


class FakeApi:
    """Records what is asked of the Hub."""

    present: list[str] = []
    calls: list[tuple] = []

    def __init__(self, **kwargs):
        pass

    def create_repo(self, repo_id, **kwargs):
        from huggingface_hub import RepoUrl

        self.calls.append(("create_repo", kwargs))
        return RepoUrl(f"https://huggingface.co/user/{repo_id}")

    def create_branch(self, repo_id, **kwargs):
        self.calls.append(("create_branch", kwargs))

    def list_repo_files(self, repo_id, revision):
        return self.present

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            if hasattr(operation, "path_or_fileobj"):
                assert Path(operation.path_or_fileobj).is_file()
        changes = {op.path_in_repo: type(op).__name__.removeprefix("CommitOperation") for op in operations}
        self.calls.append(("create_commit", repo_id, changes, kwargs))
        return "commit"


def test_a_push_is_one_commit_that_touches_its_own_files_only(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    theirs = ["README.md", "model.safetensors", "osd_notes.txt", "old/osd_projection.safetensors"]
    stale = ["osd_projection-00001-of-00001.safetensors", "osd_projection.safetensors.index.json"]
    monkeypatch.setattr(FakeApi, "present", [*theirs, *stale, "osd_config.json", "osd_projection.safetensors"])
    assert some_state().push_to_hub("name", private=True, revision="branch", commit_message="words") == "commit"
    names, commit = [call[0] for call in FakeApi.calls], FakeApi.calls[-1]
    assert names == ["create_repo", "create_branch", "create_commit"] and FakeApi.calls[0][1]["private"] is True
    assert commit[1] == "user/name" and commit[3]["revision"] == "branch" and commit[3]["commit_message"] == "words"
    assert commit[2] == dict.fromkeys(stale, "Delete") | {
        "osd_projection.safetensors": "Add",
        "osd_config.json": "Add",
    }


def test_all_files_come_from_the_commit_of_the_config(monkeypatch, tmp_path):
    commit, asked = "0123456789abcdef0123456789abcdef01234567", []
    snapshot = tmp_path / "snapshots" / commit
    some_state().save_pretrained(snapshot / "checkpoint-5", max_shard_size=200)

    def download(repo_id, filename, *, subfolder, revision, **kwargs):
        asked.append((repo_id, filename, subfolder, revision, kwargs["token"]))
        return str(snapshot / subfolder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    state = ProjectionState.from_pretrained("user/name", revision="main", subfolder="checkpoint-5", token="secret")
    assert_same(some_state(), state)
    assert asked[0] == ("user/name", "osd_config.json", "checkpoint-5", "main", "secret")
    assert len(asked) > 3 and {call[3] for call in asked[1:]} == {commit}


def test_a_repository_without_p_and_an_id_that_is_none(monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    def absent(*args, **kwargs):
        raise EntryNotFoundError("404")

    with pytest.raises(ProjectionFileError, match="neither a folder nor the id of a repository"):
        ProjectionState.from_pretrained("no/such/folder")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    with pytest.raises(ProjectionFileError, match="osd_config.json is missing in user/name"):
        ProjectionState.from_pretrained("user/name")


ON_THE_HUB = """
import torch
from huggingface_hub import HfApi
from hf_osd.hub import Projection, ProjectionFileError, ProjectionState

def state(step):
    torch.manual_seed(step)
    entries = {name: Projection(torch.randn(6, 3), "left", 3, (6, 10)) for name in ("a.weight", "b.weight")}
    return ProjectionState(entries, {"step": step})

def same(one, other):
    return one.config == other.config and all(torch.equal(one[n].projection, other[n].projection) for n in one)

repo = "tester/model"
first = state(1).push_to_hub(repo, max_shard_size=80)
assert same(ProjectionState.from_pretrained(repo), state(1))
state(2).push_to_hub(repo)
assert same(ProjectionState.from_pretrained(repo), state(2))
assert same(ProjectionState.from_pretrained(repo, revision=first.oid), state(1))
state(3).push_to_hub(repo, revision="other")
assert same(ProjectionState.from_pretrained(repo, revision="other"), state(3))
pull = state(4).push_to_hub(repo, create_pr=True)
assert same(ProjectionState.from_pretrained(repo, revision=pull.pr_revision), state(4))
assert same(ProjectionState.from_pretrained(repo, local_files_only=True), state(2))
state(5).push_to_hub("tester/new", private=True)
assert HfApi().repo_info("tester/new").private
assert same(ProjectionState.from_pretrained("tester/new"), state(5))
HfApi().upload_file(path_or_fileobj=b"damaged", path_in_repo="osd_projection.safetensors", repo_id="tester/new")
try:
    ProjectionState.from_pretrained("tester/new")
except ProjectionFileError as error:
    assert "has 7 bytes, osd_config.json says" in str(error), error
else:
    raise AssertionError
"""


def test_a_push_and_a_download(hub, put):
    put("README.md", b"my words")
    put("model.safetensors", b"weights")
    run_client(ON_THE_HUB, hub)
    files = hub.files("tester/model")
    assert files.keys() - {".gitattributes"} == {
        "README.md",
        "model.safetensors",
        "osd_config.json",
        "osd_projection.safetensors",
    }
    assert files["README.md"] == b"my words" and files["model.safetensors"] == b"weights"
    assert set(hub.files("tester/new")) - {".gitattributes"} == {"osd_config.json", "osd_projection.safetensors"}
    assert sum("Upload the projections" in str(commit) for commit in hub.commits("tester/model")) == 2  # one a push
