"""What a result was measured on, told so that another text or model of the same name is not taken for it."""

import sys
from hashlib import sha256
from pathlib import Path
from typing import Any


def contents(files: dict[str, Path]) -> dict[str, Any]:
    """Names, bytes and a digest of files, by their names; the digest is of names and contents."""
    digest, size = sha256(), 0
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        size += path.stat().st_size
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return {"files": sorted(files), "bytes": size, "sha256": digest.hexdigest()}


def text_of(data: str | None) -> dict[str, Any] | None:
    """Of `--data`: the contents of the files that are read of a local file or folder, else the name alone."""
    if data is None:
        return None
    path = Path(data).expanduser()
    if not path.exists():
        return {"name": data}
    sys.path.append(str(Path(__file__).parents[1]))
    from pretraining_data import find_local_files

    try:
        _, splits = find_local_files(path)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    folder = path if path.is_dir() else path.parent
    files = [Path(file) for split in splits.values() for file in split]
    return contents({file.relative_to(folder).as_posix(): file for file in files})


def weights_of(model: str) -> dict[str, Any]:
    """Of a model: the files of its weights, in its folder or, of a name on the Hub, where runs have fetched it to."""
    from transformers.utils import cached_file

    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(cached_file(model, "config.json")).parent
        except OSError:
            raise SystemExit(f"{model} is not here, nor on a Hub that can be reached: give --model.") from None
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise SystemExit(f"{folder} has no model*.safetensors or pytorch_model*.bin.")
    return contents({file.name: file for file in files})
