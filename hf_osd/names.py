"""The values of `TrainingArguments(optim=...)` that are ours, and how they get into transformers' enum."""

from typing import TYPE_CHECKING

from .optim import OPTIM_NAMES
from .subzero.options import NAME as SUBZERO


if TYPE_CHECKING:
    from transformers.training_args import OptimizerNames


def add_names(enum: "type[OptimizerNames]") -> None:
    """Add our names to `OptimizerNames`, where they are not yet."""
    for name in (*OPTIM_NAMES, SUBZERO):
        if name not in enum._value2member_map_:
            _add_member(enum, name)


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
