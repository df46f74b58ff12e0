"""What a subspace rule is: how P_t becomes P_{t+1} (paper, section 3: any smooth rule converges).

Letters and shapes as in `operators`; s is the number of rows of P.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..declare import integer, option
from .initialization import initial_projection
from .operators import LinearOperator


class Start(NamedTuple):
    """How a P is asked for, at the first step and where it is renewed.

    Attributes:
        side (`str`): `"left"` or `"right"`. A two-sided weight asks for each of its two factors.
        rank (`int`): r.
        init (`str`): `"svd"`, `"randomized_svd"` or `"orthonormal"`: the user's choice, settled for this shape.
        seed (`int`): The parameter's, the same on all processes.
        steps (`int`): The weight's steps so far; with `seed`, what random numbers may depend on.
        dtype (`torch.dtype`): Precision of the computation.
    """

    side: str
    rank: int
    init: str
    seed: int
    steps: int
    dtype: torch.dtype


class Movement(NamedTuple):
    """What a rule is told of the step after which it moves P.

    Attributes:
        A (`torch.Tensor`): op.correlate(G, Z, P), shaped like P, where Z is R unless the rule `mixes` in momentum.
        inv_norm2 (`torch.Tensor`): 1 / max(||G||², eps), 0-dim.
        usable (`Callable`): Gives bool, 0-dim: G was neither zero nor broken. A is nothing to go by otherwise.
        op ([`LinearOperator`]): The operator of the weight's side.
        descend (`Callable`): Takes the gradient of a loss at P, shaped like P, and makes one step of P's optimizer.
    """

    A: Tensor
    inv_norm2: Tensor
    usable: Callable[[], Tensor]
    op: LinearOperator
    descend: Callable[[Tensor], None]


class SubspaceRule:
    """One rule for the projection. A rule is a frozen dataclass of its settings that overrides what it needs.

    It may replace P before a step uses it (`refresh_due` and `make`), or move it after (`moves_at` and `advance_`), or
    both, or neither. An instance can be passed as `subspace`. Checkpoints know it by its `repr`, so a run that resumes
    must pass one with the same settings. `examples/own_subspace_rule.py` is a worked example.

    Attributes:
        learns (`bool`):
            Whether `advance_` calls `descend`, that is, whether P has an update rule of its own and needs its state.
        reads_gradient (`bool`): Whether `make` looks at the gradient's values.
        uses_init (`bool`): Whether `make` does as `init` says.
        two_sided (`bool`): Whether it can be used with `side="two_sided"`.
        stackable (`bool`):
            Whether `advance_` also takes several P of one shape at once, as a stack (k, s, r), with A likewise and
            `inv_norm2` (k, 1, 1). It may ask `op.pca_gradient` then, call `descend` with a stack, and nothing else.
            Where processes divide P, each is told the A of its part of the gradient, and what they give `descend` is
            added up: it must be linear in A.
            A class that overrides `advance_` says so anew.
        capturable (`bool`):
            Whether a CUDA graph can hold what the rule does in a step (`capturable` of [`OSD`]): it moves P at all
            steps or at none, never makes it anew, asks the host nothing, and decomposes no matrix, for cuSOLVER is not
            for graphs. A class that overrides `advance_`, `moves_at` or `refresh_due` says so anew.
        code (`str`, *optional*):
            Name of the state entry that is kept instead of P, where `make` returns that and `expand` makes P of it.
        keeps_expanded (`bool`): Whether P is then kept beside the state while the code stays the same.

    Example:
    ```python
    >>> from dataclasses import dataclass
    >>> import torch
    >>> from hf_osd import OSD, SubspaceRule

    >>> @dataclass(frozen=True)
    ... class Oja(SubspaceRule):
    ...     rate: float = 0.5
    ...
    ...     def moves_at(self, count):
    ...         return True
    ...
    ...     def advance_(self, P, move):  # P <- orth(P + rate G Gᵀ P / ||G||²), without a look at the host
    ...         Q = torch.linalg.qr(P + self.rate * move.inv_norm2 * move.A).Q
    ...         P.copy_(torch.where(move.usable(), Q, P))

    >>> linear = torch.nn.Linear(64, 32)
    >>> optimizer = OSD([{"params": [linear.weight], "rank": 8}], lr=1e-3, subspace=Oja(rate=0.3))

    ```
    """

    learns: ClassVar[bool] = False
    reads_gradient: ClassVar[bool] = True
    uses_init: ClassVar[bool] = True
    two_sided: ClassVar[bool] = True
    stackable: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    code: ClassVar[str | None] = None
    keeps_expanded: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "advance_" in vars(cls) and "stackable" not in vars(cls):
            cls.stackable = False  # what is inherited was said of another `advance_`
        if vars(cls).keys() & {"advance_", "moves_at", "refresh_due"} and "capturable" not in vars(cls):
            cls.capturable = False

    @property
    def mixes(self) -> float:
        """Share of the momentum in what A is made of; above 0 `advance_` sees the gradient through it."""
        return 0.0

    @property
    def stride(self) -> int:
        """Steps from one movement of P to the next: by it the parts of the gradient that A is made of take turns."""
        return 1

    def refresh_due(self, count: int) -> bool:
        """Whether P is made anew from the gradient of step `count` (counted from 0 on the host)."""
        return False

    def make(
        self,
        G: Tensor,  # (m, n) gradient, finite and not zero, not modified
        start: Start,
        old: Tensor | None,  # what `make` returned before, None at the first step
    ) -> Tensor:
        """A new P, (s, r); where the rule has a `code`, that."""
        return initial_projection(G, start.side, start.rank, start.init, start.seed, start.dtype)

    def code_spec(self, rank: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the code of one P."""
        raise NotImplementedError

    def expand(self, code: Tensor, rows: int, rank: int, dtype: torch.dtype) -> Tensor:
        """P, (rows, rank), from its code, on the code's device."""
        raise NotImplementedError

    def length(self, rows: int, rank: int) -> float:
        """What the columns of P (rows, rank) are meant to be long; statistics are those of a P of length 1."""
        return 1.0

    @classmethod
    def moves(cls) -> bool:
        """Whether P moves after any step."""
        return cls.moves_at is not SubspaceRule.moves_at

    def moves_at(self, count: int) -> bool:
        """Whether `advance_` is called after step `count`. A is only computed then."""
        return False

    def advance_(
        self,
        P: Tensor,  # (s, r) projection, modified in place
        move: Movement,
    ) -> None:
        """Move P after a step has used it."""
        raise NotImplementedError


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
        "Steps between moves of P: a step in between costs no product for P.",
        check=integer(1),
        card="steps between moves of P",
    )

    def moves_at(self, count: int) -> bool:
        """At every `projection_interval`-th step."""
        return count % self.projection_interval == 0

    @property
    def stride(self) -> int:
        """The interval."""
        return self.projection_interval
