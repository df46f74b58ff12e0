"""The options of SubZero, each declared once: keys of `optim_args`, and arguments of [`SubZero`]."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..declare import (
    Check,
    Need,
    Option,
    check_values,
    integer,
    number,
    one_of,
    option,
    options_of,
    refuse_without_effect,
)


NAME = "subzero"  # of `TrainingArguments(optim=...)`
PERTURBATIONS = ("subspace", "dense")
SOURCES = ("random", "activations")
SUBSPACE = Need(lambda given: given["perturbation"] == "subspace", "with perturbation='dense'")


def _is_saved(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike, Mapping))


@dataclass(frozen=True)
class Options:
    """The options of one run, valid once constructed.

    Raises:
        ValueError: For a value that is wrong or would have no effect.
    """

    rank: int = option(
        24,
        "Rank r of the subspaces (the authors use 8 to 48); matrices with min(m, n) <= r are perturbed densely.",
        check=integer(1),
        needs=(SUBSPACE,),
    )
    eps: float = option(1e-3, "Distance to the two points (the authors').", check=number(0, open_below=True))
    update_interval: int = option(
        1000, "Steps F between new U and V (the authors').", check=integer(1), needs=(SUBSPACE,)
    )
    queries: int = option(1, "Random directions of a step, two forward passes each.", check=integer(1))
    perturbation: str = option(
        "subspace", "`subspace`, or `dense`: all of N(0, 1), which is MeZO.", check=one_of(PERTURBATIONS)
    )
    source: str = option(
        "random",
        "`random` U and V, or `activations`: the V of linear layers follows their inputs.",
        check=one_of(SOURCES),
        needs=(SUBSPACE,),
    )
    init: Any = option(
        None,
        "A saved P, in which U or V are drawn, or V that follows starts: a `ProjectionState`, folder or repository.",
        check=Check("a ProjectionState, folder or repository", _is_saved, str),
        needs=(SUBSPACE,),
    )
    seed: int = option(0, "Seed of all draws, the same on all processes.", check=integer(0), argument="seed")

    def __post_init__(self):
        """Check the values, alone and together."""
        check_values(OPTIONS, vars(self), "SubZero")
        refuse_without_effect(OPTIONS, vars(self), "SubZero")

    def plain(self) -> dict[str, Any]:
        """The options as they are saved: of `init` only whether it was given."""
        return {**vars(self), "init": self.init is not None}


def refuse_targets(options: Options, target_modules: Any, name: str = "target_modules") -> None:
    """Raise `ValueError` for a choice of matrices that has no effect."""
    if target_modules is not None and options.perturbation == "dense":
        raise ValueError(f"`{name}` of SubZero has no effect with perturbation='dense'. Leave it out.")


OPTIONS: dict[str, Option] = options_of(Options)
KEYS = {name: own for name, own in OPTIONS.items() if own.argument is None}
