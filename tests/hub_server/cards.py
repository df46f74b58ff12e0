"""The metadata at the head of a README.md."""

import re
from typing import Any

import yaml


FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def metadata(readme: str) -> dict[str, Any]:
    """Raises `ValueError` with the reason if it is not a YAML mapping."""
    match = FRONT_MATTER.match(readme)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"YAML: {error}") from error
    if not isinstance(data, dict | None):
        raise ValueError("the metadata must be a mapping")
    return data or {}


def problems(readme: str) -> list[str]:
    """The errors of the Hub that a training library can cause; it checks more."""
    try:
        data = metadata(readme)
    except ValueError as error:
        return [str(error)]
    found = []
    if not re.fullmatch(r"[a-z0-9.\-]+", str(data.get("license", "none"))):
        found.append('"license" must be one of the identifiers of the Hub, such as apache-2.0')
    for key in ("tags", "datasets", "language"):
        if not isinstance(data.get(key), str | list | None):
            found.append(f'"{key}" must be a string or a list')
    for model in data.get("model-index") or []:
        if not isinstance(model, dict) or not model.get("name") or not isinstance(model.get("results"), list):
            found.append('"model-index" needs a name and results')
    return found
