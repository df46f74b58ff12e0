"""Another rank for some modules, by pattern, as peft's `rank_pattern`."""

import re
from collections.abc import Mapping

from ...declare import plain
from ...text import shortened
from .matching import is_meant


# What follows the name of a linear layer in that of its weight, also of one that is computed (`weight_norm`).
WEIGHT = re.compile(r"\.(weight(_v|_orig)?|parametrizations\.weight\.original\d*)$")


def parse_rank_pattern(pattern: str | Mapping[str, int] | None) -> dict[str, int]:
    """`{"q_proj": 64}`, or the same in one string: `"q_proj:64;layers.0.mlp.*:32"`.

    Raises:
        ValueError: For another form, a rank that is no integer >= 1, or a key that is no regular expression.
    """
    if pattern is None:
        return {}
    if isinstance(pattern, str):
        entries = [entry.rpartition(":") for entry in pattern.split(";")]
        items = [(key.strip(), int(rank) if rank.strip().isdecimal() else rank) for key, _, rank in entries]
    else:
        items = [(key, plain(rank)) for key, rank in pattern.items()] if isinstance(pattern, Mapping) else [("", 0)]
    for key, rank in items:
        if not key or not isinstance(key, str) or not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(
                f"`rank_pattern` must name modules and their ranks, as in 'q_proj:64;v_proj:32', got {pattern!r}."
            )
        try:
            re.compile(_end(key))
        except re.error as error:
            raise ValueError(f"{key!r} in `rank_pattern` is no regular expression: {error}.") from None
    return {key: int(rank) for key, rank in items}


def ranks_of(
    usual: Mapping[str, int], pattern: Mapping[str, int], plain: Mapping[str, str] | None = None
) -> dict[str, int]:
    """The rank of every parameter: by the first pattern that matches the end of its or its module's name, or its own.

    Args:
        usual (`dict[str, int]`): By name of every projected parameter, its rank where no pattern matches.
        pattern (`dict[str, int]`): As `parse_rank_pattern` gives it.
        plain (`dict[str, str]`, *optional*):
            Names of modules without what peft puts in between, which a pattern may match as well.

    Raises:
        ValueError: For a pattern that matches no projected parameter, or none that another has not taken before.
    """
    ranks, used = dict(usual), set()
    for name in ranks:
        owner, _, last = name.rpartition(".")
        own_names = [f"{found}.{last}" for found in (owner, (plain or {}).get(owner, owner))]
        modules = [WEIGHT.sub("", own_name) for own_name in own_names]
        for key, own in pattern.items():
            if any(re.fullmatch(_end(key), module) for module in modules) or is_meant(_end(key), *own_names):
                ranks[name] = own
                used.add(key)
                break
    unused = [key for key in pattern if key not in used]
    if unused:
        raise ValueError(
            f"{', '.join(map(repr, unused))} in `rank_pattern` matches no projected module or matrix that an earlier "
            f"pattern has not taken. They are {shortened(ranks, 3)}."
        )
    return ranks


def _end(key: str) -> str:
    return rf"(?:.*\.)?(?:{key})"
