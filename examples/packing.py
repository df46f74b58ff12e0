"""Packing: documents are tokenized, joined with an end-of-sequence token after each, and cut into equal blocks.

    tokens = d_1 + [eos] + d_2 + [eos] + ...,    block_i = tokens[i L : (i + 1) L]

with L the sequence length. Nothing is padded and nothing is dropped but the tail shorter than one block.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from pretraining_data import Documents


BLOCK_FEATURES = Features({"input_ids": List(Value("int32"))})


def tokenize_batch(texts: list[str | None], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Tokenizes a batch of documents without special tokens and appends the end-of-sequence token to each."""
    present = [text for text in texts if text]
    if not present:
        return {"input_ids": []}
    rows = tokenizer(present, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {"input_ids": [row + [tokenizer.eos_token_id] for row in rows]}


def tokenize(documents: Documents, column: str, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Tokenizes all documents: cached on disk for map-style data sets, while reading for streamed ones."""
    columns = documents.column_names or list(next(iter(documents)))  # a stream may not know its columns
    return documents.map(
        partial(tokenize_batch, tokenizer=tokenizer),
        batched=True,
        input_columns=column,
        remove_columns=columns,
    )


def pack(rows: Iterable[dict[str, list[int]]], sequence_length: int) -> Iterator[dict[str, list[int]]]:
    """Yields the blocks of the joined rows, each `{"input_ids": sequence_length tokens}`."""
    pending: list[int] = []
    for row in rows:
        pending.extend(row["input_ids"])
        whole = len(pending) - len(pending) % sequence_length
        for start in range(0, whole, sequence_length):
            yield {"input_ids": pending[start : start + sequence_length]}
        del pending[:whole]


class PackedStream(torch.utils.data.IterableDataset):
    """The blocks of a streamed data set, packed while it is read.

    Args:
        rows (`datasets.IterableDataset`):
            Tokenized documents. It shards itself over the workers of a data loader.
        sequence_length (`int`):
            Tokens of a block.
    """

    def __init__(self, rows: IterableDataset, sequence_length: int) -> None:
        self.rows = rows
        self.sequence_length = sequence_length

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return pack(self.rows, self.sequence_length)

    def set_epoch(self, epoch: int) -> None:
        """Changes the order of the documents; called by the data loader at each epoch."""
        self.rows.set_epoch(epoch)


def training_blocks(rows: Documents, sequence_length: int) -> Dataset | PackedStream:
    """Packs tokenized training documents: on disk and cached for a map-style data set, lazily for a streamed one."""
    if next(pack(rows, sequence_length), None) is None:
        raise ValueError(f"The training text is shorter than one block: lower --sequence_length {sequence_length}.")
    if isinstance(rows, IterableDataset):
        return PackedStream(rows, sequence_length)
    return Dataset.from_generator(
        pack, features=BLOCK_FEATURES, gen_kwargs={"rows": rows, "sequence_length": sequence_length}
    )


def validation_blocks(rows: Documents, sequence_length: int, max_tokens: int) -> Dataset:
    """Packs the leading validation documents and keeps the blocks in memory, so that every evaluation sees the same.

    Args:
        rows (`Documents`):
            Tokenized validation documents, map-style or streamed.
        sequence_length (`int`):
            Tokens of a block.
        max_tokens (`int`):
            Upper bound of the tokens kept.
    """
    if max_tokens < sequence_length:
        raise ValueError(f"--max_eval_tokens {max_tokens} is less than one block of {sequence_length} tokens.")
    leading = islice(pack(rows, sequence_length), max_tokens // sequence_length)
    blocks = [np.asarray(block["input_ids"], dtype=np.int32) for block in leading]
    if not blocks:
        raise ValueError(f"The validation text is shorter than one block: lower --sequence_length {sequence_length}.")
    return Dataset.from_dict({"input_ids": blocks}, features=BLOCK_FEATURES)


def collate_blocks(blocks: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stacks blocks to `input_ids` and `labels` of shape (batch, sequence_length); the model shifts the labels."""
    input_ids = torch.tensor([block["input_ids"] for block in blocks], dtype=torch.long)
    return {"input_ids": input_ids, "labels": input_ids.clone()}
