"""English technical prose without a download: the docstrings of the installed `torch` and `transformers` packages.

About 18,000 docstrings (12 MB) of modules, classes and functions. They are read once from the installed source files,
deduplicated and kept as JSON lines below `HF_HOME`. Classes of sibling models have nearly equal docstrings, so a
perplexity reached on them is lower than on ordinary prose: compare it with other runs on the same docstrings only.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants


PACKAGES = ("torch", "transformers")
MIN_CHARACTERS = 80  # shorter ones ("See base class.") carry no prose


def docstrings_of_source(source: str) -> Iterator[str]:
    """Yields the docstrings of a module and of all its classes and functions, in the order of `ast.walk`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def collect_docstrings(roots: Sequence[Path]) -> list[str]:
    """Collects the distinct docstrings of all Python files below the given folders.

    Args:
        roots (`Sequence[Path]`):
            Package folders. Files are visited in sorted order, so the result depends on the sources only.

    Returns:
        `list[str]`: docstrings of at least `MIN_CHARACTERS` characters, the first of those that differ in white space
        only.
    """
    distinct: dict[str, str] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            try:
                found = list(docstrings_of_source(path.read_text(encoding="utf-8")))
            except (SyntaxError, UnicodeDecodeError, ValueError):  # templates and files for another Python version
                continue
            for text in found:
                if len(text) >= MIN_CHARACTERS:
                    distinct.setdefault(" ".join(text.split()), text)
    return list(distinct.values())


def package_folder(package: str) -> Path:
    """Returns the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"`{package}` is not installed, so its docstrings cannot be read: `pip install {package}`.")
    return Path(spec.origin).parent


def docstrings_file(packages: Sequence[str] = PACKAGES) -> Path:
    """Returns the JSON lines file (column `text`) with the docstrings of the packages, written at the first call.

    Args:
        packages (`Sequence[str]`, *optional*, defaults to `PACKAGES`):
            Names of installed packages. The file's name holds their versions.
    """

    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in collect_docstrings([package_folder(package) for package in packages]))

    return cached_json_lines("docstrings", packages, rows)


def cached_json_lines(kind: str, packages: Sequence[str], rows: Callable[[], Iterable[dict[str, Any]]]) -> Path:
    """Returns the JSON lines file below `HF_HOME` with what was read from packages, written at the first call.

    Args:
        kind (`str`):
            The folder's name.
        packages (`Sequence[str]`):
            Names of installed packages. The file's name holds their versions.
        rows (`Callable[[], Iterable[dict[str, Any]]]`):
            Reads the packages.
    """
    name = "_".join(f"{package}-{importlib.metadata.version(package)}" for package in packages)
    path = Path(constants.HF_HOME) / "hf_osd" / kind / f"{name}.jsonl"
    if not path.exists():
        print(f"Reading the docstrings of {' and '.join(packages)}, once (about half a minute).", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
        unfinished.replace(path)
    return path
