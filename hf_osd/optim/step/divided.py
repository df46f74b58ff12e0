"""P and its moments divided among processes by rows: trained as FSDP2 trains a weight.

P is gathered while its weight is stepped, the next ones on their way meanwhile. A is of each process's part of G, and
the gradient of Eq. 6 is linear in it:

    gP = 2 s (A (C - 2 I) + P PᵀA) + 4 lambda P (C - I)         A = sum_i A_i,   C = PᵀP

so that process i makes gP_i of A_i, with lambda / processes, and the sum of these is what is exchanged: each process
gets the rows that it has of P, and steps them. With `source="activations"` A_i is of the process's own tokens, and
||x||² the sum over all; there `layers.wholes` gathers P for the forward pass. Letters and shapes as in
`subspace.operators`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layers.gather import BUCKET_LIMIT, Gather, narrower
from ...subspace import LinearOperator, Movement
from .algorithm import ProjectedWeight
from .buckets import Reduce, total
from .movement import STACK_LIMIT, Movements, Moving, Step, Stepping, descend, shorten_
from .projection import LiveProjection, usable
from .rows import Rows
from .streams import SideStreams


Work = Sequence[tuple[Any, Any, Tensor, Any]]  # parameter, weight, gradient and its check


def with_projections(work: Work) -> Iterator[tuple[Any, Any, Tensor, Any]]:
    """The weights of a step, each with the whole of a divided P while it is stepped.

    In their order, but for those that use one P: they come together.
    """
    work = _together(work)
    waiting = deque(_buckets(work))
    ahead = _gather(*waiting.popleft()) if waiting else None
    here: Gather | None = None
    last, whole = None, None
    for item in work:
        projection = _divided(item[1])
        if projection is None:
            yield item
            continue
        if projection.started:
            if here is None or projection not in here:
                here, ahead = ahead, _gather(*waiting.popleft()) if waiting else None
            if projection is not last:
                assert here is not None
                last, whole = projection, here.take(projection)
            projection.gathered = whole
        try:
            yield item
        finally:
            projection.gathered = None


def _together(work: Work) -> Work:
    first: dict[LiveProjection, int] = {}
    places = [
        index if (projection := _divided(item[1])) is None else first.setdefault(projection, index)
        for index, item in enumerate(work)
    ]
    return [work[index] for index in sorted(range(len(work)), key=places.__getitem__)]


def _gather(projections: Sequence[LiveProjection], dtype: torch.dtype) -> Gather:
    return Gather({P: (P.stored, P.rows) for P in projections}, dtype)


def _divided(weight: Any) -> LiveProjection | None:
    return weight.P if isinstance(weight, ProjectedWeight) and weight.P.rows is not None else None


def _buckets(work: Work) -> Iterator[tuple[list[LiveProjection], torch.dtype]]:
    """The P to gather, of one mesh, device and precision each: that of the product, if it is not kept in less."""
    dtypes: dict[LiveProjection, torch.dtype] = {}
    for _, weight, G, _ in work:
        projection = _divided(weight)
        if projection is not None and projection.started:
            whole = weight.residual is not None or weight.group["stochastic_rounding"]
            dtype = projection.geometry.compute_dtype if whole else G.dtype
            dtypes[projection] = torch.promote_types(dtype, dtypes.get(projection, dtype))
    bucket: list[LiveProjection] = []
    size, key = 0, None
    for projection, dtype in dtypes.items():
        P, geometry = projection.stored, projection.geometry
        dtype = narrower(P, dtype)
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
        self._wholes: dict[Any, Tensor] = {}  # by weight that is not moved yet
        self._used: dict[tuple, list[Moving]] = {}
        self._ready: list[_Stack] = []
        self._flying: deque[tuple[list[_Stack], Reduce]] = deque()

    def step(self, stepping: Stepping) -> None:
        """Have a weight moved, now or when as many of its shape have come as may wait."""
        projection = _divided(stepping.weight)
        if projection is not None:
            self._wholes[stepping.weight] = projection.whole()
        super().step(stepping)

    def _step_all(self, waiting: list[Stepping]) -> None:
        projections = {own.weight: P for own in waiting if (P := _divided(own.weight)) is not None}
        for weight, projection in projections.items():
            projection.gathered = self._wholes.pop(weight)
        super()._step_all(waiting)
        for projection in projections.values():
            projection.gathered = None

    def add(self, moving: Moving | None) -> None:
        """Move P, if it is to, when as many of its shape have come as may wait."""
        rows = None if moving is None else moving.projection.rows
        if moving is None or rows is None:
            super().add(moving)
            return
        projection, A = moving.projection, moving.A
        kept = projection.slot.state["projection"].dtype
        sums = (rows.mesh, projection.copies, projection.sent_in)
        key = (sums, id(projection.group), A.shape, A.dtype, kept, A.device)
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
        assert rows is not None
        dtype = first.geometry.compute_dtype
        A, P = (torch.stack([getattr(moving, name) for moving in used]).to(dtype) for name in ("A", "P"))
        inv_norm2 = torch.stack([moving.check.inv_norm2 for moving in used])[:, None, None]
        part = _OfOnePart(first.geometry.op, len(rows.sizes) // first.copies)
        found: list[Tensor] = []
        unusable = partial(usable, used[0].check)  # a stackable rule does not ask
        first.rule.advance_(P, Movement(A, inv_norm2, unusable, part, found.append))  # type: ignore[arg-type]
        (gP,) = found
        waiting = [
            moving._replace(P=own_rows(moving.projection), A=moving.check.skip) for moving in used
        ]  # frees both
        gP = gP.div_(first.copies) if first.copies > 1 else gP
        stack = _Stack(waiting, rows, gP if first.sent_in is None else gP.to(first.sent_in))
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
            descend(own.waiting, made, gP.to(own.waiting[0].P.dtype))
        long = [step for _, step, far in made if far]
        if long:
            shorten_(long, partial(total, group=stacks[0].rows.group))
        for waiting, step, _ in made:
            torch._foreach_add_([moving.P for moving in waiting], step.unbind())
            for moving in waiting:
                moving.projection.write(moving.P)


def own_rows(projection: LiveProjection) -> Tensor:
    """The rows of this process in the precision of the computation: those in the state, where these have that."""
    return projection.stored.to(projection.geometry.compute_dtype)
