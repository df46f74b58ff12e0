"""The model card: one section of a README.md, and metadata, kept up to date beside what others wrote there."""

import os
from pathlib import Path

from ..config import CONFIG_NAME
from .facts import CardFacts
from .metadata import merge_metadata
from .picture import save_loss_picture
from .section import digest_around, is_generated, place_section, render_section, split_text


__all__ = ["CARD_NAME", "PICTURE_NAME", "CardFacts", "read_card", "update_card", "write_text"]

CARD_NAME = "README.md"
PICTURE_NAME = "osd_loss.png"


def update_card(folder: str | os.PathLike, facts: CardFacts, *, generated: bool = False) -> Path:
    """Insert our section into a folder's README.md, or replace it, and add our metadata to its head.

    Everything else in the file stays as it is, byte for byte. Without a README.md a small one is made. The loss is
    drawn into `osd_loss.png`, unless matplotlib is not installed. The section tells about P if it lies in the folder.

    Args:
        folder (`str` or `os.PathLike`): The model's folder; created if need be.
        facts ([`CardFacts`]): The run.
        generated (`bool`, *optional*, defaults to `False`):
            Whether the README.md that is there was just made by a program. The section then says so, and as long as
            nobody has edited it a later push may make it anew.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the README.md cannot be added to: its head is no YAML mapping, it is not UTF-8, or it has one of
            our markers without the other. It is left as it is then.

    Example:
    ```python
    >>> import tempfile
    >>> import torch
    >>> from transformers import TrainerState, TrainingArguments
    >>> from hf_osd import OSD
    >>> from hf_osd.hub.card.model_card import CardFacts, update_card

    >>> linear = torch.nn.Linear(64, 32)
    >>> optimizer = OSD([{"params": [linear.weight], "rank": 8}, {"params": [linear.bias]}])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = TrainingArguments(folder, optim="osd_adamw")
    ...     facts = CardFacts.from_run(optimizer, args, TrainerState(), linear)
    ...     print("## Training with Online Subspace Descent" in update_card(folder, facts).read_text())
    True

    ```
    """
    path = Path(folder, CARD_NAME)
    present = read_card(path)
    text = f"# {facts.model_name}\n" if present is None else present
    generated = generated or present is None or is_generated(text)
    split_text(text)  # nothing is written if this or the head is not as it must be
    text = merge_metadata(text, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = save_loss_picture(facts.log_history, path.parent / PICTURE_NAME, title=facts.model_name)
    section = render_section(
        facts,
        picture=PICTURE_NAME if drawn else None,
        projections=bool(facts.matrices) and path.with_name(CONFIG_NAME).is_file(),
        digest=digest_around(text) if generated else None,
    )
    write_text(path, place_section(text, section))
    return path


def read_card(path: Path) -> str | None:
    """The text of a README.md with its own line breaks, or `None` if there is none; `ValueError` unless UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: an upload in the background may be reading it."""
    temporary = path.with_name(f"_{path.name}.tmp")  # Trainer uploads no name that starts so
    try:
        temporary.write_bytes(text.encode("utf-8"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
