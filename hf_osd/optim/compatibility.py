"""Whether a saved state belongs to this optimizer: compared parameter by parameter, explained as a table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..subspace import is_rule
from .options.table import projection_rule
from .step.geometry import ProjectedGeometry, geometry_of, names_of


# Options that shape the trajectory but not the state: the saved values are restored, as torch restores `lr`.
RESTORED = (
    *("alpha", "lambda_", "scale", "weight_decay", "projection_weight_decay", "betas", "eps", "momentum"),
    *("update_interval", "projection_interval", "projection_schedule", "distribution", "mixing", "carry_moments"),
    *("residual_scaling", "residual_scale", "residual_limit", "stochastic_rounding"),
)
ROWS_SHOWN = 12


class Traits(NamedTuple):
    """What must agree between a saved state and the parameter that it is loaded for."""

    place: str  # the groups' options are restored by place
    projected: str  # "rank 8, left" or "full size"
    weight_rule: str
    moment_dtype: str
    subspace: str
    projection_rule: str
    projection_dtype: str
    residual: str


def traits(groups: Sequence[Mapping[str, Any]], params: Mapping[str, Tensor]) -> dict[str, Traits | None]:
    """The traits of every parameter of saved or live groups, `None` for one that this run does not have.

    Args:
        groups (`list[dict]`): Parameter groups, saved or live.
        params (`dict[str, torch.Tensor]`): The parameters of this run by name, as `names_of` names them.
    """
    found: dict[str, Traits | None] = {}
    for number, group in enumerate(groups):
        for index, name in enumerate(names_of(group, len(found))):
            if name not in params:
                found[name] = None
                continue
            geometry = geometry_of(group, index, params[name], len(found))
            projected = isinstance(geometry, ProjectedGeometry)
            found[name] = Traits(
                place=f"group {number} position {index}",
                projected=f"rank {geometry.rank} {geometry.side}"
                if isinstance(geometry, ProjectedGeometry)
                else "full size",
                weight_rule=group["weight_rule"],
                moment_dtype=group["moment_dtype"] or "float32",
                subspace=group["subspace"] if projected else "-",
                # a rule of the user's own may be unknown in this process
                projection_rule=(projection_rule(group) or "-") if is_rule(group["subspace"]) else "-",
                projection_dtype=(group["projection_dtype"] or "float32") if projected else "-",
                residual=group["residual"] if projected else "-",
            )
    return found


def differences(
    saved: Mapping[str, Traits | None], current: Mapping[str, Traits | None], placed: bool = True
) -> list[tuple[str, str, str]]:
    """(parameter, what the checkpoint has, what this run has) for every parameter that differs.

    Args:
        saved, current (`dict`): As `traits` gives them.
        placed (`bool`, *optional*, defaults to `True`): Whether another place in the groups is a difference.
    """
    rows, compared = [], Traits._fields if placed else Traits._fields[1:]
    for name in dict.fromkeys([*current, *saved]):
        old, new = saved.get(name), current.get(name)
        if old is None or new is None:
            rows.append((name, "has it" if name in saved else "-", "has it" if name in current else "-"))
            continue
        fields = [field for field in compared if getattr(old, field) != getattr(new, field)]
        if fields:
            rows.append((name, _listed(old, fields), _listed(new, fields)))
    return rows


def _listed(own: Traits, fields: Sequence[str]) -> str:
    return ", ".join(f"{field}: {getattr(own, field)}" for field in fields)


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Aligned text, the first rows of it."""
    shown = [("parameter", "checkpoint", "this run"), *rows[:ROWS_SHOWN]]
    widths = [max(len(row[column]) for row in shown) for column in range(2)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in shown]
    if len(rows) > ROWS_SHOWN:
        lines.append(f"  ... and {len(rows) - ROWS_SHOWN} more")
    return "\n".join(lines)


def restored_options(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences for options whose saved value replaces another one."""
    changed = {
        f"{name}={new[name]!r} (checkpoint) instead of {old[name]!r}": None
        for new, old in zip(saved, current, strict=False)
        for name in RESTORED
        if name in new and _plain(new[name]) != _plain(old[name])
    }
    return list(changed)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
