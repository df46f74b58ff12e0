"""Text that every machine with torch and transformers has: the Python source of installed packages, in tokens.

Read from the files as they are, so it needs neither a network nor `datasets`, and some seconds. Equal files are taken
once, but sibling models of transformers have much in common: losses compare within one run, not with other texts.
"""

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


PACKAGES = ("torch", "sympy", "transformers")  # and the standard library
CHARACTERS = 30_000_000  # about 8 million tokens
TOKENIZER_CHARACTERS = 5_000_000
HELD_OUT = 50  # one file in so many is for validation
END = "</s>"


class Blocks(NamedTuple):
    """Packed tokens, one row a block: files joined with `END` after each and cut, the same in every run."""

    train: torch.Tensor
    validation: torch.Tensor


def source_files() -> list[Path]:
    """All Python files, in an order that depends on nothing but their names and sizes."""
    found: list[Path] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            found += Path(spec.origin).parent.rglob("*.py")
    library = sysconfig.get_paths()["stdlib"]
    found += (file for file in Path(library).rglob("*.py") if not {"site-packages", "dist-packages"} & {*file.parts})
    return sorted(found, key=lambda file: hashlib.blake2b(f"{file.name} {file.stat().st_size}".encode()).digest())


def texts(characters: int) -> list[str]:
    """The first distinct files that have so many characters in all."""
    found: dict[str, None] = {}
    total = 0
    for file in source_files():
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and text not in found:
            found[text] = None
            total += len(text)
        if total >= characters:
            break
    return list(found)


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of the first documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_leading(documents), trainer=trainer)
    return tokenizer


def packed_text(length: int, vocabulary: int, characters: int = CHARACTERS) -> Blocks:
    """Blocks of `length` tokens.

    Args:
        length (`int`): Tokens of a block.
        vocabulary (`int`): Tokens of the vocabulary, which is trained on the first 5 million characters.
        characters (`int`, *optional*): As many are read.
    """
    documents = texts(characters)
    tokenizer = train_tokenizer(documents, vocabulary)
    end = tokenizer.token_to_id(END)
    rows: list[torch.Tensor] = []
    for start in range(0, len(documents), 256):  # a few at a time, for what a tokenizer gives is large
        encoded = tokenizer.encode_batch_fast(documents[start : start + 256], add_special_tokens=False)
        rows += (torch.tensor([*row.ids, end], dtype=torch.int32) for row in encoded)
    parts = [row for i, row in enumerate(rows) if i % HELD_OUT], rows[::HELD_OUT]
    train, validation = (_cut(torch.cat(part), length) for part in parts)
    return Blocks(train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))], validation)


def _cut(tokens: torch.Tensor, length: int) -> torch.Tensor:
    return tokens[: len(tokens) // length * length].view(-1, length)


def _leading(documents: list[str]) -> Iterator[str]:
    total = 0
    for text in documents:
        yield text
        total += len(text)
        if total >= TOKENIZER_CHARACTERS:
            return
