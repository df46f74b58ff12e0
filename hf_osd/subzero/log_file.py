"""The one file of a log: two tensors, and a JSON object in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..hub.checks import ProjectionFileError, parse_json


FILE = "subzero_log.safetensors"
KEY, VERSION = "subzero", 1  # of the header's metadata
NEEDED = frozenset({"options", "parameters", "start", "end", "means", "bases", "device"})


def write_log(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write it."""
    from safetensors.torch import save_file

    text = json.dumps({"format_version": VERSION, **config})
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {KEY: text})


def read_log(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the object.

    Raises:
        ProjectionFileError: If they are not what `write_log` writes, or a newer version's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {}).get(KEY, "")
    except SafetensorError as error:
        raise ProjectionFileError(f"{where} is no safetensors file: {error}.") from error
    config = parse_json(text.encode(), where)
    if config.pop("format_version", None) != VERSION:
        raise ProjectionFileError(f"{where} was written by another version of hf_osd: use a newer one.")
    rho, lr = tensors.get("rho"), tensors.get("lr")
    fits = rho is not None and lr is not None and rho.ndim == lr.ndim == 2 and len(rho) == len(lr)
    if (
        not fits
        or NEEDED - config.keys()
        or not all(isinstance(config[key], dict) for key in ("options", "parameters"))
    ):
        raise ProjectionFileError(f"{where} is not what a run of SubZero writes.")
    return tensors, config
