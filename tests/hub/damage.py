"""A good set of files, and ways to damage it: each is a function that is given the folder."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from hf_osd.hub import Projection, ProjectionState


CONFIG, DATA, INDEX = "osd_config.json", "osd_projection.safetensors", "osd_projection.safetensors.index.json"
SHARDS = [f"osd_projection-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def save(folder: Path, max_shard_size: int | str, seed: int = 0) -> None:
    torch.manual_seed(seed)
    moments = {"exp_avg": torch.randn(3, 10), "step": torch.tensor(2.0)}
    entries = {
        "a.weight": Projection(torch.randn(6, 3), "left", 3, (6, 10), moments),
        "b.weight": Projection(torch.randn(6, 3), "right", 3, (10, 6)),
        "c.weight": Projection(torch.randn(8, 2).bfloat16(), "left", 2, (8, 8)),
    }
    ProjectionState(entries, {"weight_rule": "adamw", "step": 2}).save_pretrained(
        folder, max_shard_size=max_shard_size
    )


def seal(folder: Path) -> None:
    """Make the config vouch for the data files as they are now: the work of whoever changes a file on purpose."""

    def vouch(config: dict) -> None:
        for name in config["files"]:
            data = (folder / name).read_bytes()
            config["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit(folder / CONFIG, vouch)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / CONFIG, change)


def entry(**values) -> Callable[[Path], None]:
    """Change what the config says of a.weight."""
    return config(lambda value: value["parameters"]["a.weight"].update(values))


def renamed(name: str) -> Callable[[Path], None]:
    """Give a.weight another name in the config."""
    return config(lambda value: value["parameters"].update({name: value["parameters"].pop("a.weight")}))


def top(**values) -> Callable[[Path], None]:
    return config(lambda value: value.update(values))


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def bad(folder: Path) -> None:
        edit(folder / INDEX, change)
        seal(folder)

    return bad


def weight_map(**values) -> Callable[[Path], None]:
    return index(lambda value: value["weight_map"].update({key.replace("_", "."): v for key, v in values.items()}))


def data(change: Callable[[bytes], bytes], name: str = DATA, sealed: bool = True) -> Callable[[Path], None]:
    """Change the bytes of a data file."""

    def bad(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        if sealed:
            seal(folder)

    return bad


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the JSON header of the data file."""

    def rewrite(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        value = json.loads(content[8 : 8 + length])
        change(value)
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return data(rewrite)


def raw_header(text: bytes) -> Callable[[Path], None]:
    return data(
        lambda content: struct.pack("<Q", len(text)) + text + content[8 + struct.unpack("<Q", content[:8])[0] :]
    )


def tensors(change: Callable[[dict], object], name: str = DATA) -> Callable[[Path], None]:
    """Write other tensors into a data file, well formed."""

    def bad(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        value = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        change(value)
        save_file(value, folder / name)
        seal(folder)

    return bad


def from_another_save(name: str) -> Callable[[Path], None]:
    """Mix two sets: a data file of the same size from another save."""

    def bad(folder: Path) -> None:
        other = folder / "other"
        save(other, 140 if name != DATA else "5GB", seed=1)
        shutil.copy(other / name, folder / name)
        shutil.rmtree(other)

    return bad


def text(value: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_bytes(value) and None


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def a_folder(folder: Path) -> None:
    (folder / DATA).unlink()
    (folder / DATA).mkdir()


def nan(P: torch.Tensor) -> None:
    P[1, 2] = torch.nan


def overlap(value: dict) -> None:
    """Let the last tensor begin one number earlier."""
    entries = [entry for name, entry in value.items() if name != "__metadata__"]
    last = max(entries, key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [offset - 4 for offset in last["data_offsets"]]


def swap(value: dict) -> None:
    files = value["files"]
    files[SHARDS[0]], files[SHARDS[1]] = files[SHARDS[1]], files[SHARDS[0]]
