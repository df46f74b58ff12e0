"""The local Hub answers the real client. In this process uploads go by LFS; Xet runs in client processes."""

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from hub_server import run_client
from hub_server.lfs import LFS_SIZE


REPO = "tester/model"


# Repositories


def test_create_and_delete(hub, api):
    assert api.whoami()["name"] == "tester"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO)
    again = api.create_repo(REPO, exist_ok=True)
    assert (again.repo_id, again.repo_type, again) == (REPO, "model", f"{hub.endpoint}/{REPO}")
    assert api.create_repo("short").repo_id == "tester/short"
    assert api.create_repo("tester/data", repo_type="dataset").repo_type == "dataset"
    assert sorted(hub.repos) == ["datasets/tester/data", REPO, "tester/short"]
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("somebody/model")

    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)
    api.delete_repo(REPO, missing_ok=True)


def test_tokens(hub, api, tmp_path):
    api.create_repo("tester/secret", private=True)
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_user("stranger"))
    anonymous = HfApi(endpoint=hub.endpoint, token=False)
    wrong = HfApi(endpoint=hub.endpoint, token="hf_wrong")

    assert api.model_info("tester/secret").private
    for client in (stranger, anonymous):
        assert client.model_info(REPO).private is False
        with pytest.raises(RepositoryNotFoundError):
            client.model_info("tester/secret")
        with pytest.raises(HfHubHTTPError, match="40[13]"):
            client.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=REPO)
    with pytest.raises(HfHubHTTPError, match="401") as refusal:
        wrong.model_info(REPO)
    assert not isinstance(refusal.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="[Ii]nvalid"):
        wrong.whoami()

    download = {"filename": ".gitattributes", "cache_dir": tmp_path, "endpoint": hub.endpoint}
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("tester/secret", token=stranger.token, **download)
    assert Path(hf_hub_download("tester/secret", token=hub.token, **download)).exists()

    api.update_repo_settings("tester/secret", private=False)
    assert anonymous.repo_exists("tester/secret")


def test_refs(hub, api, put):
    first = put("a.txt", b"1")
    api.create_tag(REPO, tag="v1", revision=first)
    api.create_branch(REPO, branch="step/100")
    second = put("a.txt", b"2", revision="step/100")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="step/100")
    api.create_branch(REPO, branch="step/100", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(REPO, branch="other", revision="absent")

    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "step/100": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    for revision in ("main", "v1", first, first[:7], "refs/heads/main"):
        assert hub.files(REPO, revision) == {"a.txt": b"1"}
        assert api.model_info(REPO, revision=revision).sha == first
    assert hub.files(REPO, "step/100") == {"a.txt": b"2"}
    assert [commit.commit_id for commit in api.list_repo_commits(REPO, revision="step/100")][:2] == [second, first]

    api.delete_branch(REPO, branch="step/100")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1")
    with pytest.raises(RevisionNotFoundError):
        put("a.txt", b"3", revision="step/100")


# Commits


def test_small_and_large_files(hub, api, put, tmp_path):
    large = b"\1" * (LFS_SIZE + 1)
    put("large.txt", large)
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "sub" / "model.safetensors").write_bytes(b"weights")
    api.upload_folder(folder_path=folder, repo_id=REPO, commit_message="folder")

    assert hub.files(REPO) == {
        "large.txt": large,
        "config.json": b"{}",
        "empty.safetensors": b"",
        "sub/model.safetensors": b"weights",
    }
    assert [commit.title for commit in hub.commits(REPO)][0::2] == ["folder", "initial commit"]
    files = {file.path: file for file in api.list_repo_tree(REPO, recursive=True)}
    assert {path for path, file in files.items() if getattr(file, "lfs", None)} == {
        "large.txt",
        "sub/model.safetensors",
    }
    assert files["large.txt"].lfs.sha256 == hashlib.sha256(large).hexdigest()
    assert files["large.txt"].size == len(large)
    assert "sub" in files and [file.path for file in api.list_repo_tree(REPO, "sub")] == ["sub/model.safetensors"]
    assert [item.path for item in api.get_paths_info(REPO, ["config.json", "sub", "absent"])] == ["config.json", "sub"]
    sizes = {file.rfilename: file.size for file in api.model_info(REPO, files_metadata=True).siblings}
    assert sizes["sub/model.safetensors"] == 7


def test_a_commit_adds_copies_and_deletes(hub, api, put):
    put("old/a.txt", b"a")
    put("old/b.bin", b"b")
    put("gone.txt", b"gone")
    api.create_commit(
        REPO,
        [
            CommitOperationAdd("new.txt", b"new"),
            CommitOperationCopy("old/b.bin", "copy.bin"),
            CommitOperationDelete("gone.txt"),
            CommitOperationDelete("old/"),
        ],
        commit_message="all at once",
        commit_description="for a reason",
    )
    assert hub.files(REPO) == {"new.txt": b"new", "copy.bin": b"b"}
    assert (hub.commits(REPO)[0].title, hub.commits(REPO)[0].message) == ("all at once", "for a reason")
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("gone.txt", REPO)


def test_unchanged_files_make_no_commit(hub, api, put):
    for path in ("a.txt", "a.safetensors"):
        oid = put(path, b"same")
        assert put(path, b"same") == oid
    assert len(hub.commits(REPO)) == 3

    del hub.requests[:]
    put("b.safetensors", b"same")  # a new file whose content is stored already
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_ignored_files_are_left_out(hub, api):
    api.create_commit(
        REPO,
        [CommitOperationAdd(path, b"checkpoint-*/\n") for path in (".gitignore", "checkpoint-5/a.bin", "a.txt")],
        commit_message="with .gitignore",
    )
    assert set(hub.files(REPO)) == {".gitignore", "a.txt"}


def test_parent_commit(hub, api, put):
    first = put("a.txt", b"1")
    second = put("a.txt", b"2", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="412"):
        put("a.txt", b"3", parent_commit=first)
    assert hub.commits(REPO)[0].oid == second


def test_pull_requests(hub, api, put, tmp_path):
    main = put("a.txt", b"1")
    made = api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=REPO, create_pr=True)
    assert (made.pr_url, made.pr_revision, made.pr_num) == (f"{hub.endpoint}/{REPO}/discussions/1", "refs/pr/1", 1)
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_user("stranger"))
    (tmp_path / "model.safetensors").write_bytes(b"better")
    theirs = stranger.upload_folder(folder_path=tmp_path, repo_id=REPO, create_pr=True, allow_patterns="*.safetensors")
    assert theirs.pr_revision == "refs/pr/2"
    put("b.txt", b"more", revision="refs/pr/1")

    assert hub.files(REPO) == {"a.txt": b"1"}
    assert hub.files(REPO, "refs/pr/1") == {"a.txt": b"2", "b.txt": b"more"}
    assert hub.files(REPO, "refs/pr/2") == {"a.txt": b"1", "model.safetensors": b"better"}
    assert hub.commits(REPO, "refs/pr/2")[1].oid == main
    assert api.get_discussion_details(REPO, 2).author == "stranger"
    assert len(api.list_repo_refs(REPO, include_pull_requests=True).pull_requests) == 2


# Downloads


def test_download_and_cache(hub, api, put, tmp_path):
    put("config.json", b"{}")
    first = put("sub/model.safetensors", b"weights")
    options = {"cache_dir": tmp_path / "cache", "endpoint": hub.endpoint, "token": hub.token}
    path = Path(hf_hub_download(REPO, "sub/model.safetensors", **options))
    assert path.read_bytes() == b"weights" and path.parent.parent.name == first

    folder = Path(snapshot_download(REPO, **options))
    assert folder.name == first
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {
        ".gitattributes",
        "config.json",
        "sub/model.safetensors",
    }
    del hub.requests[:]
    snapshot_download(REPO, **options)
    assert [request.split()[0] for request in hub.requests] == ["GET"]  # what is main? nothing else

    second = put("sub/model.safetensors", b"trained")
    assert Path(hf_hub_download(REPO, "sub/model.safetensors", **options)).read_bytes() == b"trained"
    old = hf_hub_download(REPO, "sub/model.safetensors", revision=first, **options)
    assert Path(old).read_bytes() == b"weights"
    local = snapshot_download(REPO, local_dir=tmp_path / "local", revision=second, allow_patterns="sub/*", **options)
    assert [path.name for path in Path(local, "sub").iterdir()] == ["model.safetensors"]


def test_what_does_not_exist(hub, api, put, tmp_path):
    put("a.txt", b"a")
    options = {"cache_dir": tmp_path, "endpoint": hub.endpoint, "token": hub.token}
    for repo_id in ("tester/absent", "absent"):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(repo_id, "a.txt", **options)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo_id)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "a.txt", revision="absent", **options)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="absent", **options)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "absent.txt", **options)
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "absent"))
    assert not api.file_exists(REPO, "absent.txt") and api.file_exists(REPO, "a.txt")
    assert len(list(tmp_path.rglob(".no_exist/*/absent.txt"))) == 1  # the answer named the commit


def test_ranges(hub, api, put):
    put("a.bin", bytes(range(100)))
    filesystem = HfFileSystem(endpoint=hub.endpoint, token=hub.token)
    with filesystem.open(f"{REPO}/a.bin", block_size=10) as file:
        file.seek(95)
        assert file.read() == bytes(range(95, 100))
    url = f"{hub.endpoint}/{REPO}/resolve/main/a.bin"
    for wanted, status, length in (("0-9", 206, 10), ("90-", 206, 10), ("-5", 206, 5), ("100-", 416, None)):
        answer = get_session().get(url, headers={"Range": f"bytes={wanted}"})
        assert answer.status_code == status
        assert length is None or len(answer.content) == length


# Model cards


def test_model_card(hub, api, put, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)  # `validate` knows no other way
    card = ModelCard("---\nlicense: apache-2.0\ntags: [osd]\nlibrary_name: transformers\n---\n# A model\n")
    card.validate()
    put("README.md", str(card).encode())
    info = api.model_info(REPO)
    assert (info.tags, info.library_name, info.card_data.license) == (["osd"], "transformers", "apache-2.0")
    for metadata in ("license: Apache 2.0", "tags: 3", "a: [", "model-index: [{}]"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            put("README.md", f"---\n{metadata}\n---\n".encode())


def test_model_card_in_its_own_process(hub):
    run_client(
        """
from huggingface_hub import HfApi, ModelCard
HfApi().create_repo("tester/model")
card = ModelCard("---\\nlicense: mit\\n---\\n# A model\\n")
card.push_to_hub("tester/model")
assert ModelCard.load("tester/model").data.license == "mit"
""",
        hub,
    )
    assert hub.files(REPO)["README.md"].endswith(b"# A model\n")
