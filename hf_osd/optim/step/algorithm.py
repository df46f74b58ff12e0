"""One step of one weight: Algorithm 1 of the paper.

Letters and shapes as in `subspace.operators`, written for the left side. W (m, n) is the weight, G its gradient, P
(m, r) its projection. The first half of a step reads G and leaves what is small enough to be kept, added up or sent:

    R   = PᵀG                                                            R = down(G, P)
    A   = G Rᵀ                                                           all that P learns of G: some columns in turn

the second half moves the weight, and then P, which was used before it moves:

    D   = weight_rule(R)                                                 its moments are shaped like R
    W  <- (1 - lr weight_decay) W - lr scale (P D + S)                   S: the residual's part, if one is asked for
    P  <- (1 - alpha lr weight_decay_P) P - alpha lr projection_rule(gP)

where gP is the gradient of Eq. 6 at P, made of P and A (`subspace.pca`). Another rule than online PCA puts something
else in the place of the last line, or nothing.
"""

from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...subspace import SubspaceRule
from ...subspace.precision import full_precision, reduced_precision
from ...update_rules import GradientCheck
from ..options.general import projection_sample_of
from ..options.rules import Rules
from .geometry import ProjectedGeometry
from .low_rank import LowRank, Update
from .moments import Moments, launches
from .movement import STACK_LIMIT, Movements, Moving, Stepping
from .observation import observation
from .projection import LiveProjection, Make, usable
from .residual import RESIDUALS, Residual, pieces
from .rounding import add_rounded_
from .weight import Weight


Turn = Enum("Turn", "ONLY FIRST LATER")  # of a gradient among those of one step: P may be replaced before it is used
ONLY, FIRST, LATER = Turn
OVERDUE = "projection_overdue"  # in the state of a weight whose P could not be made anew when it was due


class GradientSource:
    """Where a step's R and A come from: here the gradient G. A source that has no G leaves `LowRank.G` at `None`.

    Args:
        P ([`LiveProjection`]): The projection.
        moments ([`Moments`]): Of the weight.
        keeps_G (`bool`): Whether the rest of the step needs G.
        every (`int`): k: A is made of one block in k of the long dimension of G, another one at each movement of P.
    """

    def __init__(self, P: LiveProjection, moments: Moments, keeps_G: bool, every: int):
        self.P, self.moments, self.keeps_G, self.every = P, moments, keeps_G, every
        self.rho, self.stride = P.rule.mixes, P.rule.stride
        self.op, self.dtype, self.sharding = P.geometry.op, P.geometry.compute_dtype, P.geometry.sharding

    def low_rank(self, G: Tensor, count: int | Tensor | None) -> LowRank:
        """R = down(G, P), and A after so many steps, or `None` where P does not move."""
        kept, A = self.P.kept(), None
        P = kept.to(G.dtype)
        with full_precision(G):
            R = self.op.down(G, P)
        if count is not None:
            with reduced_precision(G):
                # A = k correlate(G_b, R_b): in the mean over k movements correlate(G, R)
                if isinstance(count, Tensor):
                    G_b, R_b, k = self._gathered(G, R, count)
                    A = self.op.correlate(G_b, R_b, P, k)
                else:
                    b, k = self._block(G, count)
                    A = k * self._mixed(G[b], R, b) if self.rho else self.op.correlate(G[b], R[b], P, k)
            if self.sharding is not None and self.P.rows is None:
                A = self.sharding.sum(A.to(self.dtype))
        if self.keeps_G:
            return LowRank(R.to(self.dtype), A, G)
        light = A is not None and A.dtype == P.dtype and P.dtype.itemsize <= kept.dtype.itemsize
        # on a GPU a launch costs more than to hold a small P beside the wide A
        return LowRank(R, A, P=P if light and not P.is_cpu and 2 * P.numel() <= STACK_LIMIT else None)

    def _block(self, G: Tensor, count: int) -> tuple[Any, int]:
        """Which part of G, and of R, A is made of now, as an index, and how many of them there are."""
        dim = self.op.long_dim
        if self.every == 1 or dim is None:
            return ..., 1
        length = G.shape[dim]
        k = max(1, min(self.every, length))
        turn = count // self.stride % k
        rows = slice(length * turn // k, length * (turn + 1) // k)
        return (rows if dim == 0 else (slice(None), rows)), k

    def _gathered(self, G: Tensor, R: Tensor, count: Tensor) -> tuple[Tensor, Tensor, int]:
        """That part of G and of R, as copies, and their number, where the device alone knows whose turn it is."""
        dim = self.op.long_dim
        if self.every == 1 or dim is None:
            return G, R, 1
        k = max(1, min(self.every, G.shape[dim]))
        rows, inside = blocks(G.shape[dim], k, G.device)
        turn = count.remainder(k).long()
        b = rows.index_select(0, turn).view(-1)
        R_b = R.index_select(dim, b)
        if inside is not None:
            R_b.mul_(inside.index_select(0, turn).view((-1, 1) if dim == 0 else (1, -1)))
        return G.index_select(dim, b), R_b, k

    def _mixed(self, G_b: Tensor, R: Tensor, b: Any) -> Tensor:
        """A = correlate(rho M + (1 - rho) G, Z), with M = up(m) and Z = rho m + (1 - rho) R: momentum mixed in."""
        rho, op, m, P = self.rho, self.op, self.moments.load()[0]["exp_avg"].to(R.dtype), self.P.read().to(R.dtype)
        Z = torch.lerp(R, m, rho)
        return op.correlate(G_b, Z[b], P).mul_(1 - rho).add_(op.correlate_up(m[b], Z[b], P), alpha=rho)


@lru_cache(maxsize=64)
def blocks(length: int, k: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Indices of the k blocks of a dimension, (k, L), and which are of the block, where some have one too many."""
    starts = torch.arange(k + 1, device=device) * length // k
    rows = starts[:-1, None] + torch.arange(-(-length // k), device=device)
    return rows, None if length % k == 0 else rows < starts[1:, None]


class ProjectedWeight(Weight):
    """A matrix W (m, n) whose moments live in a subspace.

    Attributes:
        P ([`LiveProjection`]): Its projection.
        overdue (`bool`): Whether the gradient that P was to be made anew from was of no use.
    """

    geometry: ProjectedGeometry

    overdue = False

    def __init__(self, p: Tensor, geometry: ProjectedGeometry, group: Mapping[str, Any]):
        super().__init__(p, geometry, group)
        self.op = geometry.op
        self.P = LiveProjection(geometry, group, self.slot)

    def project(self, G: Tensor, check: GradientCheck, turn: Turn = ONLY) -> LowRank | None:
        """The half of a step that reads G; starts P first, or renews it where that is due.

        Returns:
            `LowRank`: Without A where P does not move at this step, or was just made from this gradient and is
                stationary there; `None` before the first gradient of any use, as long as there is no P.
        """
        if G.shape != self.geometry.shape:
            self.refuse_other_shape(G)
        fresh = renewed = False
        if not self.P.started:
            fresh = self._start(G, check)
            if not self.P.started:
                return None
        elif self._renewed and turn is not LATER:
            if self.renews(check) and self.steps > 0:  # a P that was given is used at first
                renewed = self._renew(G, check)
        moves = not fresh and self.moves(check, turn)
        count = (self._counted() if self.capturable else self.count) if moves else None
        low = self.source.low_rank(G, count)
        if (fresh or renewed) and self.geometry.two_sided:
            # of singular vectors of G itself R is diagonal but for rounding, whose sign means nothing
            low.R.masked_fill_(low.R.abs() <= 4 * torch.finfo(G.dtype).eps * low.R.norm(), 0.0)
        return low

    def update(self, low: LowRank | None, check: GradientCheck, movements: Movements) -> None:
        """The half that moves W, and P, whose movement may wait for that of others."""
        if low is None:
            return
        self.count += 1
        if self.rules.restarts:
            movements.counters.append((self.slot.state["step"], check.keep))
        form = self.moments.form if self.moments.stackable and low.R.numel() and launches(low.R) else None
        if form is not None:
            movements.step(Stepping(self, low, check, form))
        else:
            self.slot.state[self.moments.counter].add_(check.keep)
            R = low.R.to(self.geometry.compute_dtype)
            movements.add(self.move(self.moments.direction(R, check), low, check))

    def move(self, D: Tensor, low: LowRank, check: GradientCheck) -> Moving | None:
        """W <- (1 - lr weight_decay) W - lr scale (up(D, P) + S), with D = weight_rule(R); then P may move."""
        dtype, kept = self.factor_dtype, self.P.kept()
        update = Update(D, low.P if low.P is not None and low.P.dtype == dtype else kept.to(dtype))
        if self.residual is not None:
            update = self.residual.extend(update, low, check)
        scale = self.group["scale"]
        rate = -self.group["lr"] * (self.geometry.full_scale if scale == "auto" else scale)
        self._add_(update, rate, check)
        if low.A is None:
            return None
        self.P.count = self.count
        return Moving(self.P, kept, low.A, check)

    @property
    def factor_dtype(self) -> torch.dtype:
        """What D and P are wanted in to move W: its own precision, where nothing but their product is added to it."""
        group, dtype = self.group, self.geometry.compute_dtype
        product = self.residual is None and not group["stochastic_rounding"] and not isinstance(group["lr"], Tensor)
        return self.p.dtype if product else dtype

    def _add_(self, update: Update, rate: Any, check: GradientCheck) -> None:
        """W <- (1 - lr weight_decay) W + rate (up(D, P) + S)."""
        W, (D, P, add_rest) = self.p, update
        alpha = rate
        if isinstance(rate, Tensor):  # products take numbers only, which would have to be read
            D, alpha = D.mul_(rate), 1.0
        if self.group["stochastic_rounding"] and W.dtype == torch.bfloat16:

            def add_(X: Tensor, rows: slice) -> None:
                self.op.add_up_(X, *self.op.factors(D, P, rows), alpha=alpha)
                if add_rest is not None:
                    add_rest(X, rows, rate)

            add_rounded_(W, add_, self._rounding(check))
        else:
            if self.group["weight_decay"]:
                decay = self.group["lr"] * self.group["weight_decay"]
                if isinstance(decay, Tensor):
                    W.mul_(1 - decay * check.keep)
                else:  # one launch
                    W.addcmul_(W, check.keep, value=-decay)
            with full_precision(W):
                self.op.add_up_(W, D.to(W.dtype), P.to(W.dtype), alpha=alpha)
            if add_rest is not None:
                for rows in pieces(W):
                    add_rest(W[rows], rows, rate)

    def _counted(self) -> Tensor:
        """`count`, as the device knows it."""
        state = self.slot.state
        return state["step"] + state["skipped_steps"]

    def renews(self, check: GradientCheck) -> bool:
        """Whether P is to be made anew from the coming gradient."""
        return self.overdue or self.rules.subspace.refresh_due(self.count)

    def moves(self, check: GradientCheck, turn: Turn) -> bool:
        """Whether P moves after the coming step."""
        return self.rules.subspace.moves_at(self.count)

    def recount(self, check: GradientCheck) -> None:
        """Bring `count` up to date before P starts. Reads the device: this happens once."""
        self.count = int(self.slot.state["skipped_steps"])

    def _start(self, G: Tensor, check: GradientCheck) -> bool:
        """Set P_0, unless the gradient is zero or not finite. Reads the device: this happens once.

        Returns:
            `bool`: Whether P_0 was made from this gradient, which then has nothing to teach it.
        """
        if not usable(check):
            size = None if check.skip else self._size(G)
            if not size:
                return False
            G = G / size  # its square is nothing in float32
        self.recount(check)
        if self.P.found():
            return False
        init = self.group["init"]
        # a P that was given is in the state from its beginning, unless it is zero: of an expert that had no tokens yet
        init = self.P.make(G, Make("auto" if init == "given" else init, self.steps, first=True))
        self.P.started = True
        return init != "orthonormal"

    def _size(self, G: Tensor) -> Tensor:
        """Sum of G's absolute values, of all processes' parts."""
        size = torch.linalg.vector_norm(G, 1)
        return size if self.geometry.sharding is None else self.geometry.sharding.sum(size)

    def _renew(self, G: Tensor, check: GradientCheck) -> bool:
        """Make P anew, unless G is zero or broken; whether from G's values. Reads the device, as SVDs do anyway."""
        if not usable(check):  # an expert without tokens does not count this step
            self._note_overdue(self.overdue or bool(check.broken) or not bool(check.skip))
            return False
        self._note_overdue(False)
        init = self.group["init"] if self.group["init"] in ("svd", "randomized_svd") else "auto"
        self.P.renew(G, Make(init, self.steps, first=False), check)
        return self.rules.subspace.reads_gradient

    def _note_overdue(self, overdue: bool) -> None:
        """Also in the state while it is so, for whoever resumes from there."""
        self.overdue = overdue
        if overdue:
            self.slot.state[OVERDUE] = torch.ones(())
        else:
            self.slot.state.pop(OVERDUE, None)

    def follow(self, rules: Rules) -> None:  # noqa: D102 - see Weight
        kind = RESIDUALS.get(rules.residual)
        self.residual: Residual | None = None if kind is None else kind(self.geometry, self.group, self.slot)
        super().follow(rules)
        self.P.follow(rules)
        self._renewed = type(rules.subspace).refresh_due is not SubspaceRule.refresh_due
        self.P.carried[self.geometry.name] = self.moments
        self.source = GradientSource(self.P, self.moments, kind is not None, projection_sample_of(self.group))

    def begin(self) -> None:  # noqa: D102
        super().begin()
        self.P.started = self.overdue = False
        self.P.forget()

    def resume(self) -> None:  # noqa: D102
        super().resume()
        self.overdue = OVERDUE in self.slot.state
        # P may have been made in a step that was skipped in the end, and zero is no P, but may be a code of one
        made = bool(self.slot.state["step"] > 0)
        if self.P.rows is not None:  # of which this process may have none that is not 0
            self.P.started = made
        else:
            code = self.rules.subspace.code is not None and made
            self.P.started = code or bool(self.slot.state[self.P.key].any())
        self.P.forget()

    @property
    def started(self) -> bool:
        """Whether there is a P."""
        return self.P.started

    @property
    def settled(self) -> bool:  # noqa: D102 - see Weight
        return self.started and super().settled

    @property
    def projection(self) -> Tensor:
        """P as the state keeps it, whole, or as it is made of what the state keeps instead."""
        return self.P.read() if self.rules.subspace.code is not None else self.P.kept()

    @property
    def steps(self) -> int:
        """Steps that rules count by, as far as the host knows."""
        return self.count

    def observe(self, low: LowRank | None, check: GradientCheck) -> tuple[Tensor, Tensor] | None:
        """Share of the gradient outside the subspace and error of P's orthogonality; `None` without a P."""
        if low is None:
            return None
        K, sharding = self.op.gram(low.R.to(self.geometry.compute_dtype)), self.geometry.sharding
        return observation(self.P, K if sharding is None else sharding.sum(K), check)
