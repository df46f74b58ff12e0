"""README.md of a model: one section between two markers and metadata are ours, all else stays what others wrote."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...text import write_bytes, write_text
from ..config import CONFIG_NAME
from .facts import CardFacts
from .picture import loss_picture
from .section import END, START, render_section


__all__ = ["CARD_NAME", "PICTURE_NAME", "CardFacts", "place_section", "read_card", "update_card"]

CARD_NAME = "README.md"
PICTURE_NAME = "osd_loss.png"
TAGS = ["online-subspace-descent", "hf_osd"]
LISTS = ("tags", "datasets", "metrics")


def update_card(folder: str | os.PathLike, facts: CardFacts, **metadata: Any) -> Path:
    """Insert our section into a folder's README.md, or replace it, and add our metadata to its head.

    The text around the section and the keys and values of the head stay; the head is written anew by huggingface_hub,
    without its comments. Without a README.md a small one is made. The loss is drawn into `osd_loss.png`, unless
    matplotlib is not installed. The section tells about P if it lies in the folder.

    Args:
        folder (`str` or `os.PathLike`): The model's folder; created if need be.
        facts ([`CardFacts`]): The run.
        metadata: More for the head, as `ModelCardData` takes it: `tags`, and `language` or `license` if not set.

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

    def section() -> str:
        of = "inputs" if facts.from_activations else "gradients"
        picture = loss_picture(facts.log_history, facts.model_name, of)
        if picture is not None:
            write_bytes(path.with_name(PICTURE_NAME), picture)
        return render_section(
            facts,
            picture=None if picture is None else PICTURE_NAME,
            projections=bool(facts.matrices) and path.with_name(CONFIG_NAME).is_file(),
        )

    return place_section(path, facts.model_name, _wanted(facts, **metadata), section)


def place_section(path: Path, title: str, metadata: dict[str, Any], section: Callable[[], str]) -> Path:
    """Put a section with our markers into a README.md, or into the place of an earlier one; see `update_card`.

    Args:
        path (`Path`): The file.
        title (`str`): Of a new one.
        metadata (`dict`): What its head is to have.
        section (`Callable`): Makes the section, once it is clear that the file can be added to.
    """
    text = read_card(path)
    card = _parse(f"# {title}\n" if text is None else text)
    before, behind = _around_section(card.text)  # nothing is written if this or the head is not as it must be
    _merge(card.data.__dict__, metadata)
    card.text = before + section().replace("\n", _line_break(card.text)) + behind
    write_text(path, str(card))
    return path


def read_card(path: Path) -> str | None:
    """The text of a README.md with its own line breaks, or `None` if there is none; `ValueError` unless UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: {error}") from error


def _around_section(text: str) -> tuple[str, str]:
    """The text before our section and behind it; without one the section's place is the end."""
    starts, ends = ([match.start() for match in re.finditer(f"^{mark}", text, re.MULTILINE)] for mark in (START, END))
    if not starts and not ends:
        line_break = _line_break(text)
        gap = "" if not text.strip() else line_break if text.endswith("\n") else 2 * line_break
        return text + gap, line_break
    if len(starts) != 1 or len(ends) != 1 or ends[0] < starts[0]:
        raise ValueError(
            f"README.md must have the lines {START} and {END} once each, in this order, or neither; it has "
            f"{len(starts)} and {len(ends)}."
        )
    return text[: starts[0]], text[ends[0] + len(END) :]


def _line_break(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _parse(text: str) -> Any:
    """A `RepoCard` with the plain values of its head as data: `ModelCard` knows some fields of results alone."""
    import yaml
    from huggingface_hub import CardData, RepoCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    class Loader(yaml.SafeLoader):
        """YAML as the Hub reads it: `no`, `yes`, `on` and `off` are words."""

    boolean = "tag:yaml.org,2002:bool"
    Loader.yaml_implicit_resolvers = {
        first: [own for own in found if own[0] != boolean or first in "tTfF"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    match = REGEX_YAML_BLOCK.search(text)
    try:
        card = RepoCard(text if match else _line_break(text).join(["---", "{}", "---", "", text]))
        data = yaml.load(match[2], Loader) if match else None
        card.data = CardData(**(data or {}))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the metadata at the head of README.md is no YAML mapping: {reason}") from error
    return card


def _wanted(facts: CardFacts, tags: list[str] | None = None, **metadata: Any) -> dict[str, Any]:
    from huggingface_hub import EvalResult, ModelCardData

    results: dict[str, Any] = {}
    if facts.perplexity is not None and facts.datasets_on_hub:
        result = EvalResult(
            task_type="text-generation",
            task_name="Causal Language Modeling",
            dataset_type=facts.datasets_on_hub[0],
            dataset_name=facts.datasets_on_hub[0],
            metric_type="perplexity",
            metric_name="Perplexity",
            metric_value=round(facts.perplexity, 4),
        )
        results = {"model_name": facts.model_name, "eval_results": [result]}
    return ModelCardData(
        library_name=facts.library_name,
        base_model=facts.base_model,
        tags=[*TAGS, *(tags or [])],
        datasets=facts.datasets_on_hub or None,
        metrics=["perplexity"] if facts.perplexity is not None else None,
        **results,
        **metadata,
    ).to_dict()


def _merge(present: dict[str, Any], ours: dict[str, Any]) -> None:
    """Add to lists what they lack, set what is not set, and replace our result in the model-index."""
    for key, value in ours.items():
        found = present.get(key) or []
        if key == "model-index" and found:
            ours_there = value[0]["results"]
            match found:
                case [{"results": [*results]} as model]:  # an index of any other form stays as it is
                    others = [one for one in results if not _same_but_for_value(one, ours_there[0])]
                    present[key] = [{**model, "results": others + ours_there}]
        elif key in LISTS:
            if not isinstance(found, str | list):
                raise ValueError(f"{key!r} in the metadata of README.md must be a list, not {type(found).__name__}.")
            theirs = [found] if isinstance(found, str) else found
            if not set(value) <= set(theirs):
                present[key] = theirs + [name for name in value if name not in theirs]
        elif not found:
            present[key] = value


def _same_but_for_value(result: Any, ours: dict[str, Any]) -> bool:
    """Whether a result is the one of an earlier card of ours."""
    match result:
        case {"task": task, "dataset": dataset, "metrics": [{"type": "perplexity"}]}:
            return task == ours["task"] and dataset == ours["dataset"]
    return False
