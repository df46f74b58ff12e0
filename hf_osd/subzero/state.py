"""Which saved states an optimizer may go on from."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..optim.differences import replaced_decays, replaced_rates
from .options import Options


# What a state must agree in beside the options, as `Weights` tells it.
AGREE = {"matrices": "other matrices in subspaces (`target_modules`)", "bases": "another `init`"}


def checked_seed(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], options: Options) -> int:
    """The seed of a saved state, all else of which must be as here.

    Args:
        state (`dict`): As `SubZero.state_dict` gives it.
        groups (`list[dict]`): `param_groups` of the optimizer that is to go on.
        options ([`Options`]): Its options.

    Raises:
        ValueError: For a state with other options, matrices in subspaces, `init` or parameters.
    """
    saved, own = state["param_groups"][-1], options.plain()
    if (own | AGREE).keys() - saved.keys():
        raise ValueError("This state is none of SubZero's: load the one that was saved with it.")
    other = [f"{name}={saved[name]}" for name in own if name != "seed" and saved[name] != own[name]]
    other += [text for name, text in AGREE.items() if not other and saved[name] != groups[-1][name]]
    if other:
        raise ValueError(f"This state was saved with {', '.join(other)}: give the same.")
    if [group.get("param_names") for group in state["param_groups"]] != [group["param_names"] for group in groups]:
        raise ValueError("This state is of other parameters: freeze the same ones, and give the same `weight_decay`.")
    seed: int = saved["seed"]
    return seed


def warn_restored(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], seed: int) -> None:
    """Warn of what a saved state replaces: the seed, the learning rates of a schedule, weight decay."""
    saved = state["param_groups"]
    pairs = list(zip(saved, groups, strict=True))
    replaced = [] if saved[-1]["seed"] == seed else [f"seed={saved[-1]['seed']} (checkpoint) instead of {seed}"]
    replaced += replaced_rates(pairs) + replaced_decays(pairs)
    if replaced:
        warnings.warn(f"The saved state's options are restored: {'; '.join(replaced)}.", stacklevel=3)
