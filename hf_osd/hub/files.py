"""A set of files with P: written so that a torn one is never mistaken for a whole one, and read accordingly.

`osd_projection.safetensors` holds P under the name of its parameter, of those that share it the holder's, and, where
asked for, other state entries under `<name>::<entry>`. Above a size it is split as transformers splits weights, with
an index. `osd_config.json` (`config.py`) comes last and holds size and SHA-256 of all others. Nothing but safetensors
and JSON is ever read.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..text import beside
from .checks import (
    ProjectionFileError,
    TensorHeader,
    file_size,
    moment_keys,
    read_header,
    read_json,
    sha256,
    sync_folder,
)
from .config import CONFIG_NAME, DATA_NAME, INDEX_NAME, SHARD_PATTERN, check_config, check_files
from .projection import is_moment_shape, projection_shape


PROJECTION_DTYPES = ("F64", "F32", "BF16")


def is_data_file(name: str) -> bool:
    """Whether a file name belongs to a set: what a later save or push may remove."""
    return name in (DATA_NAME, INDEX_NAME) or SHARD_PATTERN.fullmatch(name) is not None


def write_set(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], max_shard_size: int | str
) -> list[str]:
    """Write a complete set, replacing an earlier one.

    Every file is written beside its place first. Only when all are on the disk are they renamed, the config last; an
    interruption leaves the earlier set, or one whose config is missing, and never a mixture that reads well.

    Args:
        folder (`Path`): Created if need be; of its other files none is touched.
        tensors (`dict[str, torch.Tensor]`): By key.
        config (`dict`): `osd_config.json` without `files`.
        max_shard_size (`int` or `str`): In bytes, or as in `"5GB"`.

    Returns:
        `list[str]`: The names of the files, the config last.
    """
    shards = _split(tensors, max_shard_size)
    names = [*shards, *([INDEX_NAME] if len(shards) > 1 else []), CONFIG_NAME]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, keys in shards.items():
            _write_tensors(beside(folder / name), {key: tensors[key] for key in keys})
        if len(shards) > 1:
            _write_json(beside(folder / INDEX_NAME), _index(shards, tensors))
        files = {}
        for name in names[:-1]:
            path = beside(folder / name)
            files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        _write_json(beside(folder / CONFIG_NAME), {**config, "files": files})
        if any((folder / name).exists() for name in names[:-1]):
            (folder / CONFIG_NAME).unlink(missing_ok=True)  # the earlier set ends here
        for name in names:
            os.replace(beside(folder / name), folder / name)
        sync_folder(folder)
    finally:
        for name in names:
            beside(folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        name = path.name.removeprefix("_").removesuffix(".tmp")
        if is_data_file(name) and (name not in names or name != path.name):
            path.unlink(missing_ok=True)
    return names


def remove_set(folder: Path) -> None:
    """Remove a set whose folder is about to hold another model, the config first; nothing where there is none."""
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_data_file(path.name):
            path.unlink(missing_ok=True)


def _split(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> dict[str, list[str]]:
    from huggingface_hub import split_torch_state_dict_into_shards

    # On the meta device: tensors that share memory are counted and written separately.
    shapes = {key: torch.empty(value.shape, dtype=value.dtype, device="meta") for key, value in tensors.items()}
    pattern = DATA_NAME.replace(".", "{suffix}.", 1)
    return split_torch_state_dict_into_shards(
        shapes, filename_pattern=pattern, max_shard_size=max_shard_size
    ).filename_to_tensors


def _index(shards: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, keys in shards.items() for key in keys},
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    # Clones: safetensors refuses tensors that share memory.
    whole = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_config(path: Path, where: str) -> dict[str, Any]:
    """The checked content of an `osd_config.json`; `ProjectionFileError` for any fault."""
    config = read_json(path, where)
    check_config(config, where)
    check_files(config.get("files"), where)
    return config


def read_tensors(config: Mapping[str, Any], paths: Mapping[str, Path], source: str) -> dict[str, Tensor]:
    """All tensors of a set, on the CPU, by key. Nothing is loaded before everything has been checked.

    Args:
        config (`dict`): As `read_config` gives it.
        paths (`dict[str, Path]`): Where each of `config["files"]` is.
        source (`str`): What messages call the set.

    Raises:
        ProjectionFileError: Unless sizes, hashes, index and headers all agree with the config.
    """
    for name, entry in config["files"].items():
        size = file_size(paths[name], f"{name} in {source}")
        if size != entry["size"]:
            raise ProjectionFileError(
                f"{name} in {source} has {size} bytes, {CONFIG_NAME} says {entry['size']}: it is truncated or "
                "belongs to another save."
            )
    shards = [name for name in sorted(paths) if name != INDEX_NAME]
    headers = {name: read_header(paths[name], f"{name} in {source}") for name in shards}
    tensors: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        twice = tensors.keys() & header.keys()
        if twice:
            raise ProjectionFileError(f"{min(twice)!r} stands in two files of {source}, one of them {name}.")
        tensors |= header
    if INDEX_NAME in paths:
        _check_index(read_json(paths[INDEX_NAME], f"{INDEX_NAME} in {source}"), headers, f"{INDEX_NAME} in {source}")
    check_tensors(config["parameters"], tensors, source)
    for name, entry in config["files"].items():
        if sha256(paths[name]) != entry["sha256"]:
            raise ProjectionFileError(
                f"{name} in {source} does not have the sha256 that {CONFIG_NAME} gives: it is damaged or belongs to "
                "another save."
            )
    return {key: value for name in shards for key, value in _load(paths[name], f"{name} in {source}").items()}


def _check_index(index: Mapping[str, Any], headers: Mapping[str, Mapping[str, TensorHeader]], where: str) -> None:
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise ProjectionFileError(f"{where} has no weight_map and metadata.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or name not in headers:
            raise ProjectionFileError(
                f"{where} names the file {str(name)[:100]!r}, which {CONFIG_NAME} does not list."
            )
        if key not in headers[name]:
            raise ProjectionFileError(f"{where} says that {key[:100]!r} is in {name}, which does not have it.")
    for name, header in headers.items():
        unlisted = header.keys() - weight_map.keys()
        if unlisted:
            raise ProjectionFileError(f"{where} does not list {min(unlisted)[:100]!r}, which is in {name}.")
    total = sum(tensor.bytes for header in headers.values() for tensor in header.values())
    if metadata.get("total_size") != total:
        raise ProjectionFileError(f"{where} has total_size {metadata.get('total_size')!r}, the files hold {total}.")


def check_tensors(parameters: Mapping[str, Any], tensors: Mapping[str, TensorHeader], source: str) -> None:
    """Raise `ProjectionFileError` unless keys, shapes and dtypes are what the config's parameters ask for."""
    expected = {entry.get("holder") or name for name, entry in parameters.items()}
    expected |= {key for name, entry in parameters.items() for key in moment_keys(name, entry.get("moments") or [])}
    for keys, fault in ((expected - tensors.keys(), "has no tensor"), (tensors.keys() - expected, "has the extra")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ProjectionFileError(f"{source} {fault} {min(keys)[:200]!r}{more}, judging by {CONFIG_NAME}.")
    for name, entry in parameters.items():
        weight, r, P = tuple(entry["shape"]), entry["rank"], tensors[entry.get("holder") or name]
        shape = projection_shape(entry["side"], weight, r)
        if P.shape != shape:
            raise ProjectionFileError(
                f"P of {name} in {source} has the shape {P.shape}, expected {shape}: {entry['side']} side of "
                f"{weight}, rank {r}."
            )
        if P.dtype not in PROJECTION_DTYPES:
            raise ProjectionFileError(
                f"P of {name} in {source} has the dtype {P.dtype}, expected one of {', '.join(PROJECTION_DTYPES)}."
            )
        for key in moment_keys(name, entry.get("moments") or []):
            got = tensors[key].shape
            if not is_moment_shape(got, entry["side"], weight, r):
                raise ProjectionFileError(
                    f"{key} in {source} has the shape {got}, which no state entry of {name} has."
                )


def _load(path: Path, where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Clones: what safetensors gives is mapped memory, and the file may be replaced.
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ProjectionFileError(f"{where} cannot be read: {error}.") from error
