"""A save replaces the one before as a whole; an interrupted one is never mistaken for a whole one."""

import os
from pathlib import Path

import pytest
from projection_sets import assert_same, some_state

from hf_osd.hub import ProjectionFileError, ProjectionState


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
