"""P and its moments divided among processes by rows: trained as FSDP2 trains a weight.

P is gathered while its weight is stepped, the next ones on their way meanwhile. A is of each process's part of G, and
the gradient of Eq. 6 is linear in it:

    gP = 2 s (A (C - 2 I) + P PᵀA) + 4 lambda P (C - I)         A = sum_i A_i,   C = PᵀP

so that process i makes gP_i of A_i, with lambda / processes, and the sum of these is what is exchanged: each process
gets the rows that it has of P, and steps them. Letters and shapes as in `subspace.operators`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...subspace import LinearOperator, Movement
from .algorithm import ProjectedWeight
from .buckets import BUCKET_LIMIT, Gather, Reduce, total
from .movement import STACK_LIMIT, Movements, Moving, Step, Stepping, descend, shorten_
from .projection import LiveProjection, usable
from .rows import Rows
from .streams import SideStreams


def with_projections(work: Sequence[tuple[Any, Any, Tensor, Any]]) -> Iterator[tuple[Any, Any, Tensor, Any]]:
    """The weights of a step in their order, each with the whole of a divided P while it is stepped."""
    waiting = deque(_buckets(work))
    ahead = Gather(*waiting.popleft()) if waiting else None
    here: Gather | None = None
    for item in work:
        projection = _divided(item[1])
        if projection is None:
            yield item
            continue
        if projection.started:
            if here is None or projection not in here:
                here, ahead = ahead, Gather(*waiting.popleft()) if waiting else None
            assert here is not None
            projection.gathered = here.take(projection)
        try:
            yield item
        finally:
            projection.gathered = None


def _divided(weight: Any) -> LiveProjection | None:
    return weight.P if isinstance(weight, ProjectedWeight) and weight.P.rows is not None else None


def _buckets(work: Sequence[tuple[Any, Any, Tensor, Any]]) -> Iterator[tuple[list[LiveProjection], torch.dtype]]:
    """The P to gather, of one mesh, device and precision each: that of the product, if it is not kept in less."""
    bucket: list[LiveProjection] = []
    size, key = 0, None
    for _, weight, G, _ in work:
        projection = _divided(weight)
        if projection is None or not projection.started:
            continue
        P, geometry = projection.slot.state["projection"], projection.geometry
        whole = weight.residual is not None or weight.group["stochastic_rounding"]
        dtype = min(P.dtype, geometry.compute_dtype if whole else G.dtype, key=lambda dtype: dtype.itemsize)
        own, numel = (projection.rows.mesh, P.device, dtype), geometry.projection_shape[0] * geometry.rank  # type: ignore
        if bucket and (own != key or size + numel > BUCKET_LIMIT):
            yield bucket, key[-1]  # type: ignore[index]
            bucket, size = [], 0
        bucket.append(projection)
        size, key = size + numel, own
    if bucket:
        yield bucket, key[-1]  # type: ignore[index]


@dataclass(frozen=True)
class _OfOnePart:
    """What a rule is given in place of the operator: the gradient of which the sum over processes is that of Eq. 6."""

    op: LinearOperator
    processes: int

    def pca_gradient(self, P: Tensor, A: Tensor, inv_norm2: Tensor, lambda_: float) -> Tensor:
        return self.op.pca_gradient(P, A, inv_norm2, lambda_ / self.processes)


class _Stack(NamedTuple):
    """P of one shape and group, and the gradients (k, s, r) of this process's part."""

    waiting: list[Moving]
    rows: Rows
    gP: Tensor


class DividedMovements(Movements):
    """As [`Movements`]; gradients of divided P are sent as soon as they fill a bucket."""

    def __init__(self, aside: SideStreams | None = None) -> None:
        super().__init__(aside)
        if aside is not None:
            raise ValueError(
                "`projection_stream` is not for P that processes divide, whose exchange is beside the steps already: "
                "leave it out, or set `divide_projection=False`."
            )
        self._wholes: dict[LiveProjection, Tensor] = {}  # of weights that are not moved yet
        self._used: dict[tuple, list[Moving]] = {}
        self._ready: list[_Stack] = []
        self._flying: deque[tuple[list[_Stack], Reduce]] = deque()

    def step(self, stepping: Stepping) -> None:
        """Have a weight moved, now or when as many of its shape have come as may wait."""
        projection = _divided(stepping.weight)
        if projection is not None:
            self._wholes[projection] = projection.whole()
        super().step(stepping)

    def _step_all(self, waiting: list[Stepping]) -> None:
        projections = [P for stepping in waiting if (P := _divided(stepping.weight)) is not None]
        for projection in projections:
            projection.gathered = self._wholes.pop(projection)
        super()._step_all(waiting)
        for projection in projections:
            projection.gathered = None

    def add(self, moving: Moving | None) -> None:
        """Move P, if it is to, when as many of its shape have come as may wait."""
        rows = None if moving is None else moving.projection.rows
        if moving is None or rows is None:
            super().add(moving)
            return
        A = moving.A
        key = (rows.mesh, id(moving.projection.group), A.shape, A.dtype, A.device)
        used = self._used.setdefault(key, [])
        used.append(moving)
        if (len(used) + 1) * A.numel() > STACK_LIMIT:
            self._differentiate(self._used.pop(key))

    def finish(self) -> None:
        """Move what still waits, and count."""
        while self._steps:
            self._step_all(self._steps.popitem()[1])
        for used in self._used.values():
            self._differentiate(used)
        self._used.clear()
        self._send()
        while self._flying:
            self._land()
        super().finish()

    def _differentiate(self, used: list[Moving]) -> None:
        """gP_i of each of a stack."""
        first, rows = used[0].projection, used[0].projection.rows
        sharding = first.geometry.sharding
        assert rows is not None and sharding is not None
        dtype = first.geometry.compute_dtype
        A, P = (torch.stack([getattr(moving, name) for moving in used]).to(dtype) for name in ("A", "P"))
        inv_norm2 = torch.stack([moving.check.inv_norm2 for moving in used])[:, None, None]
        part = _OfOnePart(first.geometry.op, len(rows.sizes) // sharding.copies)
        found: list[Tensor] = []
        unusable = partial(usable, used[0].check)  # a stackable rule does not ask
        first.rule.advance_(P, Movement(A, inv_norm2, unusable, part, found.append))  # type: ignore[arg-type]
        (gP,) = found
        waiting = [
            moving._replace(P=own_rows(moving.projection), A=moving.check.skip) for moving in used
        ]  # frees both
        stack = _Stack(waiting, rows, gP.div_(sharding.copies) if sharding.copies > 1 else gP)
        ready = self._ready
        if ready and (ready[0].rows.mesh, ready[0].gP.dtype, ready[0].gP.device) != (rows.mesh, gP.dtype, gP.device):
            self._send()
        self._ready.append(stack)
        if sum(own.gP.numel() for own in self._ready) + gP.numel() > BUCKET_LIMIT:
            self._send()

    def _send(self) -> None:
        """Exchange what is ready, and step with what has come of that before."""
        if self._ready:
            self._flying.append((self._ready, Reduce([(own.rows, own.gP) for own in self._ready])))
            self._ready = []
        if len(self._flying) > 1:
            self._land()

    def _land(self) -> None:
        """One step of each P of a bucket, of this process's rows."""
        stacks, reduce = self._flying.popleft()
        made: list[Step] = []
        for own, gP in zip(stacks, reduce.take(), strict=True):
            descend(own.waiting, made, gP)
        long = [step for _, step, far in made if far]
        if long:
            shorten_(long, partial(total, group=stacks[0].rows.group))
        for waiting, step, _ in made:
            torch._foreach_add_([moving.P for moving in waiting], step.unbind())
            for moving in waiting:
                moving.projection.write(moving.P)


def own_rows(projection: LiveProjection) -> Tensor:
    """The rows of this process in the precision of the computation: those in the state, where these have that."""
    return projection.slot.state["projection"].to(projection.geometry.compute_dtype)
