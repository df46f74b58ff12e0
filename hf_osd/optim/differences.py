"""What a saved state and the optimizer that is to load it differ in, parameter by parameter, and its table."""

from collections.abc import Iterable, Mapping, Sequence
from math import isclose
from typing import Any

from torch import Tensor

from .options.table import LR_MULTIPLE, OPTIONS, in_effect
from .step.geometry import Geometry, ProjectedGeometry, geometry_of, names_of


Traits = dict[str, str]  # what must agree between a saved state and the parameter that it is loaded for

# Options that must agree for each parameter; rank and side do as they are settled for it.
MATCHED = tuple(name for name, own in OPTIONS.items() if own.state and name not in ("rank", "side"))
ROWS_SHOWN = 12
DIGITS = 1e-5  # relative difference that six digits show
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]  # a saved group and the present one in its place


def traits(groups: Sequence[Mapping[str, Any]], params: Mapping[str, Tensor]) -> dict[str, Traits | None]:
    """The traits of every parameter of saved or live groups, `None` for one that this run does not have.

    Args:
        groups (`list[dict]`): Parameter groups, saved or live.
        params (`dict[str, torch.Tensor]`): The parameters of this run by name, as `names_of` names them.
    """
    found: dict[str, Traits | None] = {}
    for number, group in enumerate(groups):
        options = {name: str(in_effect(group, name) or OPTIONS[name].unset or "-") for name in MATCHED}
        times = f", {group[LR_MULTIPLE]:g} times lr" if LR_MULTIPLE in group else ""
        for index, name in enumerate(names_of(group, len(found))):
            if name not in params:
                found[name] = None
                continue
            if group["rank"] is not None and params[name].ndim < 2:  # a matrix then, and none now
                found[name] = {"projected": f"rank {group['rank']}"}
                continue
            geometry = geometry_of(group, index, params[name], len(found))
            found[name] = {
                "place": f"group {number} position {index}{times}",  # the groups' options are restored by place
                "projected": _projected(geometry),
                **options,
            }
    return found


def _projected(geometry: Geometry) -> str:
    return f"rank {geometry.rank} {geometry.side}" if isinstance(geometry, ProjectedGeometry) else "full size"


def differences(
    saved: Mapping[str, Traits | None], current: Mapping[str, Traits | None], placed: bool = True
) -> list[tuple[str, str, str]]:
    """(parameter, what the checkpoint has, what this run has) for every parameter that differs.

    Args:
        saved, current (`dict`): As `traits` gives them.
        placed (`bool`, *optional*, defaults to `True`): Whether another place in the groups is a difference.
    """
    rows = []
    for name in dict.fromkeys([*current, *saved]):
        old, new = saved.get(name), current.get(name)
        if old is None or new is None:
            rows.append((name, "has it" if name in saved else "-", "has it" if name in current else "-"))
            continue
        fields = [field for field in old if field in new and old[field] != new[field] and (placed or field != "place")]
        if fields:
            rows.append((name, _listed(old, fields), _listed(new, fields)))
    return rows


def counted(rows: Sequence[tuple[str, str, str]], current: Mapping[str, Traits | None], verb: str) -> str:
    """`3 of 21 parameters differ, 2 are in the checkpoint alone`: each of this run's counts once."""
    own = sum(name in current for name, _, _ in rows)
    alone = f", {len(rows) - own} are in the checkpoint alone" if own < len(rows) else ""
    return f"{own} of {len(current)} parameters {verb}{alone}"


def _listed(own: Traits, fields: Sequence[str]) -> str:
    return ", ".join(f"{field}: {own[field]}" for field in fields)


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Aligned text, the first rows of it."""
    shown = [("parameter", "checkpoint", "this run"), *rows[:ROWS_SHOWN]]
    widths = [max(len(row[column]) for row in shown) for column in range(2)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in shown]
    if len(rows) > ROWS_SHOWN:
        lines.append(f"  ... and {len(rows) - ROWS_SHOWN} more")
    return "\n".join(lines)


def replaced_rates(pairs: Iterable[Pair]) -> list[str]:
    """`lr=0.001 (checkpoint) instead of 1e-05`, once for each difference of the rates that schedules begin with.

    Where there is none, or `ReduceLROnPlateau`, which begins with none, that of the next step counts.

    Args:
        pairs (`Iterable[tuple[dict, dict]]`): Saved groups, each with the present one in its place.
    """
    found = []
    for saved, own in pairs:
        if "initial_lr" not in saved and "initial_lr" not in own:
            found.append((saved["lr"], own["lr"]))
        elif "initial_lr" in saved and ("initial_lr" in own or "max_lr" not in saved):  # OneCycleLR's is not the lr
            found.append((saved["initial_lr"], own.get("initial_lr", own["lr"])))
    return _replaced_numbers(found, "lr")


def replaced_decays(pairs: Iterable[Pair]) -> list[str]:
    """`weight_decay=0.1 (checkpoint) instead of 0`, likewise."""
    return _replaced_numbers([(saved["weight_decay"], own["weight_decay"]) for saved, own in pairs], "weight_decay")


def _replaced_numbers(found: Iterable[tuple[Any, Any]], name: str) -> list[str]:
    numbers = [(float(a), float(b)) for a, b in found]
    texts = (f"{name}={a:g} (checkpoint) instead of {b:g}" for a, b in numbers if not isclose(a, b, rel_tol=DIGITS))
    return list(dict.fromkeys(texts))
