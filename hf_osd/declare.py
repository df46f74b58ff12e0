"""Options, each declared once: a dataclass field with its check, its help and what it needs, where it is used.

Every list of options is made from these declarations: defaults and checks of groups, keys of `optim_args`, fields and
flags of the training arguments, what a checkpoint must match, rows of model cards, and (by `make options`) documents.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Check:
    """The values that an option may have.

    Attributes:
        text (`str`): Completes "must be ...".
        accepts (`Callable`): Takes any value and says whether it is one of them.
        kind (`type`): What a text becomes: `int`, `float`, `str`, `bool`, or `list` of numbers.
        names (`tuple[str, ...]`): The values of a choice, or texts that stand for themselves beside numbers.
    """

    text: str
    accepts: Callable[[Any], bool]
    kind: type
    names: tuple[str, ...] = ()

    @property
    def flag(self) -> type:
        """The type of a command line's value: there is one for each."""
        return str if self.names else self.kind

    def complaint(self, value: Any) -> str | None:
        """Text for a value that is not accepted, with the nearest name."""
        if self.accepts(value):
            return None
        close = difflib.get_close_matches(str(value), self.names, n=1)
        return self.text + (f" (did you mean {close[0]!r}?)" if close else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # NumPy's are, too


def number(low: float, *, open_below: bool = False, below: float = float("inf")) -> Check:
    """A finite number from `low` on, or above it."""
    text = f"a number {'>' if open_below else '>='} {low}" + (f" and < {below}" if below < float("inf") else "")
    return Check(
        text, lambda value: _is_number(value) and (low < value < below or (value == low and not open_below)), float
    )


def number_or(name: str, low: float, *, open_below: bool = False) -> Check:
    """A number as of `number`, or a name."""
    own = number(low, open_below=open_below)
    return Check(
        f"{own.text}, or {name!r}",
        lambda value: own.accepts(value) or (isinstance(value, str) and value == name),
        float,
        (name,),
    )


def integer(low: int, below: int | None = None) -> Check:
    """An integer from `low` on."""
    text = f"an integer >= {low}" + (f" and < {below}" if below is not None else "")

    def accepts(value: Any) -> bool:
        fine = _is_number(value) and isinstance(value, Integral)
        return fine and low <= int(value) and (below is None or int(value) < below)

    return Check(text, accepts, int)


def boolean() -> Check:
    """A truth value itself: 0, 1 and "true" are none."""
    return Check("True or False", lambda value: isinstance(value, bool), bool)


def one_of(names: Iterable[str], also: Callable[[Any], bool] = lambda value: False, otherwise: str = "") -> Check:
    """One of some names, or what `also` accepts, which `otherwise` says."""
    names = tuple(names)
    text = f"one of {', '.join(names)}" + (f", or {otherwise}" if otherwise else "")
    return Check(text, lambda value: (isinstance(value, str) and value in names) or also(value), str, names)


def betas() -> Check:
    """Two decay rates."""

    def accepts(value: Any) -> bool:
        fine = isinstance(value, (tuple, list)) and len(value) == 2
        return fine and all(_is_number(beta) and 0 <= beta < 1 for beta in value)

    return Check("two numbers >= 0 and < 1", accepts, list)


class Need(NamedTuple):
    """What an option has no effect without.

    Attributes:
        met (`Callable`): Takes all values by name.
        without (`str` or `Callable`): Completes "has no effect ...": a text, or what makes one of the values.
        way_out (`str`): Completes "Leave it out...".
    """

    met: Callable[[Mapping[str, Any]], bool]
    without: str | Callable[[Mapping[str, Any]], str]
    way_out: str = ""


@dataclass(frozen=True)
class Option:
    """One declared option.

    Attributes:
        help (`str`): The first paragraph is for flags and tables, all of it for the documents of [`OSD`].
        check ([`Check`]): The values that it may have.
        key (`str`): Its public name.
        needs (`tuple[Need, ...]`): All that it has no effect without.
        state (`bool`): Whether it must match a checkpoint; the others are restored from it.
        card (`str`, *optional*): Words for its row where it is not the default, else it is told everywhere.
        unset (`str`, *optional*): What `None` stands for.
        in_run (`str`, *optional*): The default that a Trainer or factory puts in its place, if another.
        argument (`str`, *optional*): Argument of transformers' Trainer that sets it: it has no key of ours then.
        name (`str`): Of the field.
        type (`Any`): Of the field.
        default (`Any`): Of the field.
        owners (`tuple[str, ...]`): Names of the rules that declare it, if rules do.
    """

    help: str
    check: Check
    key: str = ""
    needs: tuple[Need, ...] = ()
    state: bool = False
    card: str | None = None
    unset: str | None = None
    in_run: str | None = None
    argument: str | None = None
    name: str = ""
    type: Any = None
    default: Any = None
    owners: tuple[str, ...] = ()

    def has_default(self, value: Any) -> bool:
        """Whether it is left at its default, as an equal number also leaves it."""
        return same(value, self.default)

    def unmet(self, values: Mapping[str, Any]) -> Need | None:
        """The first of its needs that is not met."""
        return next((need for need in self.needs if not need.met(values)), None)


def option(default: Any, help: str, *, check: Check, **declared: Any) -> Any:  # noqa: A002
    """A dataclass field that declares an option; `declared` are further attributes of [`Option`].

    Example:
    ```python
    >>> from dataclasses import dataclass
    >>> from hf_osd.declare import number, option, options_of

    >>> @dataclass(frozen=True)
    ... class Rule:
    ...     mixing: float = option(0.9, "Share of the momentum.", check=number(0, below=1))

    >>> options_of(Rule)["mixing"].check.complaint(1.5)
    'a number >= 0 and < 1'

    ```
    """
    return field(default=default, metadata={"option": Option(help, check, **declared)})


def options_of(cls: type) -> dict[str, Option]:
    """The options that a dataclass declares, by field; fields without `option` are none of ours."""
    found = {}
    for own in fields(cls):
        if "option" in own.metadata:
            declared = own.metadata["option"]
            found[own.name] = replace(
                declared,
                key=declared.key or own.name.rstrip("_"),  # an underscore that only Python's keywords ask for
                name=own.name,
                type=own.type,
                default=own.default,
            )
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two values of an option are equal; tensors are what they are."""
    plain = (str, int, float)
    return a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b)


def plain(value: Any) -> Any:
    """A number or truth value of NumPy's or torch's as Python's own, alone or in a tuple: that is what states hold."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    return value.item() if getattr(value, "ndim", None) == 0 else value


def build(cls: type, given: Mapping[str, Any]) -> Any:
    """An instance with what is given of its options; one that is missing or `None` has its default."""
    values = {name: given[name] for name in options_of(cls) if given.get(name) is not None}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


# Options of earlier versions and of other libraries, and what to do here.
ELSEWHERE = {
    "ddp_compression": "it is no more. Use source='activations', which exchanges less between processes",
    "update_proj_gap": "it is GaLore's. Leave it out: P moves at every step (subspace='svd' has `update_interval`)",
    "proj_type": "it is GaLore's. Leave it out, or choose `side`",
    "r": "it is `rank` here",
    "proj": "it is APOLLO's. P at random is subspace='random'",
    "scale_type": "it is APOLLO's. Leave it out",
    "lora_alpha": "it is LoRA's. The factor on the update is `scale`; `alpha` is P's learning rate",
    "learning_rate": "it is `lr` here",
    "perturbation": "it is for optim='subzero'",
    "queries": "it is for optim='subzero'",
}


def refuse_unknown(given: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Raise `ValueError` for the first name that is not allowed, with the nearest one and all of them."""
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            if name in ELSEWHERE:
                raise ValueError(f"Unknown option `{name}` in {where}: {ELSEWHERE[name]}.")
            close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"Unknown option `{name}` in {where}.{hint} Allowed: {', '.join(allowed)}.")


def check_values(
    declared: Mapping[str, Option], values: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None
) -> None:
    """Raise `ValueError` for the first value that its option does not take. `None` stands for a default of `None`.

    `names` are those that the options were given by, where these are others.
    """
    for name, own in declared.items():
        value = values[name]
        complaint = None if value is None and own.default is None else own.check.complaint(value)
        if complaint:
            raise ValueError(f"`{(names or {}).get(name, name)}` of {where} must be {complaint}, got {value!r}.")


def refuse_without_effect(
    declared: Mapping[str, Option], values: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None
) -> None:
    """Raise `ValueError` for the first option that is given and whose needs are not met."""
    for name, own in declared.items():
        need = None if own.has_default(values[name]) else own.unmet(values)
        if need is not None:
            without = need.without if isinstance(need.without, str) else need.without(values)
            name = (names or {}).get(name, name)
            raise ValueError(f"`{name}` of {where} has no effect {without}. Leave it out{need.way_out}.")
