"""Clipping of gradients that are never all there at once, by a norm that is known when each is stepped with."""

import logging
from typing import Any

import torch
from torch import Tensor

from ..options.mode import Mode
from ..step.gradients import clip_coefficient
from .window import Arrived


logger = logging.getLogger("hf_osd")

CLIP_NORM2 = "clip_norm2"  # key of the groups: None in live ones, see `take_norm`


class Clipping:
    """Clipping as a mode asks for it.

    Attributes:
        before2 (`torch.Tensor`): Squared norm of the last step whose gradients were finite, 0-dim; `None` before.
    """

    def __init__(self, mode: Mode):
        self.mode = mode
        self.before2: Tensor | None = None
        if mode.clipping == "previous_norm" and mode.layerwise_clipping is None:
            logger.warning(
                "Layerwise, max_grad_norm=%s clips by the gradient norm of the step before. "
                "layerwise_clipping='parameter' clips each parameter by its own.",
                mode.max_grad_norm,
            )

    def clip_(self, arrived: Arrived) -> Arrived:
        """Scale a parameter's gradient in place; returned with the norm that it has now."""
        if self.mode.max_grad_norm is None:
            return arrived
        gradient, norm2 = arrived.gradient, arrived.norm2
        # of a stack without its broken experts, which are skipped: the others must not be
        own2 = norm2.where(norm2.isfinite(), 0.0).sum() if norm2.ndim else norm2
        by2 = own2
        if self.mode.clipping == "previous_norm" and self.before2 is not None:
            # Where there is none (at the first step, or all were broken): by its own, which is no less safe.
            before2 = self.before2.to(own2)
            by2 = torch.where(before2.isfinite() & (before2 > 0), before2, own2)
        scale = clip_coefficient(by2, self.mode.max_grad_norm)
        # of a projected gradient R and G alone: A goes with the gradient over its norm
        lows = [] if isinstance(gradient, Tensor) else [low for low in gradient if low is not None]
        for X in [gradient] if isinstance(gradient, Tensor) else [X for low in lows for X in (low.R, low.G)]:
            if X is not None:
                X.mul_(scale)
        return arrived._replace(norm2=norm2 * scale.square())

    def note(self, total2: Tensor) -> None:
        """Remember the norm of a step that has been made."""
        before = total2 if self.before2 is None else self.before2.to(total2)
        self.before2 = torch.where(total2.isfinite(), total2, before)

    def with_norm(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A state dict with the norm in its groups that the next step is clipped by."""
        if self.mode.clipping == "previous_norm":
            for group in saved["param_groups"]:
                group[CLIP_NORM2] = None if self.before2 is None else float(self.before2)
        return saved

    def set_norm(self, clip_norm2: float | None) -> None:
        """The norm that the next step is clipped by, as a state dict has it."""
        self.before2 = None if clip_norm2 is None else torch.tensor(clip_norm2, dtype=torch.float64, device="cpu")


def take_norm(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float | None]:
    """Saved groups without what `with_norm` put there, which belongs to no group, and that.

    The key stays, in every mode: a flattened state of `torch.distributed.checkpoint` is read by the live groups' keys.
    """
    norm2 = groups[0].get(CLIP_NORM2) if groups else None
    return [{**group, CLIP_NORM2: None} for group in groups], norm2
