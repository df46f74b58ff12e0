"""The values of `TrainingArguments(optim=...)` that are ours, and how they get into transformers' enum."""

import difflib
from typing import TYPE_CHECKING, Any

from .optim import OPTIM_NAMES
from .subzero.options import NAME as SUBZERO


if TYPE_CHECKING:
    from transformers.training_args import OptimizerNames


def add_names(enum: "type[OptimizerNames]") -> None:
    """Add our names to `OptimizerNames`, where they are not yet."""
    names = [name for name in (*OPTIM_NAMES, SUBZERO) if name not in enum._value2member_map_]
    for name in names:
        _add_member(enum, name)
    if names:
        _suggest(enum)


def _add_member(enum: "type[OptimizerNames]", name: str) -> None:
    member = str.__new__(enum, name)
    member._name_ = name.upper()
    member._value_ = name
    # An enum member is pickled as a call of its class, which fails where this package is not imported. The arguments
    # of a run are pickled into every checkpoint and pushed to the Hub, so our members are pickled as plain strings.
    vars(member).update(__reduce_ex__=lambda protocol: (str, (name,)), __deepcopy__=lambda memo: member)
    type.__setattr__(enum, member._name_, member)
    enum._member_names_.append(member._name_)
    enum._member_map_[member._name_] = member
    enum._value2member_map_[name] = member


def _suggest(enum: "type[OptimizerNames]") -> None:
    """Let the error for an unknown name end in the nearest one, where that is ours."""
    refuse = enum._missing_

    def refuse_and_suggest(cls: type, value: Any) -> Any:
        try:
            return refuse(value)
        except ValueError as error:
            near = difflib.get_close_matches(str(value).lower(), list(enum._value2member_map_), n=1, cutoff=0.8)
            if not near or near[0] not in (*OPTIM_NAMES, SUBZERO):
                raise
            raise ValueError(f"{error}. Did you mean {near[0]!r}?") from None

    type.__setattr__(enum, "_missing_", classmethod(refuse_and_suggest))
