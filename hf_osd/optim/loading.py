"""Load a saved state: exactly, or not at all; for the parameters that fit, where the user asks for that.

A saved state is compared with the optimizer parameter by parameter; what differs is told as a table.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..declare import plain
from .differences import counted, differences, replaced_rates, table, traits
from .fitting import fitting_states
from .options.rules import rules_of
from .options.table import CYCLED, DEFAULTS, LR_MULTIPLE, OPTIONS, in_effect, projection_alpha, spell_out
from .selection.wrappers import plain_names
from .step.geometry import names_of
from .step.sharding import is_sharded
from .step.state import P_ENTRIES


State = dict[Tensor, dict[str, Tensor]]

# Options that shape the trajectory but not the state: the saved values are restored, as torch restores `lr`.
RESTORED = tuple(name for name, own in OPTIONS.items() if not own.state)
# Options that there were once -> the values with which today's code takes the same steps.
FORMER: dict[str, tuple[Any, ...]] = {
    "residual_scaling": (None, "column"),
    "residual_limit": (None, 1.01),
    "projection_schedule": (None, "lr"),
}


def match_state(
    live_groups: list[dict[str, Any]],
    state_dict: Mapping[str, Any],
    partial: bool,
    shared: Mapping[str, str],
    divide: bool = True,
) -> tuple[State, list[dict[str, Any]]]:
    """What to set in an optimizer so that it continues from `state_dict`. Changes nothing.

    Args:
        live_groups (`list[dict]`): The optimizer's groups.
        state_dict (`dict`): A saved state, as `state_dict()` gives it.
        partial (`bool`): Whether to leave out parameters that differ instead of refusing.
        shared (`dict[str, str]`): Of `saved_inputs` those that this run can share, too. A weight whose P is in a state
            that is not there, or not for it, starts anew.
        divide (`bool`, *optional*, defaults to `True`): Whether processes divide P here, where they can.

    Returns:
        The state by parameter, on the parameters' devices in the saved dtypes, and the groups to restore.

    Raises:
        ValueError: With a table of what differs, or if an entry is missing or has another shape or dtype.
    """
    if not partial and not all("weight_rule" in group for group in state_dict["param_groups"]):
        raise ValueError(
            "This is not a state of hf_osd: begin with the weights alone, or set `partial_load` to start all anew."
        )
    saved_groups = _plainly_named([as_of_today(group) for group in state_dict["param_groups"]])
    params, keys = _by_name(live_groups), _by_name(saved_groups)
    live_groups = _with_sides(live_groups, _stored(saved_groups, "sides"))
    saved, current = traits(saved_groups, params), traits(live_groups, params)
    rows = differences(saved, current)
    as_saved = not rows
    if partial:  # the groups stay as they are now, whatever place a parameter has had in them
        rows = differences(saved, current, placed=False)
    elif rows:
        raise ValueError(
            f"The state was saved by another optimizer: {counted(rows, current, 'differ')}.\n"
            f"{table(rows)}\n"
            "Use the options it was saved with, or set `partial_load` to start the differing parameters anew."
        )
    different = {name for name, _, _ in rows}
    by_name = {name: state_dict["state"].get(key, {}) for name, key in keys.items() if name not in different}
    by_name, unfit = fitting_states(saved_groups, by_name, params, divide)
    for name, got, expected in unfit if not partial else ():
        raise ValueError(
            f"The saved state of {name} does not fit: it has {got}, expected {expected}. Is it of another shape? "
            "`partial_load` would start it anew."
        )
    rows, as_saved = rows + unfit, as_saved and not unfit
    before, now = _owners(saved_groups), _owners(live_groups)
    for name in [] if as_saved else list(by_name):
        kept, wanted = (", ".join(rules_of(own[name]).moments) or "no moments" for own in (before, now))
        if kept != wanted:  # SGD's `momentum` decides that
            del by_name[name]
            rows.append((name, kept, wanted))
    for name, holder in _orphans(saved_groups, by_name, shared).items():
        if by_name.pop(name).get("step", 0) > 0:  # else it has learned nothing
            rows.append((name, f"P of {holder}", "-"))
    if rows:
        warnings.warn(
            f"{counted(rows, current, 'differ from the saved state and start anew')}.\n{table(rows)}",
            stacklevel=4,
        )
    state = {params[name]: _to_device(entries, params[name]) for name, entries in by_name.items() if entries}
    if as_saved:
        replaced = restored_options(saved_groups, live_groups)
        if replaced:
            warnings.warn(f"The saved state's options are restored: {'; '.join(replaced)}.", stacklevel=4)
        return state, saved_groups
    groups = _with_schedule(live_groups, saved_groups)
    now = _owners(groups)
    _warn_of_options([(now[name], before[name]) for name, entries in by_name.items() if entries])
    _warn_of_schedules(live_groups, groups, saved_groups)
    return state, groups


def _warn_of_options(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """What continues from a saved state goes by this run's options, where some of it does not."""
    changed = {text: None for now, before in pairs for text in _replaced(now, before, "this run")}
    if changed:
        warnings.warn(
            f"Parameters that continue from the saved state go by the options of this run: {'; '.join(changed)}.",
            stacklevel=4,
        )


def _warn_of_schedules(
    live_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
) -> None:
    """A schedule goes on from the rates that it began with; its state, loaded later, has them by place of group."""
    replaced = replaced_rates(zip(groups, live_groups, strict=True))
    if replaced:
        warnings.warn(f"The saved learning rate is restored: {'; '.join(replaced)}.", stacklevel=4)
    now, before = ([group.get("initial_lr") for group in own] for own in (groups, saved_groups))
    if now != before and any(rate is not None for rate in before):
        warnings.warn(
            "The groups of this run have other learning rates than the saved ones, which a schedule's saved state "
            "would bring back. Trainer keeps those of this run; in a loop of your own set `schedule.base_lrs = "
            "[group['initial_lr'] for group in optimizer.param_groups]` after `schedule.load_state_dict`.",
            stacklevel=4,
        )


def saved_inputs(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """By name of weight that layers have made R of, the one in whose state its P is, where there is one."""
    groups: Sequence[Mapping[str, Any]] = state_dict["param_groups"]
    states = {name: state_dict["state"].get(key, {}) for name, key in _by_name(groups).items()}
    started = {name for name, own in states.items() if any(own[key].any() for key in own if key in P_ENTRIES)}
    return {name: holder for name, holder in _holders(groups).items() if states[name] and holder in started}


def _plainly_named(saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the names of a model without wrappers: those of a wrapped one were saved as they were."""
    names = iter(plain_names([name for group in saved_groups for name in group.get("param_names") or ()]))
    for group in saved_groups:
        if group.get("param_names"):
            group["param_names"] = [next(names) for _ in group["param_names"]]
    return saved_groups


def _by_name(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters by name; of saved groups what stands for them in the state."""
    found: dict[str, Any] = {}
    for group in groups:
        found |= zip(names_of(group, len(found)), group["params"], strict=True)
    return found


def _owners(groups: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The group of each parameter, by its name."""
    found: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        found |= dict.fromkeys(names_of(group, len(found)), group)
    return found


def _holders(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {name: holder for name, holder in _stored(groups, "inputs").items() if holder is not None}


def _stored(groups: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """By parameter name, what groups have in such a list, `None` where they have no list."""
    found: dict[str, Any] = {}
    for group in groups:
        names = names_of(group, len(found))
        found |= zip(names, group.get(key) or [None] * len(names), strict=False)
    return found


def _with_sides(live_groups: list[dict[str, Any]], saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups with the saved sides of matrices that are whole and for which any side will do (`auto`).

    The same matrix may have been sharded, and have had no choice.
    """
    one_sided, found, position = {"left", "right"}, [], 0
    for group in live_groups:
        names = names_of(group, position)
        position += len(names)
        if group.get("sides") and group["side"] == "auto" and group["source"] == "gradients":
            members = zip(names, group["params"], group["sides"], strict=True)
            sides = [
                saved[name] if {own, saved.get(name)} <= one_sided and not is_sharded(p) else own
                for name, p, own in members
            ]
            group = {**group, "sides": sides}
        found.append(group)
    return found


def _orphans(
    groups: Sequence[Mapping[str, Any]], states: Mapping[str, Any], shared: Mapping[str, str]
) -> dict[str, str]:
    """Of these states those whose P is in one that is not there, or not for them, with the name of that."""
    return {
        name: holder
        for name, holder in _holders(groups).items()
        if name in states and name != holder and not (holder in states and shared.get(name) == holder)
    }


def as_of_today(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with the options that there are: one that was saved before there was an option had its default.

    But for `projection_sample`: P learned of whole gradients then.

    Raises:
        ValueError: If it was trained with an option that there is no longer.
    """
    for name, same_steps in FORMER.items():
        two_sided = name == "residual_scaling" and group.get("side") == "two_sided"  # whose R has no columns of G
        if group.get(name) not in (same_steps if not two_sided else (None, "matrix")):
            raise ValueError(
                f"The state was saved with {name}={group[name]!r}, which hf_osd no longer has: go on with the version "
                "that saved it, or start a new run."
            )
    known = "projection_sample" in group
    group = DEFAULTS | {name: value for name, value in group.items() if name not in FORMER}
    if not known and group["source"] == "gradients" and OPTIONS["projection_sample"].unmet(group) is None:
        group["projection_sample"] = 1
    spell_out(group)
    return group


def _to_device(entries: Any, p: Tensor) -> Any:
    # A copy where nothing moves: the state is changed in place, and the saved one must not be.
    if isinstance(entries, Tensor):
        return entries.detach().clone() if entries.device == p.device else entries.to(p.device)
    if isinstance(entries, dict):
        return {name: _to_device(value, p) for name, value in entries.items()}
    if type(entries) in (list, tuple):
        return type(entries)(_to_device(value, p) for value in entries)
    return copy.deepcopy(entries)


def _with_schedule(live_groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The live groups with the learning rate that the saved run had come to, for their first parameter or else any."""
    owners = _owners(saved_groups)
    groups: list[dict[str, Any]] = []
    position = 0
    for group in live_groups:
        names = names_of(group, position)
        owner = next((owners[name] for name in names if name in owners), saved_groups[0])
        factor = group.get(LR_MULTIPLE, 1) / owner.get(LR_MULTIPLE, 1)
        schedule: dict[str, Any] = {name: factor * owner[name] for name in ("lr", "initial_lr") if name in owner}
        merged = {**group, **schedule, "params": list(range(position, position + len(names)))}
        if merged["projection_lr"] is not None:  # of which alpha is made, and the learning rate is another now
            merged["alpha"] = projection_alpha(merged, plain(merged.get("initial_lr", merged["lr"])))
        groups.append(merged)
        position += len(names)
    return groups


def restored_options(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences for options whose saved value replaces another one, and for the rates that schedules begin with."""
    pairs = list(zip(saved, current, strict=False))
    options = [text for new, old in pairs for text in _replaced(new, old, "checkpoint")]
    return list(dict.fromkeys([*replaced_rates(pairs), *options]))


def _replaced(new: Mapping[str, Any], old: Mapping[str, Any], whose: str) -> list[str]:
    """`alpha=5.0 (checkpoint) instead of 1.0` for options that shape the trajectory alone."""
    found, not_given = [], set()
    if all(group["projection_lr"] is not None for group in (new, old)):
        not_given.add("alpha")  # but made of that, and of the learning rate
    if any("base_momentum" in group for group in (new, old)):
        not_given.update(CYCLED)  # but a schedule's
    for name in (name for name in RESTORED if name not in not_given):
        a, b = (_plain(in_effect(group, name)) for group in (new, old))
        if a != b and "given" not in (a, b):  # tensors that P has started from
            found.append(f"{name}={a!r} ({whose}) instead of {b!r}")
    return found


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
