"""Which modules and parameters a user means by names and patterns: as in peft, and mistakes are refused."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from .adapters import ModuleNames


PLAIN_NAME = re.compile(r"[\w.-]+")


def match(wanted: str | list[str], names: Mapping[str, str], known: ModuleNames, option: str) -> list[str]:
    """Those of `names` (full name -> name without wrappers) that are meant, under either."""
    if isinstance(wanted, str):
        try:
            re.compile(wanted)
        except re.error as error:
            raise ValueError(f"`{option}` {wanted!r} is not a regular expression: {error}.") from error
        # `(?!.*lm_head$).*` is for any name, but not for what wrappers add to it: `lm_head.modules_to_save.default`.
        for_any = re.fullmatch(wanted, "wright.wright")
        found = {
            name
            for name, plain in names.items()
            if re.fullmatch(wanted, plain) or (re.fullmatch(wanted, name) and not for_any)
        }
        # A pattern for what is in a module, such as `.*layers.*`, is meant for its layers, not for all its parameters.
        return [
            name
            for name, plain in names.items()
            if name in found and (name in known.plain or (_owner(name) not in found and is_meant(wanted, name, plain)))
        ]
    for entry in wanted:
        if any(_ends(name, entry) or _ends(plain, entry) for name, plain in names.items()):
            continue
        if any(_ends(name, entry) for name in known.adapters):
            raise ValueError(f"{entry!r} in `{option}` is part of an adapter: adapters' factors are never projected.")
        last = sorted({plain.rsplit(".", 1)[-1] for plain in names.values()} - {"", "weight", *map(str, range(1000))})
        last = last or sorted(filter(None, names.values()))  # of modules with numbers
        inner = sorted((plain for plain in names.values() if plain and _ends(entry, plain)), key=len)
        close = inner[-1:] or difflib.get_close_matches(entry, last, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" The model has: {', '.join(last)}."
        if not PLAIN_NAME.fullmatch(entry) or entry.startswith("."):
            hint = f" A list has names; write patterns as one text for whole names, such as {'|'.join(wanted)!r}."
        raise ValueError(f"{entry!r} in `{option}` matches no module or matrix.{hint}")
    return [
        name for name, plain in names.items() if any(_ends(name, entry) or _ends(plain, entry) for entry in wanted)
    ]


def is_meant(pattern: str, *names: str) -> bool:
    """Whether a pattern matches a parameter by its own name, not as any name: `(?!.*q_proj$).*` is for modules."""
    other = _owner(_owner(names[-1])) + ".wright.wright"
    return any(re.fullmatch(pattern, name) for name in names) and not re.fullmatch(pattern, other.removeprefix("."))


def without(
    matched: Mapping[str, Any],
    unwanted: str | list[str],
    names: Mapping[str, str],
    known: ModuleNames,
    parts: Callable[[str, bool], set],
) -> dict[str, Any]:
    """What is left of `matched` (name -> weight or module) without what is named, and without what is inside of that.

    Args:
        parts (`Callable`): Weights and modules by a name: what it stands for, or all that is inside of that as well.
    """
    left = dict(matched)
    for entry in [unwanted] if isinstance(unwanted, str) else [[name] for name in unwanted]:
        excluded: set = set()
        for name in match(entry, names, known, "exclude_modules"):
            # A pattern that goes on behind a name tells by itself what is inside.
            goes_on = isinstance(entry, str) and any(re.fullmatch(entry, f"{one}.-") for one in (name, names[name]))
            excluded |= parts(name, not goes_on)
        if excluded.isdisjoint(matched.values()):
            raise ValueError(f"`exclude_modules` {entry!r} leaves nothing out of what is projected. Leave it out.")
        left = {name: part for name, part in left.items() if part not in excluded}
    return left


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)
