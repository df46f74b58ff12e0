"""How steps are made: all at once or as gradients arrive, over micro-batches and processes. Options of the optimizer.

Unlike the options of `table.py` they are not for single groups, and they do not shape the state: a checkpoint of one
mode continues in another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...declare import (
    Need,
    Option,
    boolean,
    check_values,
    number,
    one_of,
    option,
    options_of,
    refuse_unknown,
    refuse_without_effect,
)
from ...subspace import build_subspace, rule_class
from ...text import shortened


CLIPPINGS = ("parameter", "previous_norm")
LAYERWISE_SUFFIX = "_layerwise"
ROUNDED = ("bfloat16", "int8")  # what P is rounded at random to

_LAYERWISE = Need(
    lambda mode: mode["layerwise"], "without `layerwise`", ", or choose a name that ends in `_layerwise`"
)


@dataclass(frozen=True)
class Mode:
    """The mode of an optimizer, valid once constructed. `OSD` documents the options.

    Raises:
        ValueError: For a value that is wrong or would have no effect.
    """

    layerwise: bool = option(
        False,
        "Step each parameter as soon as the backward pass has completed its gradient, and free that.\n\n"
        "`step` then only ends the step; a `GradScaler` is refused, whose scale nothing could undo.",
        check=boolean(),
        argument="optim='osd_*_layerwise'",
    )
    layerwise_clipping: str | None = option(
        None,
        "How `max_grad_norm` clips when layerwise: by `previous_norm`, the norm of the step before (at the first step "
        "each parameter by its own), or by `parameter`, each by its own.",
        check=one_of(CLIPPINGS),
        needs=(
            _LAYERWISE,
            Need(lambda mode: mode["max_grad_norm"] is not None, "without a `max_grad_norm` above 0"),
        ),
        unset="previous_norm",
    )
    max_grad_norm: float | None = option(
        None,
        "Norm that gradients are clipped to, with `layerwise`.",
        check=number(0, open_below=True),
        needs=(
            Need(
                lambda mode: mode["layerwise"],
                "without `layerwise`",
                ", and clip with `torch.nn.utils.clip_grad_norm_`",
            ),
        ),
        argument="max_grad_norm",
    )
    gradient_accumulation: bool = option(
        False,
        "With `layerwise`: several backward passes come before a `step`, which then steps.\n\n"
        "What is projected adds up R, and P learns from each micro-batch; P_0 and SVDs are made from the first. What "
        "is not adds up its gradient. Norms are estimated ([`~optim.arrival.window.norm_stand_in`]).",
        check=boolean(),
        needs=(_LAYERWISE,),
        argument="gradient_accumulation_steps",
    )
    capturable: bool = option(
        False,
        "A step can be captured in a CUDA graph: the device decides all that the host does otherwise.\n\n"
        "As torch's AdamW: make a few steps, then capture. A learning rate that is to change must be a float32 tensor "
        "on the parameters' device; each group has a copy, which schedules fill (by hand: `fill_` each group's `lr`). "
        "Uncaptured steps are slower for it: part of the gradient is copied (`projection_sample`). For `online_pca` "
        "and `static`.",
        check=boolean(),
        needs=(Need(lambda mode: not mode["layerwise"], "with `layerwise`, whose hooks make the steps"),),
    )
    projection_stream: bool = option(
        False,
        "Move P on a CUDA stream of its own, beside the steps of the weights that follow (the paper's \"executed in "
        'parallel with weight updates").\n\n'
        "The step ends when both have ended. It may help where the GPU has more to do than the host, as in CUDA "
        "graphs; not measured yet.",
        check=boolean(),
        needs=(Need(lambda mode: not mode["layerwise"], "with `layerwise`, where each step ends with P's movement"),),
    )
    partial_load: bool = option(
        False,
        "Start parameters anew that a loaded checkpoint does not fit, instead of refusing it.",
        check=boolean(),
    )
    divide_projection: bool | None = option(
        None,
        "Whether the processes among which FSDP2 or tensor parallelism divides a weight divide its P and the moments "
        "of that, too, by rows.\n\nThen P is gathered where it is used and its gradient reduce-scattered, as FSDP2 "
        "does with weights, in buckets of many. Rules that need all of P to move it, or make it anew, keep it whole "
        "on every process: by default P is divided with `online_pca`, without `carry_moments`. With "
        "source='activations' the forward pass gathers it, too. A checkpoint goes on either way.",
        check=boolean(),
        needs=(Need(lambda mode: not mode["layerwise"], "with `layerwise`, which is for one process"),),
        unset="where that is possible",
    )

    def __post_init__(self):
        """Check the values, alone and together."""
        check_values(MODE_OPTIONS, asdict(self), "OSD")
        refuse_without_effect(MODE_OPTIONS, asdict(self), "OSD")

    @property
    def clipping(self) -> str | None:
        """How gradients are clipped: by parameter, by the previous step's norm, or not."""
        return None if self.max_grad_norm is None else self.layerwise_clipping or "previous_norm"


MODE_OPTIONS: dict[str, Option] = options_of(Mode)
MODE_DEFAULTS: dict[str, Any] = {name: own.default for name, own in MODE_OPTIONS.items()}


def refuse_in_mode(group: Mapping[str, Any], mode: Mode, where: str, by_gradient: Sequence[str]) -> None:
    """Raise `ValueError` for options of a parameter group that would not be exact in this mode.

    Args:
        group (`dict`): The group, its values checked.
        mode ([`Mode`]): The optimizer's.
        where (`str`): What the message calls the group.
        by_gradient (`Sequence[str]`): Names of its weights without prepared layers. With them nothing is missing where
            micro-batches add up: R, and what a residual needs beside it, are an ordinary `.grad`.
    """
    if mode.capturable and (reason := _uncapturable(group)):
        raise ValueError(f"`capturable` is not for {where}: {reason}. Leave one of them out.")
    if group["rank"] is None:
        return
    if mode.divide_projection and (reason := why_whole(group)):
        raise ValueError(f"`divide_projection` is not for {where}: {reason}. Leave one of them out.")
    if not mode.layerwise:
        return
    sums = mode.gradient_accumulation and bool(by_gradient)
    name = "layerwise` with `gradient_accumulation"
    reason = None
    if sums and group["residual"] != "none":
        prepared = group["source"] != "gradients"
        whose = f" of {shortened(by_gradient, 3)}, without prepared layers" if prepared else ""
        layers = "" if prepared or group["residual"] != "sign" else "take source=activations, whose layers make it, "
        raise ValueError(
            f"`{name}` is not for {where}: residual={group['residual']!r} needs the whole gradient{whose}, of "
            f"which this keeps what is in the subspace. Give residual=none, also beside a preset, {layers}or "
            "accumulate without `layerwise` (a name without _layerwise)."
        )
    if sums and group["side"] == "two_sided":
        reason = "side='two_sided' needs the norm of the whole gradient, which is only estimated"
    elif build_subspace(group["subspace"], group).mixes and (sums or mode.clipping):
        reason = f"subspace={group['subspace']!r} mixes the momentum into gradients that are clipped or added up later"
        name = name if sums else "layerwise` with `max_grad_norm"
    if reason:
        raise ValueError(f"`{name}` is not for {where}: {reason}. Leave one of them out.")


def why_whole(group: Mapping[str, Any]) -> str | None:
    """What needs all of P on every process, in a group with a `rank`; `None` where its rows can be divided.

    A rule that asks for nothing but the gradient of Eq. 6, which is linear in A, gets its rows of the sum.
    """
    rule = rule_class(group["subspace"])
    if group["side"] == "two_sided":
        return "side='two_sided' is for one process"
    if not (rule.learns and rule.stackable):
        return f"subspace={group['subspace']!r} makes P of all its rows at once"
    return "`carry_moments` turns moments by all rows of P" if group["carry_moments"] else None


def _uncapturable(group: Mapping[str, Any]) -> str | None:
    """Why a CUDA graph cannot hold the steps of a parameter group."""
    if group["stochastic_rounding"]:
        return "stochastic_rounding seeds its noise on the host, at each step"
    if group["rank"] is None:
        return None
    if group["source"] == "activations":
        return "source='activations' keeps account of passes on the host"
    rule = build_subspace(group["subspace"], group)
    if not rule.capturable or rule.mixes:
        return f"subspace={group['subspace']!r} asks the host, or decomposes matrices"
    if rule.stride > 1:
        return f"the host counts the steps of projection_interval={rule.stride}"
    if group["projection_dtype"] in ROUNDED and rule.moves():
        return f"projection_dtype={group['projection_dtype']!r} rounds P by noise that the host seeds, at each step"
    return "carry_moments decomposes matrices" if group["carry_moments"] else None


def mode_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All mode options for an `optim` name, which says whether they are layerwise."""
    refuse_unknown(given, MODE_DEFAULTS.keys() - {"layerwise"}, "the mode")
    return asdict(Mode(layerwise=name.endswith(LAYERWISE_SUFFIX), **given))
