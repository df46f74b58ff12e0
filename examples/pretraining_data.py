"""Text for pretraining: where it comes from and which documents are held out for validation.

A data set is a name on the Hub, a local file, a local folder or `docstrings`. The result is always a pair of
`datasets` objects with one text column, map-style or streamed. `packing.py` turns them into blocks of tokens.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError

from docstrings import docstrings_file


Documents = Dataset | IterableDataset
Splits = DatasetDict | IterableDatasetDict

# file ending (before an optional .gz) -> the loader of `datasets` that reads it
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
DEFAULT_CONFIGS = {"allenai/c4": "en"}  # the paper's data; the Hub has it in 108 languages
STREAMED_BY_DEFAULT = ("allenai/c4",)  # 305 GB
VALIDATION_FRACTION = 0.02
SHUFFLE_BUFFER = 10_000  # documents; a streamed data set is shuffled within this window


class TextSplits(NamedTuple):
    """Training and validation documents, both with the column that was asked for and nothing shared between them."""

    train: Documents
    validation: Documents


def is_held_out(text: str | None, fraction: float) -> bool:
    """Says whether a document belongs to the validation split: a hash of its text decides, so copies stay together."""
    digest = hashlib.blake2b((text or "").encode("utf-8", errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def is_kept(text: str | None, fraction: float) -> bool:
    """Says whether a document belongs to the training split: the opposite of `is_held_out`."""
    return not is_held_out(text, fraction)


def loader_of(path: Path) -> str | None:
    """Returns the loader for a file by its ending, or `None` for a file that holds no text."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return LOADERS.get(suffixes[-1]) if suffixes else None


def find_local_files(path: Path) -> tuple[str, dict[str, list[str]]]:
    """Finds the data files of a local file or folder.

    Args:
        path (`Path`):
            An existing file or folder.

    Returns:
        `tuple[str, dict[str, list[str]]]`: the loader's name and the files of each split: those called `train*` and
        `validation*` where a folder has both, else all of them as `train`.
    """
    candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in candidates if file.is_file() and loader_of(file)]
    loaders = sorted({loader_of(file) for file in files})
    if len(loaders) != 1:
        found = f"files of several kinds: {', '.join(loaders)}" if loaders else "no such file"
        raise ValueError(
            f"--dataset {path}: expected files of one kind, {', '.join(LOADERS)} (also with .gz), and found {found}."
        )
    splits = {name: [str(file) for file in files if file.name.startswith(name)] for name in ("train", "validation")}
    if not (splits["train"] and splits["validation"]):
        splits = {"train": [str(file) for file in files]}
    return loaders[0], splits


def load_local(path: Path, streaming: bool) -> Splits:
    """Loads a local file or folder; the documents of .txt files are their paragraphs."""
    loader, files = find_local_files(path)
    if loader == "text":
        return load_dataset("text", data_files=files, streaming=streaming, sample_by="paragraph")
    return load_dataset(loader, data_files=files, streaming=streaming)


def load_from_hub(name: str, config: str | None, streaming: bool) -> Splits:
    """Loads a data set from the Hub and says what else can be named when it cannot be found or reached."""
    try:
        return load_dataset(name, config, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"--dataset {name}: there is no such local file or folder, and it could not be loaded from the Hub "
            f"({error}). Name a data set of the Hub, a local path, or `docstrings`, which needs no network."
        ) from error


def load_splits(name: str, config: str | None, streaming: bool | None) -> Splits:
    """Loads all splits of a data set by its name, after refusing options that this kind of data set has no use for."""
    path = Path(name).expanduser()
    local = name == "docstrings" or path.exists()
    if not local and (path.is_absolute() or name.startswith((".", "~")) or loader_of(path)):
        raise ValueError(f"--dataset {name}: there is no such file or folder.")
    if local and config is not None:
        raise ValueError(f"--dataset_config {config} has no meaning for the local data set {name}: leave it out.")
    if name == "docstrings" and streaming:
        raise ValueError("--streaming has no meaning for --dataset docstrings, which is one small file: leave it out.")
    if local:
        return load_local(docstrings_file() if name == "docstrings" else path, bool(streaming))
    streaming = name in STREAMED_BY_DEFAULT if streaming is None else streaming
    return load_from_hub(name, config or DEFAULT_CONFIGS.get(name), streaming)


def check_text_column(documents: Documents, column: str, split: str) -> None:
    """Raises a `ValueError` that names the columns when `column` is missing or does not hold text."""
    first = next(iter(documents), None)
    if first is None:
        raise ValueError(f"The {split} split has no documents.")
    if column not in first:
        raise ValueError(f"--text_column {column}: no such column in the {split} split, it has {', '.join(first)}.")
    if not isinstance(first[column], str):
        raise ValueError(f"--text_column {column} holds {type(first[column]).__name__}, not text.")


def hold_out(documents: Documents, column: str, fraction: float) -> TextSplits:
    """Splits documents by the hash of their text; the same documents are held out in every run and when streamed."""
    return TextSplits(
        train=documents.filter(partial(is_kept, fraction=fraction), input_columns=column),
        validation=documents.filter(partial(is_held_out, fraction=fraction), input_columns=column),
    )


def load_text(
    name: str,
    *,
    config: str | None = None,
    text_column: str = "text",
    streaming: bool | None = None,
    validation_split: str | None = None,
    validation_fraction: float | None = None,
    seed: int = 42,
) -> TextSplits:
    """Loads the training and the validation documents.

    Args:
        name (`str`):
            A data set on the Hub, a local file or folder of text, JSON lines or Parquet, or `docstrings`.
        config (`str`, *optional*):
            The configuration of a Hub data set; defaults to `en` for `allenai/c4`.
        text_column (`str`, *optional*, defaults to `"text"`):
            The column that holds the documents.
        streaming (`bool`, *optional*):
            Read while training instead of preparing everything first; defaults to `True` for `allenai/c4` only.
        validation_split (`str`, *optional*):
            Split to validate on; defaults to `validation` where the data set has one.
        validation_fraction (`float`, *optional*):
            Where it has none, the part of the training documents to hold out; defaults to 0.02.
        seed (`int`, *optional*, defaults to 42):
            Order of the documents of a streamed data set.

    Returns:
        `TextSplits`: the documents of both splits.
    """
    splits = load_splits(name, config, streaming)
    if "train" not in splits:
        raise ValueError(f"--dataset {name} has no split `train`, it has {', '.join(splits)}.")
    if validation_split is not None and validation_split not in splits:
        raise ValueError(f"--validation_split {validation_split}: {name} has the splits {', '.join(splits)}.")
    validation_split = validation_split or ("validation" if "validation" in splits else None)
    if validation_split == "train":
        raise ValueError("--validation_split train would validate on the training text; use --validation_fraction.")
    if validation_split is not None and validation_fraction is not None:
        raise ValueError(
            f"--validation_fraction {validation_fraction} would be ignored: {name} has the split `{validation_split}`."
        )
    fraction = VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    if not 0 < fraction < 1:
        raise ValueError(f"--validation_fraction must lie between 0 and 1, got {fraction}.")

    check_text_column(splits["train"], text_column, "train")
    if validation_split is None:
        texts = hold_out(splits["train"], text_column, fraction)
    else:
        texts = TextSplits(splits["train"], splits[validation_split])
    check_text_column(texts.validation, text_column, validation_split or "held-out")
    if isinstance(texts.train, IterableDataset):
        texts = texts._replace(train=texts.train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
    return texts
