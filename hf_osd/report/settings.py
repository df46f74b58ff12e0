"""How a run was configured: its training arguments, optimizer, model and versions, without anything secret."""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINING_ARGS_NAME

from ..hub.config import CONFIG_NAME
from .files import read_object, unreadable


MAX_BYTES = 10_000_000
# Names of secrets, and what differs between runs without a meaning.
LEFT_OUT = re.compile(
    r"_.*|.*(token|key|bearer|authorization)|.*(passw|secret|credential).*|hub_.*"
    r"|output_dir|logging_dir|run_name|local_rank",
    re.IGNORECASE,
)
# Secrets that are told by their own form, wherever they stand.
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|(sk|ghp|gho|github_pat|glpat)[-_]\w[\w-]{15,})|(?<=://)[^/\s@]+@")
# The folders of an absolute path: they tell about a machine or its user, and nothing about the run.
FOLDERS = re.compile(
    r"""(?:^|(?<=[\s=,;"'(\[{])|(?<=file://))(?:~?/|[A-Za-z]:[\\/])(?:[^\s,;"'/\\]+[/\\])*(?=[^\s,;"'/\\])"""
)
LEFT = "…"  # stands for what is left out of a text
OPTIMIZER_LEFT_OUT = {"format_version", "parameters", "files", "hf_osd_version", "torch_version", "step"}
MODEL_LEFT_OUT = {"_name_or_path", "transformers_version", "id2label", "label2id"}
RUN = ("model", "dataset", "sequence_length", "parameters", "tokens_seen")


def read_settings(folders: Sequence[Path], results: Mapping[str, Any], notes: list[str]) -> dict[str, dict[str, Any]]:
    """Settings by section and name, each a JSON value; what is secret, `None` and empty sections are left out."""
    sections: dict[str, dict[str, Any]] = {
        "Run": {name: results.get(name) for name in RUN},
        "Training": _training(folders, results, notes),
        "Optimizer": _json(folders, CONFIG_NAME, OPTIMIZER_LEFT_OUT | {"transformers_version"}, notes),
        "Model": _json(folders, "config.json", MODEL_LEFT_OUT, notes),
        "Environment": _environment(results),
    }
    kept: dict[str, dict[str, Any]] = {}
    for section, values in sections.items():
        try:
            plain: dict[str, Any] = _plain(values) or {}
        except RecursionError:
            notes.append(f"{section}: its settings are nested too deeply.")
            continue
        kept[section] = {name: value for name, value in plain.items() if value is not None and value != []}
    return {section: values for section, values in kept.items() if values}


def text_of(value: Any) -> str:
    """A setting as it is shown."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _training(folders: Sequence[Path], results: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    for folder in reversed(folders):  # the newest checkpoint first
        path = folder / TRAINING_ARGS_NAME
        if path.is_file():
            try:
                return read_arguments(path)
            except ValueError as error:
                notes.append(str(error))
    given = results.get("settings")
    return dict(given) if isinstance(given, dict) else {}


def _json(folders: Sequence[Path], name: str, left_out: set[str], notes: list[str]) -> dict[str, Any]:
    for folder in reversed(folders):
        values = read_object(folder / name, notes)
        if values:
            return {key: value for key, value in values.items() if key not in left_out}
    return {}


def _environment(results: Mapping[str, Any]) -> dict[str, Any]:
    environment = results.get("environment")
    environment = environment if isinstance(environment, dict) else {}
    versions = environment.get("versions")
    return {
        **(versions if isinstance(versions, dict) else {}),
        **{k: environment.get(k) for k in ("device", "cpu_count")},
    }


class _Inert:
    """Stands for every class and function that a pickle names: keeps what it was given, and does nothing."""

    state: Mapping[str, Any]
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **_: Any) -> "_Inert":
        inert = super().__new__(cls)
        inert.arguments, inert.state = arguments, {}
        return inert

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Reads the values of a pickle and runs no code of it."""

    def find_class(self, module: str, name: str) -> type:
        return _Inert

    def persistent_load(self, pid: Any) -> None:
        return None


def read_arguments(path: Path) -> dict[str, Any]:
    """The plain values in a `training_args.bin`, which is a pickle, without unpickling any class of it.

    Raises:
        ValueError: If it is not such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if entry.file_size > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES // 10**6} MB")
            arguments = _InertUnpickler(io.BytesIO(archive.read(entry))).load()
        return {name: kept for name, value in arguments.state.items() if (kept := _plain(value)) is not None}
    except Exception as error:  # of the many kinds that a damaged pickle raises
        raise ValueError(unreadable(path, error)) from None


def _plain(value: Any) -> Any:
    """JSON values without secrets, enum members as their value, `None` for everything else."""
    if isinstance(value, _Inert):
        return _plain(value.arguments[0]) if len(value.arguments) == 1 else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not LEFT_OUT.fullmatch(str(key))} or None
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return SECRET.sub(LEFT, FOLDERS.sub(f"{LEFT}/", value))
    return value if isinstance(value, (bool, int, float)) else None
