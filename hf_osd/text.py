"""Text for people, and files of text: one form for sizes, counts, tables and names. Standard library only."""

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger("hf_osd")


def format_bytes(number: float, digits: int = 1, smallest: str = "bytes") -> str:
    """`312.4 MB`, in powers of 1000.

    Args:
        number (`float`): Bytes.
        digits (`int`, *optional*, defaults to 1): Digits behind the point.
        smallest (`str`, *optional*, defaults to `"bytes"`): Unit that smaller numbers are told in, too.
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size or unit == smallest:
            return f"{number / size:,.{digits}f} {unit}"
    return f"{number:,.0f} bytes"


def format_count(number: int, smallest: str = "") -> str:
    """`25.3M`; numbers below a million in full, unless `smallest` is `"M"`."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size or unit == smallest:
            return f"{number / size:,.1f}{unit}"
    return f"{number:,}"


def printable(text: str) -> str:
    """Text of others on one line: with escapes for control characters, line breaks and whatever else is not shown."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shortened(names: Iterable[str], most: int) -> str:
    """`a, b, c and 4 more`: the first of many names."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def layer_and_kind(name: str) -> tuple[int, str]:
    """`(3, "self_attn.q_proj")` for `model.layers.3.self_attn.q_proj.weight`; layer 0 where the name has none."""
    match = re.search(r"\.(\d+)\.", name)
    kind = re.sub(r"\d+", "*", name[match.end() :]) if match else name
    return int(match.group(1)) if match else 0, kind.removesuffix(".weight")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Columns two spaces apart; those named in `left` aligned to the left, the others to the right."""
    rows = [list(map(printable, row)) for row in rows]  # names come from files
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def beside(path: Path) -> Path:
    """The name of a file that is being written; Trainer, which may upload meanwhile, leaves out such names."""
    return path.with_name(f"_{path.name}.tmp")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` at the end; after an exception `path` is as it was."""
    temporary = beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, with the line breaks that the text has."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def announce(line: str) -> None:
    """Say a line at the beginning of a training: to whoever takes log records, else to the standard error stream.

    A root logger at WARNING is everybody's default, `logging.basicConfig()` included, and hides nothing; any other
    level of it, and each of the logger `hf_osd`, are somebody's choice.
    """
    if logger.level == logging.NOTSET and logger.getEffectiveLevel() == logging.WARNING:
        logger.setLevel(logging.INFO)
    if logger.hasHandlers():
        logger.info(line)
    elif logger.isEnabledFor(logging.INFO):
        print(line, file=sys.stderr)
