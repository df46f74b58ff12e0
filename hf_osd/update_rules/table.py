"""The update rules by name: an algorithm and a storage."""

from dataclasses import fields
from functools import lru_cache
from typing import NamedTuple

import torch

from .adafactor import Adafactor
from .adamw import AdamW
from .lion import Lion
from .protocol import UpdateRule
from .sgd import SGD
from .storage import BlockWise8bit, Dense, MomentStorage


class RuleEntry(NamedTuple):
    """One name: the algorithm, and whether its moments are kept in 8 bits."""

    rule: type
    eight_bit: bool


RULES: dict[str, RuleEntry] = {
    "adamw": RuleEntry(AdamW, eight_bit=False),
    "adamw8bit": RuleEntry(AdamW, eight_bit=True),
    "lion": RuleEntry(Lion, eight_bit=False),
    "lion8bit": RuleEntry(Lion, eight_bit=True),
    "adafactor": RuleEntry(Adafactor, eight_bit=False),
    "sgd": RuleEntry(SGD, eight_bit=False),
}


def rule_options(name: str) -> set[str]:
    """Which of the optimizer's options (`betas`, `eps`, `momentum`) the rule uses."""
    return {field.name for field in fields(RULES[name].rule)} & {"betas", "eps", "momentum"}


def has_carry(name: str) -> bool:
    """Whether the rule's moments can be carried into another basis."""
    return hasattr(RULES[name].rule, "carry")


@lru_cache(maxsize=256)
def build_rule(
    name: str, betas: tuple[float, float] | None = None, eps: float | None = None, momentum: float | None = None
) -> UpdateRule:
    """The rule of this name; an option that is `None` takes the rule's default, one that it does not use is left."""
    given = {"betas": betas, "eps": eps, "momentum": momentum}
    return RULES[name].rule(**{key: given[key] for key in rule_options(name) if given[key] is not None})


@lru_cache(maxsize=32)
def build_storage(name: str, dtype: torch.dtype | None = None) -> MomentStorage:
    """The storage of this rule's moments; `dtype` is the one of the float storage, *optional*."""
    return BlockWise8bit() if RULES[name].eight_bit else Dense(dtype)
