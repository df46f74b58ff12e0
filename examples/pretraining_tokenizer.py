"""The tokenizer of a pretraining run: loaded, or a byte-level BPE trained on the training text."""

import hashlib
from pathlib import Path

from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pretraining_data import Documents


DEFAULT_TOKENIZER = "t5-base"  # the paper's code (like GaLore's) tokenizes C4 with it
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
MIN_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte is a token, so no text is unknown
TRAINING_CHARACTERS = 20_000_000  # more text hardly changes a vocabulary


def leading_texts(documents: Documents, column: str, max_characters: int) -> list[str]:
    """Returns the first documents' texts, as many as it takes to reach `max_characters`."""
    texts, total = [], 0
    for document in documents:
        texts.append(document[column] or "")
        total += len(texts[-1])
        if total >= max_characters:
            break
    return texts


def train_byte_level_bpe(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most `vocabulary` tokens, `SPECIAL_TOKENS` and all 256 bytes among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def trained_tokenizer(documents: Documents, column: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer trained on the leading documents, from the cache where these texts have been seen before.

    Args:
        documents (`Documents`):
            Training documents; the first 20 million characters are used.
        column (`str`):
            The column with the text.
        vocabulary (`int`):
            Number of tokens to train. A small text may give fewer.
    """
    if vocabulary < MIN_VOCABULARY:
        raise ValueError(
            f"--train_tokenizer {vocabulary} is too small: a byte-level vocabulary needs at least {MIN_VOCABULARY}."
        )
    texts = leading_texts(documents, column, TRAINING_CHARACTERS)
    key = hashlib.blake2b(digest_size=12)
    for text in texts:
        key.update(text.encode("utf-8", errors="replace") + b"\0")
    folder = Path(constants.HF_HOME) / "hf_osd" / "tokenizers" / f"bpe-{vocabulary}-{key.hexdigest()}"
    if not (folder / "tokenizer.json").exists():
        train_byte_level_bpe(texts, vocabulary).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from the Hub or a folder and makes sure that it has a token to end documents with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tokenizer {name} could not be loaded ({error}). Name a tokenizer of the Hub or a folder with "
            "tokenizer.json, or train one on the data with --train_tokenizer VOCABULARY_SIZE, which needs no network."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer {name} has no end-of-sequence token to separate documents with.")
    return tokenizer
