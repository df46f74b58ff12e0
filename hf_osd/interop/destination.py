"""Where an adapter may be written: not beside a model, since `from_pretrained` would then load both, as one model."""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from ..text import shortened


ADAPTER_CONFIG = "adapter_config.json"
# A model's own files, of transformers in its frameworks, and of other formats.
MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    "pytorch_model*.bin",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "consolidated*",
    "*.gguf",
)


def check_folder(folder: str | os.PathLike, models: Iterable[str | os.PathLike] = ()) -> None:
    """Raise `ValueError` if an adapter in this folder would change what is loaded from it.

    Args:
        folder (`str` or `os.PathLike`): Need not exist.
        models (`Iterable[str or os.PathLike]`, *optional*): Folders or repositories that are only read.
    """
    for model in models:
        if Path(model).is_dir() and Path(model).resolve() == Path(folder).resolve():
            raise ValueError(f"{os.fspath(folder)} is the folder of a model that is read: {_way_out('folder')}")
    if Path(folder).is_dir():
        _check_names(os.fspath(folder), [path.name for path in Path(folder).iterdir()], "folder")


def check_repository(
    repo_id: str,
    models: Iterable[str | os.PathLike] = (),
    *,
    token: str | bool | None = None,
    revision: str | None = None,
) -> None:
    """Raise `ValueError` if an adapter in this repository would change what is loaded from it; asks the Hub.

    Args:
        repo_id (`str`): Such as `user/name`; need not exist.
        models (`Iterable[str or os.PathLike]`, *optional*): Folders or repositories that are only read.
        token (`str` or `bool`, *optional*): Defaults to the one of `hf auth login`.
        revision (`str`, *optional*): Branch; one that does not exist will start as a copy of `main`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    for model in models:
        if not Path(model).is_dir() and os.fspath(model).casefold() == repo_id.casefold():
            raise ValueError(f"{repo_id} is the repository of a model that is read: {_way_out('repository')}")
    try:
        try:
            names = api.list_repo_files(repo_id, revision=revision)
        except RevisionNotFoundError:
            names = api.list_repo_files(repo_id)
    except RepositoryNotFoundError:
        return
    _check_names(repo_id, names, "repository")


def _check_names(place: str, names: list[str], kind: str) -> None:
    found = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in MODEL_FILES))
    found = [name for name in found if "/" not in name]
    if found and ADAPTER_CONFIG not in names:
        raise ValueError(f"{place} holds a model ({shortened(found, 3)}): {_way_out(kind)}")


def _way_out(kind: str) -> str:
    return f"with an adapter beside it, every load of it would give another model. Choose another {kind}."
