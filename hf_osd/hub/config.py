"""`osd_config.json`: what stands in it, made from an optimizer and checked when it is read.

Top level: `format_version`, the versions of hf_osd, torch and transformers, `optim`, `step`, and the options of the
projected groups (`null` where groups differ, or where an option has no effect), of which those in `FURTHER_OPTIONS`
are there only if they differ from their defaults. `parameters`: for each
name `side`, `rank`, `shape` (m, n), or (E, m, n) of a stack of experts' matrices, the names of its `moments`, and
`holder`, the name of the parameter whose P this is, where two or more share one (from format version 2 on).
`files`: `size` and `sha256` of each data file.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..optim import OPTIM_NAMES
from ..optim.options import table as options
from ..subspace import SIDES
from ..version import __version__
from .checks import MAX_DIMENSION, ProjectionFileError, is_count, is_shape, moment_keys, name_fault
from .projection import projection_shape


FORMAT_VERSION = 2
CONFIG_NAME = "osd_config.json"
DATA_NAME = "osd_projection.safetensors"
INDEX_NAME = DATA_NAME + ".index.json"
SHARD_PATTERN = re.compile(r"osd_projection-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)


def config_name(option: str) -> str:
    """The name in the file of an option of a group, whose underscore only Python's keywords ask for."""
    return option.rstrip("_")


# What P was learned with -> what it may be in JSON, apart from null.
OPTION_TYPES: dict[str, type] = {"optim": str, "step": int}
OPTION_TYPES |= {config_name(name): own.check.kind for name, own in options.OPTIONS.items() if own.card is None}
FURTHER_OPTIONS = {config_name(name): own.check.kind for name, own in options.OPTIONS.items() if own.card is not None}
NAMES = {config_name(name): own.check.names for name, own in options.OPTIONS.items()}  # beside numbers
DEFAULTS = {config_name(name): default for name, default in options.DEFAULTS.items()}


def options_config(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The options that all projected groups share; those in which they differ become `None`."""
    every = [group_options(group) for group in groups]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for own in every for name in own):
        first, *others = (own.get(name, DEFAULTS.get(name)) for own in every)
        found[name] = first if all(other == first for other in others) else None
    return found


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one group, as `options_config` has them."""
    found: dict[str, Any] = {
        "optim": next((name for name, rule in OPTIM_NAMES.items() if rule == group["weight_rule"]), None)
    }
    for name, own in options.OPTIONS.items():
        if own.card is None:
            value = options.in_effect(group, name)
            found[config_name(name)] = list(value) if isinstance(value, tuple) else value
        elif not own.has_default(group[name]):
            found[config_name(name)] = group[name]
    return found


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise `ProjectionFileError` for what is missing, of the wrong type, or impossible, but for `files`."""
    version = config.get("format_version")
    if is_count(version, FORMAT_VERSION + 1):
        raise ProjectionFileError(f"{where} has format_version {version}, newer than {FORMAT_VERSION}: update hf_osd.")
    if not is_count(version, 1):
        raise ProjectionFileError(f"{where} has format_version {version!r}, expected 1 to {FORMAT_VERSION}.")
    for name, kind in (OPTION_TYPES | FURTHER_OPTIONS).items():
        value = config.get(name)
        if value is not None and not _has_type(value, kind) and value not in NAMES.get(name, ()):
            text = "a list of numbers" if kind is list else f"of type {kind.__name__}"
            raise ProjectionFileError(f"{name!r} in {where} must be {text} or null, got {value!r}.")
    parameters = config.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise ProjectionFileError(f"{where} has no 'parameters', an object with an entry for each P.")
    for name, entry in parameters.items():
        _check_parameter(name, entry, where)
    keys = [*parameters]
    for name, entry in parameters.items():
        keys += moment_keys(name, entry.get("moments") or [])
        if entry.get("holder") is not None:
            _check_holder(name, entry, parameters, where)
    if len(set(keys)) < len(keys):
        raise ProjectionFileError(f"{where} has two tensors called {max(keys, key=keys.count)[:200]!r}.")


def versions() -> dict[str, str]:
    """What a config was made with."""
    import torch
    import transformers

    return {
        "hf_osd_version": __version__,
        "torch_version": str(torch.__version__),
        "transformers_version": transformers.__version__,
    }


def _has_type(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(_has_type(one, float) for one in value)
    if kind in (str, bool):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _check_parameter(name: str, entry: Any, where: str) -> None:
    fault = name_fault(name)
    if fault:
        raise ProjectionFileError(f"the parameter name {name[:100]!r} in {where} {fault}.")
    if not isinstance(entry, dict):
        raise ProjectionFileError(f"the entry of {name} in {where} is not an object.")
    values: list[Any] = [entry.get(key) for key in ("side", "rank", "shape", "moments")]
    side, rank, shape, moments = values
    if not isinstance(side, str) or side not in SIDES:
        raise ProjectionFileError(f"{name} in {where} has the side {side!r}, expected {' or '.join(SIDES)}.")
    if not is_shape(shape) or len(shape) not in (2, 3):
        raise ProjectionFileError(f"{name} in {where} has the shape {shape!r}, expected [m, n] or [experts, m, n].")
    if not is_count(rank, 1, MAX_DIMENSION):
        raise ProjectionFileError(f"{name} in {where} has the rank {rank!r}, expected a positive integer.")
    if rank > min(shape[-2:]):
        raise ProjectionFileError(f"{name} in {where} has the rank {rank}, larger than its matrix {tuple(shape)}.")
    if moments is not None:
        fine = isinstance(moments, list) and all(
            isinstance(moment, str) and moment.isidentifier() for moment in moments
        )
        if not fine or len(set(moments)) != len(moments):
            raise ProjectionFileError(f"the moments of {name} in {where} must be a list of different names.")


def _check_holder(name: str, entry: Mapping[str, Any], parameters: Mapping[str, Any], where: str) -> None:
    holder = entry["holder"]
    if not isinstance(holder, str) or holder not in parameters:
        raise ProjectionFileError(
            f"{name} in {where} has the holder {str(holder)[:100]!r}, which is no parameter there."
        )
    if parameters[holder].get("holder") is not None:
        raise ProjectionFileError(f"{name} in {where} has the holder {holder}, which holds no P of its own.")
    own, shared = (
        projection_shape(found["side"], tuple(found["shape"]), found["rank"]) for found in (entry, parameters[holder])
    )
    if own != shared:
        raise ProjectionFileError(
            f"{name} in {where} has a P of shape {own}, but its holder {holder} one of {shared}."
        )


def check_files(files: Any, where: str) -> None:
    """Raise `ProjectionFileError` unless `files` describes one complete set, of names that cannot lead elsewhere."""
    if not isinstance(files, dict) or not files:
        raise ProjectionFileError(f"{where} has no 'files', an object with the size and sha256 of each data file.")
    for name, entry in files.items():
        if name not in (DATA_NAME, INDEX_NAME) and not SHARD_PATTERN.fullmatch(name):
            raise ProjectionFileError(f"{where} lists the file {name[:100]!r}, which is no name of a data file.")
        fine = isinstance(entry, dict) and is_count(entry.get("size"), 0, 2**62)
        digest = entry.get("sha256") if fine else None
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ProjectionFileError(f"{where} does not give the size and sha256 of {name}.")
    if files.keys() == {DATA_NAME}:
        return
    shards = sorted(set(files) - {INDEX_NAME})
    count = len(shards)
    complete = [f"osd_projection-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if INDEX_NAME not in files or not shards or shards != complete:
        raise ProjectionFileError(f"{where} lists an incomplete set of files: {', '.join(sorted(files))[:500]}.")
