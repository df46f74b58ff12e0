"""Parts of a model card, as its readers see them, and a card of somebody else."""

import re

import yaml

from hf_osd.hub.card.section import END, START


LOG = [
    {"step": 1, "loss": 4.0, "osd/pca_loss": 0.3},
    {"step": 2, "loss": 3.0, "osd/pca_loss": 0.2},
    {"step": 2, "eval_loss": 2.5, "eval_runtime": 1.0},
]


HEADED = """\
---
license: mit  # ours to give
tags: [text, 'no']
language: no
# datasets follow
datasets:
- one/data
# and the metrics
metrics: accuracy
---
# A title

Text with trailing blanks  \n\n\n<!-- a comment -->
"""


def section(text: str) -> str:
    return text[text.index(START) : text.index(END) + len(END)]


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", section(text), re.MULTILINE))


def head(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def code(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
