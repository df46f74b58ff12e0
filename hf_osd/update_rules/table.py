"""The update rules by name: an algorithm and a storage."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..declare import build, options_of
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


def rule_options(name: str) -> frozenset[str]:
    """Which of the optimizer's options the rule declares."""
    return frozenset(options_of(RULES[name].rule))


def has_carry(name: str) -> bool:
    """Whether the rule's moments can be carried into another basis."""
    return hasattr(RULES[name].rule, "carry")


def build_rule(name: str, given: Mapping[str, Any] | None = None) -> UpdateRule:
    """The rule of this name with the optimizer's options; one that is `None` takes the rule's default."""
    return build(RULES[name].rule, given or {})


@lru_cache(maxsize=32)
def build_storage(name: str, dtype: torch.dtype | None = None) -> MomentStorage:
    """The storage of this rule's moments; `dtype` is the one of the float storage, *optional*."""
    return BlockWise8bit() if RULES[name].eight_bit else Dense(dtype)
