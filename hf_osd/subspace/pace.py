"""When a rule renews P or moves it: at every k-th step. Bases of the rules that do, which declare k."""

from dataclasses import dataclass

from ..declare import integer, option
from .protocol import SubspaceRule


@dataclass(frozen=True)
class Renewed(SubspaceRule):
    """P is made anew at steps 0, k, 2k, ..., from the gradient of that step or without a look at it."""

    update_interval: int = option(
        200, "Steps between new P (GaLore's `update_proj_gap` and its default).", check=integer(1)
    )

    def refresh_due(self, count: int) -> bool:
        """At every `update_interval`-th step."""
        return count % self.update_interval == 0


@dataclass(frozen=True)
class Moved(SubspaceRule):
    """P moves after the steps 0, k, 2k, ...; A is not computed at the others. The papers' k is 1."""

    projection_interval: int = option(
        1,
        "Steps between moves of P: a step in between costs two products with the gradient, not three.",
        check=integer(1),
        card="steps between moves of P",
    )

    def moves_at(self, count: int) -> bool:
        """At every `projection_interval`-th step."""
        return count % self.projection_interval == 0
