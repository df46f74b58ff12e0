"""Pages of `hf-osd report`, and runs that are changed for them."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_osd.cli.main import main


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def report(tmp_path: Path, *folders: Path) -> Page:
    page = tmp_path / "page.html"
    main(["report", *map(str, folders), "--output", str(page)])
    return Page(page.read_text(encoding="utf-8"))


def refused(*words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["report", *map(str, words)])
    assert str(caught.value).startswith("hf-osd report: ")
    return str(caught.value)


def copy(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target))


def write_results(run: Path, name: str = "results.json", **values: object) -> None:
    (run / name).write_text(json.dumps(values))
