"""What a subspace rule must offer: how P_t becomes P_{t+1}."""

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor


class SubspaceRule(Protocol):
    """One rule for the projection (paper, section 3: any smooth rule converges, so this is an open family).

    A rule is a frozen dataclass of its settings. It may replace P before a step uses it (`refresh_due`; the optimizer
    then computes a new P from the gradient as it did the first one), or move it after (`advance_`), or both, or
    neither.

    Attributes:
        learns (`bool`):
            Whether `advance_` calls `descend`, that is, whether P has an update rule of its own and needs its state.
            Only then is A computed.
    """

    learns: ClassVar[bool]

    def refresh_due(self, count: int) -> bool:
        """Whether P is computed anew from the gradient of step `count` (counted from 0 on the host)."""

    def advance_(
        self,
        P: Tensor,  # (s, r) projection, may be modified in place
        A: Tensor,  # (s, r) correlate(G, R), all that a rule is told of G
        inv_norm2: Tensor,  # () 1 / max(||G||², eps)
        descend: Callable[[Tensor], None],  # takes the gradient (s, r) of a loss at P and makes one step on P
    ) -> None:
        """Move P after the step has used it. Called where `learns` only."""
