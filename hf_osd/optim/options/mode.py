"""How steps are made: all at once or as gradients arrive, over micro-batches and processes. Options of the optimizer.

Unlike the options of `options.py` they are not for single groups, and they do not shape the state: a checkpoint of one
mode continues in another.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...subspace import build_subspace
from .table import CHECKS, refuse_unknown


CLIPPINGS = ("parameter", "previous_norm")
COMPRESSIONS = ("subspace",)
LAYERWISE_SUFFIX = "_layerwise"


@dataclass(frozen=True)
class Mode:
    """The mode of an optimizer, valid once constructed. `OSD` documents the options.

    Raises:
        ValueError: For a value that is wrong or would have no effect.
    """

    layerwise: bool = False
    layerwise_clipping: str | None = None
    max_grad_norm: float | None = None
    gradient_accumulation: bool = False
    ddp_compression: str | None = None

    def __post_init__(self):
        """Check the values, alone and together."""
        for name in ("layerwise", "gradient_accumulation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        for name, allowed in (("layerwise_clipping", CLIPPINGS), ("ddp_compression", COMPRESSIONS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
        complaint = None if self.max_grad_norm is None else CHECKS["scale"](self.max_grad_norm)
        if complaint:
            raise ValueError(f"`max_grad_norm` must be {complaint}, got {self.max_grad_norm!r}.")
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        if self.max_grad_norm is not None and not self.takes_gradients:
            raise ValueError(
                "`max_grad_norm` has no effect without `layerwise` or `ddp_compression`: the gradients are all there "
                "before the step, so clip them with `torch.nn.utils.clip_grad_norm_`."
            )
        for name in ("layerwise_clipping", "gradient_accumulation"):
            if getattr(self, name) and not self.layerwise:
                raise ValueError(f"`{name}` has no effect without `layerwise`. Leave it out.")
        if self.layerwise_clipping is not None and self.max_grad_norm is None:
            raise ValueError("`layerwise_clipping` has no effect without a `max_grad_norm` above 0.")

    @property
    def takes_gradients(self) -> bool:
        """Whether gradients are taken off the parameters as they arrive."""
        return self.layerwise or self.ddp_compression is not None

    @property
    def clipping(self) -> str | None:
        """How gradients are clipped: by parameter, by the previous step's norm, by this step's (`"norm"`), or not."""
        if self.max_grad_norm is None:
            return None
        return (self.layerwise_clipping or "previous_norm") if self.layerwise else "norm"


def refuse_in_mode(group: Mapping[str, Any], mode: Mode, where: str) -> None:
    """Raise `ValueError` for options of a parameter group that would not be exact in this mode."""
    if group["rank"] is None or not mode.takes_gradients:
        return
    sums = mode.gradient_accumulation or mode.ddp_compression is not None
    name = "ddp_compression" if mode.ddp_compression is not None else "layerwise` with `gradient_accumulation"
    reason = None
    if sums and group["residual"] != "none":
        reason = (
            f"residual={group['residual']!r} needs the whole gradient, of which this keeps what is in the subspace"
        )
    elif sums and group["side"] == "two_sided":
        reason = "side='two_sided' needs the norm of the whole gradient, which is only estimated"
    elif build_subspace(group["subspace"], group).mixes and (sums or mode.clipping):
        reason = f"subspace={group['subspace']!r} mixes the momentum into gradients that are clipped or added up later"
        name = name if sums else "layerwise` with `max_grad_norm"
    if reason:
        raise ValueError(f"`{name}` is not for {where}: {reason}. Leave one of them out.")


MODE_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Mode)}


def mode_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All mode options for an `optim` name; `ValueError` where the name and an option disagree."""
    refuse_unknown(given, MODE_DEFAULTS, "the mode")
    if name.endswith(LAYERWISE_SUFFIX):
        if given.get("layerwise") is False:
            raise ValueError(
                f"{name!r} is layerwise, but `layerwise` is False: leave it out, or use "
                f"{name.removesuffix(LAYERWISE_SUFFIX)!r}."
            )
        given = {**given, "layerwise": True}
    return asdict(Mode(**given))


def refuse_without_projection(mode: Mode) -> None:
    """Raise `ValueError` for what only projected parameters use, where there are none."""
    if mode.ddp_compression is not None:
        raise ValueError(
            "`ddp_compression` has no effect: no parameter group has a `rank`, so nothing is projected. Leave it out."
        )
