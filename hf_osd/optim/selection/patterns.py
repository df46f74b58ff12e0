"""Another rank or learning rate for some modules, by pattern, as peft's `rank_pattern`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...declare import Check, integer, number, plain
from ...text import shortened
from .matching import is_meant


# What follows the name of a linear layer in that of its weight, also of one that is computed (`weight_norm`).
WEIGHT = re.compile(r"\.(weight(_v|_orig)?|parametrizations\.weight\.original\d*)$")
NUMBER = re.compile(r"[\d.]+(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class ValuePattern:
    """An option that gives values to modules by regular expressions for the end of their names.

    Attributes:
        option (`str`): Its name.
        check ([`Check`]): Of a value.
        form (`str`): Completes "must name modules and their ...", with an example.
        things (`str`): What is matched, for messages.
    """

    option: str
    check: Check
    form: str
    things: str

    def parse(self, pattern: str | Mapping[str, Any] | None) -> dict[str, Any]:
        """`{"q_proj": 64}`, or the same in one string: `"q_proj:64;layers.0.mlp.*:32"`.

        Raises:
            ValueError: For another form, another value, or a key that is no regular expression.
        """
        if pattern is None:
            return {}
        if isinstance(pattern, str):
            entries = [entry.rpartition(":") for entry in pattern.split(";")]
            items = [(key.strip(), self._number(value.strip())) for key, _, value in entries]
        else:
            items = (
                [(key, plain(value)) for key, value in pattern.items()] if isinstance(pattern, Mapping) else [("", 0)]
            )
        for key, value in items:
            if not key or not isinstance(key, str) or self.check.complaint(value):
                raise ValueError(f"`{self.option}` must name modules and their {self.form}, got {pattern!r}.")
            try:
                re.compile(_end(key))
            except re.error as error:
                raise ValueError(f"{key!r} in `{self.option}` is no regular expression: {error}.") from None
            if [other for other, _ in items].count(key) > 1:
                raise ValueError(f"{key!r} stands twice in `{self.option}`, got {pattern!r}.")
        return {key: self.check.kind(value) for key, value in items}

    def _number(self, text: str) -> Any:
        try:
            return self.check.kind(text) if NUMBER.fullmatch(text) else text
        except ValueError:  # 2.5 where an integer must be
            return text

    def values(
        self,
        usual: Mapping[str, Any],
        pattern: Mapping[str, Any],
        plain: Mapping[str, str] | None = None,
        shared: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The value of every parameter: by the first pattern for the end of its or its module's name, or its own.

        Args:
            usual (`dict[str, Any]`): By name of every parameter, its value where no pattern matches.
            pattern (`dict[str, Any]`): As `parse` gives it.
            plain (`dict[str, str]`, *optional*):
                Names of modules without what peft puts in between, which a pattern may match as well.
            shared (`dict[str, str]`, *optional*): Other names of parameters, with those that `usual` has for them.

        Raises:
            ValueError: For a pattern that matches no parameter, or none that another has not taken before.
        """
        values, used = dict(usual), set()
        for name in values:
            key = _first(pattern, name, plain or {})
            if key is not None:
                values[name] = pattern[key]
                used.add(key)
        unused = {key: pattern[key] for key in pattern if key not in used}
        for name, first in (shared or {}).items() if unused else ():
            key = _first(unused, name, plain or {})
            if key is not None and first in values:
                raise ValueError(
                    f"{key!r} in `{self.option}` matches {name}, which is {first} as well: use that name."
                )
        if unused:
            parts = {part for name in values for part in name.split(".")}
            misspelt = [key for key in unused if key not in parts]  # the others are taken
            near = [one for key in misspelt for one in difflib.get_close_matches(key, parts, n=1)]
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{', '.join(map(repr, unused))} in `{self.option}` matches no {self.things} that an earlier pattern "
                f"has not taken.{hint} They are {shortened(values, 3)}."
            )
        return values


RANKS = ValuePattern("rank_pattern", integer(1), "ranks, as in 'q_proj:64;v_proj:32'", "projected module or matrix")
RATES = ValuePattern(
    "lr_pattern",
    number(0, open_below=True),
    "multiples of the learning rate, as in 'embed_tokens:4;lm_head:2'",
    "module or parameter that is trained and",
)


def _first(pattern: Iterable[str], name: str, plain: Mapping[str, str]) -> str | None:
    """The first pattern for the end of a parameter's name, or of its module's."""
    owner, _, last = name.rpartition(".")
    own_names = [f"{found}.{last}" for found in (owner, plain.get(owner, owner))]
    modules = {WEIGHT.sub("", own_name) for own_name in own_names}
    modules |= {own_name.rpartition(".")[0] for own_name in own_names}  # of a bias, or of experts' matrices
    for key in pattern:
        if any(re.fullmatch(_end(key), module) for module in modules) or is_meant(_end(key), *own_names):
            return key
    return None


def _end(key: str) -> str:
    return rf"(?:.*\.)?(?:{key})"
