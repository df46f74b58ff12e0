"""What is decided once for a parameter group: its options are checked, sides and P's learning rate settled."""

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from torch import Tensor

from ..declare import plain
from ..layers import PreparedLayers
from ..subspace import SubspaceRule, name_rule, rule_class
from ..text import shortened
from ..update_rules import RULES, require_bitsandbytes
from .options import table as options
from .options.mode import MODE_OPTIONS, Mode, refuse_in_mode
from .options.presets import KEYS
from .selection.wrappers import DDP, plain_name, plain_names
from .step.geometry import ProjectedGeometry, geometry_of, names_of
from .step.sharding import meshes_of, refuse_flat
from .step.sides import is_matrix, is_projected, settle_sides


# What a group may not have: options of a whole optimizer, ours and torch's, which would do nothing there.
OF_OPTIMIZERS = (KEYS.keys() | MODE_OPTIONS.keys() | {"maximize", "amsgrad", "nesterov"}) - options.OPTIONS.keys()


def refuse_ignored(group: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options that a group does not have; what is no option of ours is its owner's own."""
    for name in sorted(group.keys() - options.OPTIONS.keys()):
        swapped = [own for own in options.OPTIONS if sorted(own) == sorted(name)]  # rnak, but not size or unit
        near = swapped or difflib.get_close_matches(name, options.OPTIONS, n=1, cutoff=0.85)
        if name in OF_OPTIMIZERS and group[name]:
            near = [KEYS[name].name] if name in KEYS and KEYS[name].name in options.OPTIONS else []
        elif not near or abs(len(near[0]) - len(name)) > 1:
            continue
        hint = f" Did you mean `{near[0]}`?" if near else " It is for the whole optimizer." if name in KEYS else ""
        raise ValueError(f"`{name}` in a parameter group has no effect.{hint}")


def named(group: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A new group; where the others have names and it has none, with such as unnamed parameters have in messages."""
    params = group["params"]
    if not others or "param_names" not in others[0] or isinstance(params, set):
        return dict(group)
    params = [params] if isinstance(params, Tensor) else list(params)
    if all(isinstance(p, Tensor) for p in params) and "param_names" not in group:
        known = {name for other in others for name in other["param_names"]}
        free = (name for i in count(len(known)) if (name := f"parameter {i}") not in known)
        params = list(zip(free, params, strict=False))
    return {**group, "params": params}


def divided(params: Iterable[Any], selection: Sequence[Mapping[str, Any]], lr: Any) -> list[dict[str, Any]]:
    """Groups of one's own, of which each keeps its options, divided into those of a selection.

    What Trainer has split into groups by the meshes of their parameters is one group, as it is on one process: states
    are then the same.

    Args:
        params (`Iterable`): Parameters, (name, parameter) pairs, or groups of either.
        selection (`list[dict]`):
            Groups of (name, parameter) pairs that differ in what is projected, as `factory.py` makes them. Those with
            an `LR_MULTIPLE` have as many times the learning rate.
        lr (`float`): Learning rate of groups that have none of their own.

    Returns:
        In the order of the selection, and last what it does not know.
    """
    given: list[Any] = list(params)
    own = [dict(one) for one in given] if given and isinstance(given[0], dict) else [{"params": given}]
    left: list[dict[Tensor, Any]] = []
    for group in own:
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        left.append({entry[1] if isinstance(entry, tuple) else entry: entry for entry in entries})
    for index in range(len(own) - 1):
        while index + 1 < len(own) and _split_by_mesh(own[index : index + 2], left[index : index + 2]):
            left[index] |= left.pop(index + 1)
            del own[index + 1]
    found = []
    for chosen in selection:
        for group, rest in zip(own, left, strict=True):
            pairs = [(name, p) for name, p in chosen["params"] if rest.pop(p, None) is not None]
            made = {**chosen, **group, "params": pairs}
            if options.LR_MULTIPLE in chosen:
                made["lr"] = chosen[options.LR_MULTIPLE] * options.lr_of_step(group.get("lr", lr), "OSD")
            found += [made] if pairs else []
    return found + [{**group, "params": list(rest.values())} for group, rest in zip(own, left, strict=True) if rest]


def _split_by_mesh(groups: Sequence[Mapping[str, Any]], members: Sequence[Iterable[Tensor]]) -> bool:
    """Whether two groups have nothing apart but the meshes that their parameters lie on."""
    (first, second), options = map(meshes_of, members), [{**group, "params": None} for group in groups]
    return first.isdisjoint(second) and options[0] == options[1]


def settle_group(
    group: dict[str, Any],
    where: str,
    position: int,
    mode: Mode,
    all_projected: bool,
    layers: PreparedLayers | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Validate a new group and store in it what is decided once: primitives only.

    Args:
        group (`dict`): The group, complete. Changed in place.
        where (`str`): What messages call it.
        position (`int`): Number of parameters in the groups before it.
        mode ([`Mode`]): The optimizer's.
        all_projected (`bool`): Whether it asks for that, or leaves what is no matrix at full size.
        layers ([`PreparedLayers`], *optional*): The model's.

    Returns:
        P_0 by name where the user gave one, and the names of parameters whose rank is not low.
    """
    lr = options.lr_of_step(group["lr"], where)
    number = plain(lr)
    # a tensor of its own: what scales it in place would scale one that groups share once for each
    group["lr"] = lr.detach().clone() if mode.capturable and isinstance(lr, Tensor) else number
    group.update({name: plain(value) for name, value in group.items() if name in options.DEFAULTS})
    options.check_lr(number, where)
    options.refuse_baked_lr(group, where)
    if isinstance(group["subspace"], SubspaceRule):
        group["subspace"] = name_rule(group["subspace"])
    options.validate(group, where)
    names, prepared = names_of(group, position), {} if layers is None else layers.by_weight()
    by_gradient = [name for name, p in zip(names, group["params"], strict=True) if is_matrix(p) and p not in prepared]
    refuse_in_mode(group, mode, where, by_gradient)
    options.spell_out(group)
    if any(RULES[rule].eight_bit for rule in (group["weight_rule"], options.projection_rule(group)) if rule):
        require_bitsandbytes()
    for name, p in zip(names, group["params"], strict=True):
        refuse_flat(p, name)
    given: str | Sequence[Tensor] | Mapping[str, Tensor] = group["init"]
    if not isinstance(given, str):
        group["init"] = "given"
    if group["rank"] is None:
        return {}, []
    for name, p in zip(names, group["params"], strict=True):
        if all_projected and not is_matrix(p):
            raise ValueError(
                f"{name} has shape {tuple(p.shape)} and cannot be projected: only matrices can, and stacks of "
                "them such as experts' weights. Put it into a group without `rank`."
            )
    if group["source"] == "activations" and layers is None:
        raise ValueError(
            f"source='activations' of {where} needs a model with prepared layers: use create_osd_optimizer."
        )
    settle_sides(group, names, prepared)
    group["alpha"] = options.projection_alpha(group, number)
    clipped = [
        name
        for name, p in zip(names, group["params"], strict=True)
        if is_projected(p, group) and group["rank"] >= min(p.shape[-2:])
    ]
    return {} if isinstance(given, str) else given_projections(given, group, names, position), clipped


def with_plain_names(params: Iterable) -> Any:
    """Parameters, pairs or groups as they are given to an optimizer, without the wrappers of their model in names."""
    if isinstance(params, Tensor):  # which torch refuses
        return params
    groups: list[Any] = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    groups = [
        group if isinstance(group["params"], (Tensor, set)) else {**group, "params": list(group["params"])}
        for group in groups
    ]
    pairs = [group for group in groups if all(isinstance(entry, tuple) for entry in group["params"])]
    names = iter(plain_names([name for group in pairs for name, _ in group["params"]]))
    for group in pairs:
        group["params"] = [(next(names), p) for _, p in group["params"]]
    return groups


UNPREPARED = {  # options that only prepared layers have -> what other weights do
    "residual_sample": "go by their gradients, of which they have all",
    "weight_dtype": "stay as they are",
}


def refuse_unprepared(group: Mapping[str, Any], changed: set[str], where: str, layers: PreparedLayers | None) -> None:
    """Raise `ValueError` for what only prepared layers do, `changed_by` a group whose weights have none."""
    for name in sorted(UNPREPARED.keys() & changed):
        if layers is None or layers.by_weight().keys().isdisjoint(group["params"]):
            raise ValueError(
                f"`{name}` of {where} has no effect: layers are prepared when the optimizer is made, and the weights "
                f"of this group {UNPREPARED[name]}. Leave it out."
            )


def refuse_same_names(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` where two parameters have one name: a state is loaded by names."""
    seen: set[str] = set()
    for group in groups:
        for name in group.get("param_names") or ():
            if name in seen:
                raise ValueError(
                    f"Two parameters are called {name}, and states are loaded by names: make them differ, as "
                    "`named_parameters(prefix=...)` does, or give none."
                )
            seen.add(name)


def refuse_without_movement(groups: Sequence[Mapping[str, Any]], mode: Mode) -> None:
    """Raise `ValueError` where no P moves that a stream of its own is asked for."""
    projected = [group for group in groups if group["rank"] is not None and group["source"] == "gradients"]
    rules = [rule_class(group["subspace"]) for group in projected]
    if mode.projection_stream and not any(rule.moves() for rule in rules):
        raise ValueError(
            "`projection_stream` has no effect: no P moves beside the weights' steps, as with online_pca and power on "
            "gradients. Leave it out."
        )


def warn_clipped(clipped: Sequence[str]) -> None:
    """Say once, for all matrices, that their rank is not low."""
    if clipped:
        warnings.warn(
            f"`rank` is not below min(m, n) for {len(clipped)} matrices: they are projected at full rank, "
            f"which saves no memory. Choose a smaller rank or leave them out: {shortened(clipped, 3)}.",
            stacklevel=4,
        )


def warn_far(groups: Sequence[Mapping[str, Any]]) -> None:
    """Say once where P's learning rate is so large that most steps of P would be too long."""
    for group in groups:
        rule, rate = options.projection_rule(group), plain(group["lr"]) * group["alpha"]
        if rule is None or not group["params"]:
            continue
        # a column's step: the other rules have entries of about one size, SGD those of a gradient of norm 1
        matrices = [p for p in group["params"] if is_projected(p, group)]
        rows = 1 if rule == "sgd" or not matrices else max(min(p.shape[-2:]) for p in matrices)
        if rate * rows**0.5 > 1:
            root = "" if rule == "sgd" else f" sqrt({rows})"
            warnings.warn(
                f"lr alpha{root} = {rate * rows**0.5:.2g}: P turns far at each step, and longer steps are cut. "
                f"Lower the learning rate ({plain(group['lr']):.3g}), if it is that of the weights that is too high. "
                f"Use an alpha of {group['alpha'] / (rate * rows**0.5):.1g} or less otherwise.",
                stacklevel=4,
            )
            return


def by_name(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What is given by names of parameters, by the names that an optimizer has for them, of which these are some."""
    given = {plain_name(name): P for name, P in given.items()}
    if given.keys().isdisjoint(names):  # of a model in DDP
        given = {name.removeprefix(f"{DDP}."): P for name, P in given.items()}
    return given


def given_projections(
    given: Mapping[str, Tensor] | Sequence[Tensor], group: Mapping[str, Any], names: list[str], position: int
) -> dict[str, Tensor]:
    """P_0 by name from what the user passed as `init`; `ValueError` unless every one is there and fits."""
    places = [index for index, p in enumerate(group["params"]) if is_projected(p, group)]
    names = [names[index] for index in places]
    if isinstance(given, Mapping):
        given = by_name(given, names)
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"`init` has no P for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")
        _refuse_other_sides(given, group, dict(zip(names, (group["sides"][index] for index in places), strict=True)))
        # A ProjectionState's entries hold P and what it was learned with
        tensors = [getattr(given[name], "projection", given[name]) for name in names]
    else:
        tensors = list(given)
        if len(tensors) != len(names):
            raise ValueError(f"`init` has {len(tensors)} tensors for {len(names)} parameters.")
    for index, name, P in zip(places, names, tensors, strict=True):
        geometry = geometry_of(group, index, group["params"][index], position + index)
        assert isinstance(geometry, ProjectedGeometry)
        shape = (*geometry.shape[:-2], *geometry.projection_shape)
        if not isinstance(P, Tensor) or tuple(P.shape) != shape or not P.isfinite().all():
            got = f"shape {tuple(P.shape)}" if isinstance(P, Tensor) else type(P).__name__
            raise ValueError(
                f"`init` for {name} must be a finite tensor of shape {shape}, got {got}: here it is for rank "
                f"{geometry.rank} and side {geometry.side}, give the rank and side that it was learned with."
            )
    return dict(zip(names, tensors, strict=True))


def _refuse_other_sides(given: Mapping[str, Any], group: Mapping[str, Any], sides: Mapping[str, str]) -> None:
    """Raise `ValueError` for P of a ProjectionState that belongs to the other dimension: of a square, it would fit."""
    for name, side in sides.items():
        own = getattr(given[name], "side", side)
        if own != side:
            way_out = f"Give side={own!r}." if group["source"] == "gradients" else "Use source='gradients' for it."
            raise ValueError(
                f"The P given as `init` for {name} is of the {own} side, here it is projected on the {side}. {way_out}"
            )
