"""README, the pages of docs/ and the committed results, as the tests of their figures read them."""

import json
from pathlib import Path


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "benchmarks" / "results" / "cpu_2_cores"


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def text_of(name: str) -> str:
    """A page without line breaks, for what may break anywhere."""
    return " ".join(page(name).split())


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rows_of(name: str) -> list[dict]:
    return result(name)["rows"]


def by_method(name: str) -> dict[str, dict]:
    return {row["method"]: row for row in rows_of(name)}
