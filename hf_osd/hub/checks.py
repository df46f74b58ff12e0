"""What is asked of a file before anything of it is used: strict JSON, and safetensors headers that tell the truth.

The safetensors library checks headers too; doing it first gives one sentence for each fault, and no allocation or
parsing is ever driven by a number that was not compared with the size of the file.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


MAX_JSON_BYTES = 100_000_000  # what the safetensors library allows a header; a 7B model's takes 30 kB
MAX_NAME = 1024
MAX_DEPTH = 32  # of objects in objects; ours take five
MAX_DIMENSION = 2**31 - 1
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1}  # every dtype that an optimizer state of ours has
ENTRY_SEPARATOR = "::"  # between a parameter's name and the name of its state entry


class ProjectionFileError(ValueError):
    """A set of files that cannot be read, or not trusted. The message is one sentence that says what is wrong."""


class TensorHeader(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return numel(self.shape) * ITEM_BYTES[self.dtype]


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements, as an exact integer."""
    product = 1
    for size in shape:
        product *= size
    return product


def is_count(value: Any, low: int = 0, high: int | None = None) -> bool:
    """Whether a JSON value is an integer (not a boolean) within limits."""
    return type(value) is int and low <= value and (high is None or value <= high)


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a list of sizes, at most four."""
    return isinstance(value, list) and len(value) <= 4 and all(is_count(size, 1, MAX_DIMENSION) for size in value)


def name_fault(name: str) -> str | None:
    """Why `name` cannot be a parameter's name, or `None`. Names are never paths: a module's may have any slash."""
    if not name or len(name) > MAX_NAME:
        return f"is empty or longer than {MAX_NAME} characters"
    if name == "__metadata__":
        return "is reserved"
    if ".." in name or not name.isprintable():
        return "has `..` or control characters"
    return None


def moment_keys(name: str, moments: Iterable[str]) -> list[str]:
    """The keys of a parameter's other state entries than P, whose key is its name."""
    return [name + ENTRY_SEPARATOR + moment for moment in moments]


def read_json(path: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ProjectionFileError: If it is missing, larger than 100 MB, or not what `parse_json` accepts.
    """
    if file_size(path, where) > MAX_JSON_BYTES:
        raise ProjectionFileError(f"{where} is larger than {MAX_JSON_BYTES // 10**6} MB, which no such file is.")
    return parse_json(path.read_bytes(), where)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object in UTF-8 JSON text; keys given twice, NaN and infinities are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ProjectionFileError(f"{where} has the key {key[:MAX_NAME]!r} twice.")
            result[key] = value
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except ProjectionFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProjectionFileError(f"{where} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ProjectionFileError(f"{where} is not a JSON object, but a {type(value).__name__}.")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)]
        level = [one for one in level if isinstance(one, (dict, list))]
    if level:
        raise ProjectionFileError(f"{where} is nested more than {MAX_DEPTH} levels deep.")
    return value


def file_size(path: Path, where: str) -> int:
    """Bytes of a regular file, or of one that a link leads to, as in the Hub's cache."""
    if not path.is_file():
        raise ProjectionFileError(f"{where} is missing.")
    return path.stat().st_size


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, as the Hub shows it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def read_header(path: Path, where: str) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file, from its header; no data is read.

    Raises:
        ProjectionFileError: If the header does not fit into the file, is not JSON, has a key twice, names an unknown
            dtype, or if its tensors overlap, leave gaps or end elsewhere than the file.
    """
    size = file_size(path, where)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8 or length > MAX_JSON_BYTES:
            raise ProjectionFileError(
                f"{where} is truncated or no safetensors file: its header claims {length} bytes, the file has {size}."
            )
        header = parse_json(file.read(length), f"the header of {where}")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _tensor_header(entry, f"{name[:MAX_NAME]!r} in the header of {where}")
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            fault = "overlap" if begin < end else "leave a gap"
            raise ProjectionFileError(f"the tensors in {where} {fault} at byte {begin}.")
        end = stop
    if end != size - 8 - length:
        raise ProjectionFileError(f"{where} holds {size - 8 - length} bytes of data, its header describes {end}.")
    return tensors


def _tensor_header(entry: Any, where: str) -> tuple[TensorHeader, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ProjectionFileError(f"{where} is not described by dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ProjectionFileError(f"{where} has the dtype {dtype!r}, expected one of {', '.join(ITEM_BYTES)}.")
    if not is_shape(shape):
        raise ProjectionFileError(f"{where} has the shape {shape!r}, which is none.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        raise ProjectionFileError(f"{where} has the data_offsets {offsets!r}, expected two integers.")
    tensor = TensorHeader(dtype, tuple(shape))
    if offsets[1] - offsets[0] != tensor.bytes:
        raise ProjectionFileError(f"{where} spans {offsets[1] - offsets[0]} bytes, its shape needs {tensor.bytes}.")
    return tensor, (offsets[0], offsets[1])


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power failure, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
