"""The metadata at the head of a README.md: ours are added, what others wrote there stays as they wrote it."""

from typing import Any

from .facts import CardFacts
from .section import line_break_of


TAGS = ["online-subspace-descent", "hf_osd"]


def merge_metadata(text: str, facts: CardFacts) -> str:
    """The text of a README.md with our metadata in its head; a head is made if it has none.

    Only keys that change are rewritten, each in its place: comments, order and quoting of the others stay.

    Raises:
        ValueError: If the head is no YAML mapping, or written so that a key cannot be replaced.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix("\ufeff")
    line_break = line_break_of(text)
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        head = _merged("", facts).strip("\n").replace("\n", line_break)
        return f"{mark}---{line_break}{head}{line_break}---{line_break}{line_break if text else ''}{text}"
    block = match[2]
    return mark + text[: match.start(2)] + _merged(block, facts) + text[match.end(2) :]


def read_metadata(block: str) -> dict[str, Any]:
    """The content of a head; `ValueError` if it is no YAML mapping."""
    import yaml

    try:
        found = yaml.safe_load(block)
    except yaml.YAMLError as error:
        raise ValueError(
            f"the metadata at the head of README.md is no YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(found, dict | None):
        raise ValueError(f"the metadata at the head of README.md must be a mapping, not {type(found).__name__}.")
    return found or {}


def _merged(block: str, facts: CardFacts) -> str:
    import yaml

    present = read_metadata(block)
    wanted = _wanted(present, facts)
    try:
        merged = block
        for key, value in wanted.items():
            if present.get(key) != value:
                merged = _replace(merged, key, value)
        fits = merged == block or read_metadata(merged) == {**present, **wanted}
    except (ValueError, yaml.YAMLError):
        fits = False
    if not fits:
        raise ValueError(
            "the metadata at the head of README.md is written in a way that cannot be added to (a key given twice, an "
            "alias, or everything in one line); write it as one `key: value` a line."
        )
    return merged


def _wanted(present: dict[str, Any], facts: CardFacts) -> dict[str, Any]:
    from huggingface_hub import ModelCardData

    wanted = ModelCardData(
        library_name=present.get("library_name") or facts.library_name,
        base_model=present.get("base_model") or facts.base_model,
        tags=_union(present, "tags", TAGS),
        datasets=_union(present, "datasets", facts.datasets_on_hub),
        metrics=_union(present, "metrics", ["perplexity"] if facts.perplexity is not None else []),
    ).to_dict()
    index = _model_index(present.get("model-index") or [], facts)
    return wanted | ({"model-index": index} if index else {})


def _union(present: dict[str, Any], key: str, ours: list[str]) -> Any:
    found = present.get(key)
    if not isinstance(found, str | list | None):
        raise ValueError(f"{key!r} in the metadata of README.md must be a list, not {type(found).__name__}.")
    theirs = [found] if isinstance(found, str) else found or []
    missing = [value for value in ours if value not in theirs]
    return [*theirs, *missing] if missing else found


def _model_index(present: Any, facts: CardFacts) -> list[dict[str, Any]]:
    """The model-index with our perplexity, or nothing where there is none or the index has a form of its own."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    if facts.perplexity is None or not facts.datasets_on_hub:
        return []
    name = facts.datasets_on_hub[0]
    result = EvalResult(
        task_type="text-generation",
        task_name="Causal Language Modeling",
        dataset_type=name,
        dataset_name=name,
        metric_type="perplexity",
        metric_name="Perplexity",
        metric_value=round(facts.perplexity, 4),
    )
    ours = eval_results_to_model_index(facts.model_name, [result])
    if not present:
        return ours
    if not isinstance(present, list) or len(present) != 1 or not isinstance(present[0].get("results"), list):
        return []
    others = [entry for entry in present[0]["results"] if not _is_ours(entry, ours[0]["results"][0])]
    return [{**present[0], "results": [*others, *ours[0]["results"]]}]


def _is_ours(entry: Any, ours: dict[str, Any]) -> bool:
    """Whether a result is the one of an earlier card."""
    if not isinstance(entry, dict) or any(entry.get(key) != ours[key] for key in ("task", "dataset")):
        return False
    metrics = entry.get("metrics")
    return isinstance(metrics, list) and [one.get("type") for one in metrics] == ["perplexity"]


def _replace(block: str, key: str, value: Any) -> str:
    """The YAML text with this value in the place of the key's old one, or at the end."""
    import yaml
    from huggingface_hub.utils import yaml_dump

    line_break = line_break_of(block)
    entry = yaml_dump({key: value}, sort_keys=False).strip("\n").replace("\n", line_break)
    node = yaml.compose(block, Loader=yaml.SafeLoader)
    for key_node, value_node in node.value if node is not None else ():
        if key_node.value == key:
            stop = _end(value_node)
            while block[stop - 1].isspace():
                stop -= 1
            return block[: key_node.start_mark.index] + entry + block[stop:]
    return f"{block.rstrip()}{line_break}{entry}" if block.strip() else entry


def _end(node: Any) -> int:
    """Where a node's text ends. Block collections claim what follows them, comments included: ask their last leaf."""
    if isinstance(node.value, list) and node.value and not node.flow_style:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return node.end_mark.index
