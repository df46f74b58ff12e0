"""Which modules and parameters a user means by names and patterns: as in peft, and mistakes are refused."""

import difflib
import re
from collections.abc import Mapping

from .adapters import ModuleNames


PLAIN_NAME = re.compile(r"[\w.-]+")


def match(wanted: str | list[str], names: Mapping[str, str], known: ModuleNames, option: str) -> list[str]:
    """Those of `names` (full name -> name without wrappers) that are meant, under either."""
    if isinstance(wanted, str):
        try:
            found = {name for name, plain in names.items() if any(re.fullmatch(wanted, one) for one in (name, plain))}
        except re.error as error:
            raise ValueError(f"`{option}` {wanted!r} is not a regular expression: {error}.") from error
        # A pattern for what is in a module, such as `.*layers.*`, is meant for its layers, not for all its parameters.
        return [name for name in names if name in found and (name in known.plain or _owner(name) not in found)]
    for entry in wanted:
        if any(_ends(name, entry) or _ends(plain, entry) for name, plain in names.items()):
            continue
        if any(_ends(name, entry) for name in known.adapters):
            raise ValueError(f"{entry!r} in `{option}` is part of an adapter: adapters' factors are never projected.")
        last = sorted({plain.rsplit(".", 1)[-1] for plain in names.values()} - {"weight", *map(str, range(1000))})
        close = difflib.get_close_matches(entry, last, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" The model has: {', '.join(last)}."
        if not PLAIN_NAME.fullmatch(entry) or entry.startswith("."):
            hint = f" A list has names; write patterns as one text for whole names, such as {'|'.join(wanted)!r}."
        raise ValueError(f"{entry!r} in `{option}` matches no module.{hint}")
    return [
        name for name, plain in names.items() if any(_ends(name, entry) or _ends(plain, entry) for entry in wanted)
    ]


def without(matched: list[str], unwanted: str | list[str], names: Mapping[str, str], known: ModuleNames) -> list[str]:
    """What is left of `matched` without what is named, and without what is inside of that."""
    left = matched
    for entry in [unwanted] if isinstance(unwanted, str) else [[name] for name in unwanted]:
        excluded = set(match(entry, names, known, "exclude_modules"))
        inside = tuple(f"{name}." for name in excluded)
        own = [name for name in matched if name not in excluded and not name.startswith(inside)]
        if len(own) == len(matched):
            raise ValueError(f"`exclude_modules` {entry!r} leaves nothing out of what is projected. Leave it out.")
        left = [name for name in left if name in own]
    return left


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)
