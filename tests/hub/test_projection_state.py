"""P goes to files and back exactly, an interrupted save is never mistaken for a whole one, nothing else is touched."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_osd import OSD, create_osd_optimizer
from hf_osd.hub import Projection, ProjectionFileError, ProjectionState, projection_bytes
from hf_osd.hub.analysis import orthogonality, orthonormal_basis, share_of_change
from hub_server import run_client


def projection(m=6, n=10, rank=3, side="left", dtype=torch.float32, seed=0, **moments):
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(m if side == "left" else n, rank, generator=generator).to(dtype)
    return Projection(P, side, rank, (m, n), moments)


def some_state(seed=0, count=4):
    entries = {f"layers.{i}.weight": projection(side=("left", "right")[i % 2], seed=seed + i) for i in range(count)}
    return ProjectionState(entries, {"weight_rule": "adamw", "lambda": 0.1, "step": seed})


def assert_same(one: ProjectionState, other: ProjectionState):
    assert list(one) == list(other) and one.config == other.config
    for name, entry in one.items():
        got = other[name]
        assert (got.side, got.rank, got.shape) == (entry.side, entry.rank, entry.shape)
        assert got.moments.keys() == entry.moments.keys()
        pairs = [(entry.projection, got.projection), *((v, got.moments[k]) for k, v in entry.moments.items())]
        for before, after in pairs:
            assert after.dtype == before.dtype and torch.equal(after, before)


def llama():
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    return LlamaForCausalLM(config)


def train(model, optimizer, steps=3):
    ids = torch.randint(0, 32, (2, 8))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=["one file", "sharded"])
def max_shard_size(request):
    return {"one file": "5GB", "sharded": 100}[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (6, 6)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_round_trip_is_exact(m, n, side, dtype, max_shard_size, tmp_path):
    moments = {"exp_avg": torch.randn((3, n) if side == "left" else (m, 3)), "step": torch.tensor(4.0)}
    state = ProjectionState(
        {"a.weight": projection(m, n, 3, side, dtype, **moments), "b.weight": projection(m, n, 2, side, dtype)}
    )
    names = state.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert ("osd_projection.safetensors" in names) == (max_shard_size == "5GB")
    assert_same(state, ProjectionState.from_pretrained(tmp_path))


@pytest.mark.parametrize("include_moments", [False, True])
@pytest.mark.parametrize("optim", ["osd_adamw", "osd_adafactor", "osd_lion"])
def test_what_an_optimizer_holds_comes_back(optim, include_moments, tmp_path):
    model = llama()
    optimizer = create_osd_optimizer(model, optim, rank=4, weight_decay=0.1)
    train(model, optimizer)
    state = ProjectionState.from_optimizer(optimizer, include_moments)
    state.save_pretrained(tmp_path)
    assert_same(state, ProjectionState.from_pretrained(tmp_path))
    parameters = dict(model.named_parameters())
    assert len(state) == 14 and "lm_head.weight" not in state
    for name, entry in state.items():
        held = dict(optimizer.state[parameters[name]])
        assert torch.equal(entry.projection, held.pop("projection")) and entry.shape == parameters[name].shape
        assert entry.moments.keys() == (held.keys() if include_moments else set())
        assert all(torch.equal(value, held[moment]) for moment, value in entry.moments.items())
    config = json.loads((tmp_path / "osd_config.json").read_text())
    wanted = {"format_version": 1, "optim": optim, "subspace": "online_pca", "rank": 4, "alpha": 5.0, "lambda": 0.1}
    assert wanted.items() <= config.items() and config["weight_decay"] == 0.1 and config["step"] == 3
    size = projection_bytes([entry.shape for entry in state.values()], 4, include_moments, weight_rule=optim[4:])
    assert size == sum(
        value.numel() * value.element_size()
        for entry in state.values()
        for value in (entry.projection, *entry.moments.values())
    )


def test_it_is_a_copy_and_starts_another_run(tmp_path):
    model = llama()
    optimizer = create_osd_optimizer(model, rank=4)
    train(model, optimizer)
    state = ProjectionState.from_optimizer(optimizer)
    before = {name: P.clone() for name, P in state.initial_projections().items()}
    train(model, optimizer)
    assert all(torch.equal(P, before[name]) for name, P in state.initial_projections().items())
    state.save_pretrained(tmp_path)
    initial = ProjectionState.from_pretrained(tmp_path).initial_projections()
    ids = torch.randint(0, 32, (2, 8))
    another = llama()
    again = create_osd_optimizer(another, rank=4, init=initial, subspace="static")
    another(input_ids=ids, labels=ids).loss.backward()
    again.step()
    for name, P in ProjectionState.from_optimizer(again).initial_projections().items():
        assert torch.equal(P, before[name])


def test_8bit_codes_are_kept_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.randn(64, 600))
    optimizer = OSD([{"params": [("w.weight", weight)], "rank": 8}], weight_rule="adamw8bit")
    for _ in range(3):
        weight.grad = torch.randn(64, 600)
        optimizer.step()
    state = ProjectionState.from_optimizer(optimizer, include_moments=True)
    codes = state["w.weight"].moments["exp_avg"]
    assert codes.dtype == torch.uint8 and len(codes.unique()) > 10 and "exp_avg_absmax" in state["w.weight"].moments
    state.save_pretrained(tmp_path)
    assert_same(state, ProjectionState.from_pretrained(tmp_path))
    size = projection_bytes([(64, 600)], 8, include_moments=True, weight_rule="adamw8bit")
    assert size == sum(v.numel() * v.element_size() for v in optimizer.state[weight].values())


def test_without_moments_they_are_left_out(tmp_path):
    state = ProjectionState({"a": projection(step=torch.tensor(2.0))})
    state.save_pretrained(tmp_path, include_moments=False)
    assert ProjectionState.from_pretrained(tmp_path)["a"].moments == {}


def test_it_is_a_mapping_that_does_not_change():
    state = some_state()
    assert len(state) == 4 and list(state) == [f"layers.{i}.weight" for i in range(4)] and "x" not in state
    assert state["layers.1.weight"].side == "right" and state.get("x") is None
    assert repr(state) == "ProjectionState(4 projections, rank 3)"
    state.config["weight_rule"] = "lion"
    assert state.config["weight_rule"] == "adamw"
    with pytest.raises(TypeError):
        state["x"] = projection()
    with pytest.raises(AttributeError):
        state["layers.0.weight"].rank = 5
    with pytest.raises(KeyError):
        state["x"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "at least one"),
        ({"../a": projection()}, "looks like a path"),
        ({"a::b": projection()}, "is reserved"),
        ({"a": projection(rank=7)}, "rank 7, larger than its matrix"),
        ({"a": Projection(torch.zeros(6, 3), "up", 3, (6, 10))}, "side 'up', expected left or right"),
        ({"a": Projection(torch.zeros(10, 3), "left", 3, (6, 10))}, r"must have the shape \(6, 3\), got \(10, 3\)"),
        ({"a": projection(dtype=torch.float16)}, "got torch.float16"),
        ({"a": projection(exp_avg=torch.zeros(6, 10))}, r"exp_avg of a cannot be torch.float32 of shape \(6, 10\)"),
        ({"a": projection(step=torch.tensor(1))}, r"step of a cannot be torch.int64 of shape \(\)"),
        (
            {"a": Projection(torch.full((6, 3), torch.nan), "left", 3, (6, 10))},
            "P of a has values that are not finite",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(entries, message):
    with pytest.raises(ValueError, match=message):
        ProjectionState(entries)


def test_from_optimizer_says_what_it_needs():
    weight = torch.nn.Parameter(torch.randn(6, 10))
    with pytest.raises(ValueError, match="needs an OSD optimizer, got SGD"):
        ProjectionState.from_optimizer(torch.optim.SGD([weight], lr=1.0))
    with pytest.raises(ValueError, match="projects nothing"):
        ProjectionState.from_optimizer(OSD([weight]))
    with pytest.raises(ValueError, match="have no names.*create_osd_optimizer"):
        ProjectionState.from_optimizer(OSD([weight], rank=2))
    optimizer = OSD([("a", weight), ("b", torch.nn.Parameter(torch.randn(6, 10)))], rank=2)
    with pytest.raises(ValueError, match="No projected parameter has been stepped yet"):
        ProjectionState.from_optimizer(optimizer)
    weight.grad = torch.zeros(6, 10)  # a zero gradient starts no P
    optimizer.step()
    with pytest.raises(ValueError, match="No projected parameter has been stepped yet"):
        ProjectionState.from_optimizer(optimizer)
    weight.grad = torch.randn(6, 10)
    optimizer.step()
    assert list(ProjectionState.from_optimizer(optimizer)) == ["a"]  # b has had no gradient


def test_options_that_groups_do_not_share_are_null():
    groups = []
    for name, rank in (("a", 2), ("b", 3)):
        weight = torch.nn.Parameter(torch.randn(6, 10))
        weight.grad = torch.randn(6, 10)
        groups.append({"params": [(name, weight)], "rank": rank})
    optimizer = OSD(groups, subspace="svd", update_interval=7)
    optimizer.step()
    state = ProjectionState.from_optimizer(optimizer)
    assert state.config["rank"] is None and state.config["update_interval"] == 7
    assert state.config["alpha"] is None and state.config["projection_rule"] is None  # an SVD does not learn
    assert [entry["rank"] for entry in state.config["parameters"].values()] == [2, 3]


SAVES = [pytest.param(a, b, id=f"{a} over {b}") for a in ("5GB", 200) for b in ("5GB", 200)]


@pytest.mark.parametrize(("new_size", "old_size"), SAVES)
def test_a_save_replaces_an_earlier_one_and_nothing_else(new_size, old_size, tmp_path):
    mine = {"README.md": "my words", "model.safetensors": "weights", "config.json": "{}", "osd_notes.txt": "notes"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "osd_projection-00001-of-00002.safetensors.tmp").write_text("left over")
    some_state(seed=1, count=6).save_pretrained(tmp_path, max_shard_size=old_size)
    names = some_state(seed=2).save_pretrained(tmp_path, max_shard_size=new_size)
    assert {path.name for path in tmp_path.iterdir()} == {*names, *mine}
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    assert_same(some_state(seed=2), ProjectionState.from_pretrained(tmp_path))


class Killed(BaseException):
    """Stands for SIGKILL: from one moment on, nothing more happens to the disk."""


class Killer:
    """Lets `allowed` changes of the disk happen, the last one of a data file half, and then no more."""

    def __init__(self, monkeypatch, allowed: int):
        import safetensors.torch

        self.left = allowed
        for owner, name in ((os, "replace"), (Path, "unlink"), (safetensors.torch, "save_file")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.left -= 1
            if self.left == -1 and function.__name__ == "save_file":
                Path(args[1]).write_bytes(b"half of it")
            if self.left < 0:
                raise Killed
            return function(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize(("new_size", "old_size"), SAVES)
def test_a_save_that_is_killed_leaves_the_old_set_or_a_clear_error(new_size, old_size, tmp_path):
    old, new = some_state(seed=1), some_state(seed=2)
    seen = []
    for allowed in range(100):
        folder = tmp_path / str(allowed)
        old.save_pretrained(folder, max_shard_size=old_size)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Killer(monkeypatch, allowed)
            try:
                new.save_pretrained(folder, max_shard_size=new_size)
                finished = True
            except Killed:
                finished = False
        try:
            found = ProjectionState.from_pretrained(folder)
            seen.append("old" if found.config["step"] == 1 else "new")
            assert_same(found, old if seen[-1] == "old" else new)
        except ProjectionFileError as error:
            assert "osd_config.json is missing" in str(error) and "interrupted" in str(error)
            seen.append("error")
        new.save_pretrained(folder, max_shard_size=new_size)  # the next save clears up
        assert_same(new, ProjectionState.from_pretrained(folder))
        assert not list(folder.glob("*.tmp"))
        if finished:
            break
    assert finished and seen[0] == "old" and seen[-1] == "new"
    assert seen == sorted(seen, key=["old", "error", "new"].index)
    assert ("error" in seen) == (new_size == old_size)  # files of other names do not end the old set


def test_a_full_disk_leaves_the_old_set(monkeypatch, tmp_path):
    import safetensors.torch

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    old = some_state(seed=1)
    names = old.save_pretrained(tmp_path)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        some_state(seed=2).save_pretrained(tmp_path)
    assert_same(old, ProjectionState.from_pretrained(tmp_path))
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())


def test_what_was_read_does_not_depend_on_the_files_any_more(tmp_path):
    some_state(seed=1).save_pretrained(tmp_path)
    found = ProjectionState.from_pretrained(tmp_path)
    with open(tmp_path / "osd_projection.safetensors", "r+b") as file:
        file.truncate(0)
    assert_same(some_state(seed=1), found)


def test_tensors_that_share_memory_are_written_each(max_shard_size, tmp_path):
    P = torch.randn(3, 6).mT  # not contiguous either
    state = ProjectionState({name: Projection(P, "left", 3, (6, 10)) for name in "abcd"})
    state.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert_same(state, ProjectionState.from_pretrained(tmp_path))


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_share_of_a_change_in_the_subspace(side):
    m, n, r = 8, 12, 3
    s = m if side == "left" else n
    Q = torch.linalg.qr(torch.randn(s, s)).Q
    P = Q[:, :r] @ torch.randn(r, r)  # far from orthonormal: only what it spans counts
    entry = Projection(P, side, r, (m, n))
    inside, outside = torch.randn(r, n if side == "left" else m), torch.randn(s - r, n if side == "left" else m)
    change = Q @ torch.cat([inside, outside])
    expected = float(inside.square().sum() / change.square().sum())
    # float32 sums of 96 numbers: 1e-5 is generous
    assert share_of_change(entry, change if side == "left" else change.mT) == pytest.approx(expected, abs=1e-5)
    assert share_of_change(entry, torch.zeros(m, n)) is None
    assert orthogonality(Q[:, :r]) == pytest.approx(0, abs=1e-6) and orthogonality(torch.zeros(s, r)) == 1
    assert orthonormal_basis(torch.cat([P, P[:, :1]], dim=1)).shape == (s, r)


def test_the_size_follows_from_shapes():
    assert projection_bytes([(4096, 11008), (32, 16)], rank=128) == 4 * (4096 * 128 + 16 * 16)
    assert projection_bytes([(8, 12)], rank=2, side="right", projection_dtype="bfloat16") == 2 * 12 * 2
    assert projection_bytes([], rank=2) == 0
    with pytest.raises(ValueError, match="`rank` of projection_bytes must be an integer >= 1"):
        projection_bytes([(8, 12)], rank=0)
    with pytest.raises(ValueError, match=r"\(m, n\) or \(E, m, n\)"):
        projection_bytes([(8,)], rank=2)


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
