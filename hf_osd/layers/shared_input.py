"""P of the layers that are given one and the same tensor, and what it learns of that tensor.

Letters and shapes as in `subspace.operators`; x (T, n) are a layer's inputs, one row for each of T tokens. P learns by
the rules that it learns from gradients by, with x in the place of G (Eq. 6): of every k-th token,

    A  = x_kᵀ (x_k P)         ||x_k||²

add up over all that is computed between two steps. While x_k and x_k P of a few tokens are smaller than A, they are
what is kept, and A is made of them when it is asked for: for one input at a time, in the step.

Where P moves within the backward pass (layerwise), what it learns of is kept for that pass as what autograd keeps: a
checkpoint drops it, and makes it again.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..subspace.precision import full_precision, reduced_precision
from .compiled import dtype_of_products, new_handle
from .outside import columns, filled
from .start import FirstProjection


class Once:
    """Whether P has learned late of one x: in the first backward pass of the layers that were given it.

    Which that is nobody knows before: of a layer whose output the loss does not use none comes.
    """

    done = False


class Seen(NamedTuple):
    """What each of them keeps for that, the same tensors, x_k and x_k P or A and ||x_k||², and what takes these."""

    take: Callable[[tuple[Tensor, Tensor]], None]
    seen: tuple[Tensor, Tensor]


class Last(NamedTuple):
    """The x that an input has seen last. References are weak: what becomes of them is autograd's to decide."""

    x: Callable[[], Any] = lambda: None
    version: int = 0
    product: Callable[[], Any] = lambda: None
    once: Once = Once()
    kept: tuple[Callable[[], Any], ...] = ()


class SharedInput:
    """The subspace of one input, which all layers that are given it use.

    Args:
        leader (`str`): Name of the weight that holds P in the optimizer's state: of the layer that was called first.
        first ([`FirstProjection`]): How P starts.
        every (`int`): k: P learns of every k-th token.
        residual_sample (`int`, *optional*):
            Beside R its layers make one column of G in so many, which a residual is of; see `outside`.
        newest (`list[torch.Tensor]`):
            What any input of the model has kept last, which its inputs share: a checkpoint drops it at once, and the
            other layers of that x would make it again.

    Attributes:
        P (`torch.Tensor`, *optional*):
            (n, r), the optimizer's own, maybe in int8; `None` before it is drawn. Where processes divide it, this
            one's rows of it.
        rows (`Rows`, *optional*): How they do.
        code (`torch.Tensor`, *optional*): What the state keeps instead of P, once it does.
        started (`bool`): Whether weights are stepped by it. Before, P is a random sketch, from which it starts.
        kept (`bool`): Whether it is, or was, in the optimizer's state.
        learns (`bool`): Whether P is to move after the coming step.
        turn (`int`): Which of the k first tokens is the first that P learns of.
        columns_turn (`int`): Whose turn it is among these columns.
        energy (`torch.Tensor`, *optional*): ||x_k||², 0-dim, likewise.
        averaged (`bool`): Whether both are those of all processes.
        handle (`torch.Tensor`): A number on the CPU that compiled functions, which are given it, find the input by.
    """

    def __init__(
        self, leader: str, first: FirstProjection, every: int, residual_sample: int | None, newest: list[Tensor]
    ):
        self.leader, self.first, self.every, self._newest = leader, first, every, newest
        self.residual_sample = residual_sample
        self.handle = new_handle(self)
        self.P: Tensor | None = None
        self.rows: Any = None
        self._wholes: Any = None
        self.restart()
        self._A: Tensor | None = None
        self._tokens: list[tuple[Tensor, Tensor]] = []  # x_k and x_k P that are not in A
        self.energy: Tensor | None = None
        self.averaged = False
        self._outside: set[bool] = set()
        self._last = Last()

    @property
    def A(self) -> Tensor | None:
        """As above, since the last step; `None` where nothing was seen."""
        for x, xP in self._tokens:
            A = self._product_of(x, xP)
            self._A = A if self._A is None else self._A + A
        self._tokens.clear()
        return self._A

    @A.setter
    def A(self, A: Tensor | None) -> None:
        self._A = A
        self._tokens.clear()

    def restart(self) -> None:
        """Be as before the first step."""
        if self.P is not None:  # the exchange of processes asks for it, whoever calls the layer next
            P, n, wholes = self.P, self.size, self._wholes
            self.rows = self._wholes = None
            self.P = self.first.draw(n, P.device)
            if wholes is not None:
                wholes.remove(self)
        self.code: Tensor | None = None
        self.started, self.kept = self.first.complete, False
        self.learns, self.turn = not self.first.complete or self.first.rule.moves_at(0), 0
        self.columns_turn = 0

    @property
    def size(self) -> int:
        """n, of a P that is there."""
        assert self.P is not None
        return len(self.P) if self.rows is None else sum(self.rows.sizes)

    @torch.no_grad()
    def project(self, x: Tensor, late: bool = False) -> tuple[Tensor, Seen | None]:
        """The product x P, (T, r), and x_S beside it: once for all layers that are given this x.

        Where P learns `late`, in the backward pass, with what each of them keeps for it: all do, since checkpoints
        count on it that a pass repeated keeps the same.
        """
        dtype, last = dtype_of_products(x.device.type, x.dtype), self._last
        seen = last.x() is x and last.version == x._version
        xP = last.product() if seen else None
        if xP is None or xP.dtype != dtype:  # that seen is gone where a checkpoint keeps nothing
            xP = self.product(x, dtype, learn=not seen and not late)
            once, kept = (last.once, last.kept) if seen else (Once(), ())
            self._last = last = Last(weakref.ref(x), x._version, weakref.ref(xP), once, kept)
        if not late or not self.learns:
            return xP, None
        known = [reference() for reference in last.kept]
        if not known or any(part is None for part in known):
            known = list(self._kept_of(x, xP))
            self._last = last._replace(kept=tuple(map(weakref.ref, known)))
            self._newest[:] = known
        return xP, Seen(partial(self.take, last.once), (known[0], known[1]))

    @torch.no_grad()
    def product(self, x: Tensor, dtype: torch.dtype, compiled: bool = False, learn: bool = True) -> Tensor:
        """As `project`, which asks for what is not known any more."""
        if self.P is None:
            self.P = self.first.draw(x.shape[-1], x.device)
        elif self.P.device != x.device:  # the model has been moved
            self.P = self.P.to(x.device)
        P = self.P if self.rows is None else self._wholes.take(self)
        x = x.reshape(-1, x.shape[-1])
        with full_precision(x):
            xP = x.to(dtype) @ P.to(dtype)
        del P
        if self.residual_sample is not None:
            xP = torch.cat([xP, self.columns_of(x, dim=1).to(dtype)], dim=1)
        if learn and self.learns and self._is_new(compiled):
            self._learn(*self._part_of(x, xP))
        return xP

    @property
    def columns(self) -> slice:
        """S, of the coming step, where its layers make G_S."""
        assert self.residual_sample is not None
        return columns(self.size, self.residual_sample, self.columns_turn)

    def columns_of(self, X: Tensor, dim: int) -> Tensor:
        """X_S, of columns (`dim` 1) or rows."""
        assert self.residual_sample is not None
        part = X[:, self.columns] if dim else X[self.columns]
        return filled(part, self.size, self.residual_sample, dim)

    def _part_of(self, x: Tensor, xP: Tensor) -> tuple[Tensor, Tensor]:
        """x_k and x_k P."""
        start = self.turn % max(min(self.every, len(x)), 1)  # a few tokens are seen at every step, too
        return x[start :: self.every], xP[start :: self.every, : self.first.rank]

    def _learn(self, x: Tensor, xP: Tensor) -> None:
        self._add_energy(self._energy_of(x))
        few = self._few(*self._tokens, (x, xP))
        self._tokens.append((x.clone(), xP.clone()) if few else (x, xP))
        if not few or self._A is not None:
            self.A  # noqa: B018 - makes it

    def _kept_of(self, x: Tensor, xP: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of an input for the backward pass: see [`Seen`]."""
        x, xP = self._part_of(x.reshape(-1, x.shape[-1]), xP)
        return (x.clone(), xP.clone()) if self._few((x, xP)) else (self._product_of(x, xP), self._energy_of(x))

    def take(self, once: Once, seen: tuple[Tensor, Tensor]) -> None:
        """Learn of that, if it has not been."""
        self._newest.clear()
        if once.done:
            return
        once.done = True
        if seen[1].ndim:
            self._learn(*seen)
            return
        A = self.A
        self.A = seen[0] if A is None else A + seen[0]
        self._add_energy(seen[1])

    def _few(self, *tokens: tuple[Tensor, Tensor]) -> bool:
        """Whether tokens and their products are smaller than A."""
        x, xP = tokens[0]
        bytes_of_A = x.shape[1] * xP.shape[1] * self.first.dtype.itemsize
        return sum(part.nbytes for pair in tokens for part in pair) < bytes_of_A

    def _energy_of(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, self.first.dtype)).square()

    def _add_energy(self, energy: Tensor) -> None:
        self.energy = energy if self.energy is None else self.energy + energy

    def _product_of(self, x: Tensor, xP: Tensor) -> Tensor:
        """A of these tokens."""
        dtype = self.first.dtype
        with torch.autocast(x.device.type, enabled=False):
            if xP.dtype == torch.float16:  # whose range the sums of squares leave
                return x.t().to(dtype) @ xP.to(dtype)
            with reduced_precision(x):
                return (x.t().to(xP.dtype) @ xP).to(dtype)

    def norm2(self) -> Tensor:
        """||x_k||², not finite where A is not, which must not enter P."""
        assert self.energy is not None
        return self.energy if self._A is None else self.energy + 0 * self._A.sum()

    def _is_new(self, compiled: bool) -> bool:
        """Whether this forward pass is none that a checkpoint repeats in the backward pass, having seen it before."""
        # A reentrant checkpoint computes without gradients first, and one within a compiled function makes x P in the
        # backward pass alone: then this is the first that is seen of it.
        if torch._C._current_graph_task_id() == -1:
            self._outside.add(compiled)
            return True
        return compiled not in self._outside

    def forget(self) -> None:
        """What was seen since the last step."""
        self.A = self.energy = None
        self.averaged = False
        self._outside.clear()
        self.forget_product()

    def forget_product(self) -> None:
        """Forget x P of the last x: P moves, and whoever keeps that x and its outputs would be given it again."""
        self._last = Last()
        self._newest.clear()

    def make_room(self) -> None:
        """Drop the sketch, of which A tells all, before P is made of that. A itself is made in its turn."""
        if not self.started and (self._A is not None or self._tokens):
            self.P = None

    def bind(self, P: Tensor, code: Tensor | None, rows: Any = None, wholes: Any = None) -> None:
        """Use this P, the optimizer's, and what it keeps instead, from now on, and step by it.

        Args:
            P (`torch.Tensor`): As above.
            code (`torch.Tensor`, *optional*): Likewise.
            rows (`Rows`, *optional*): Likewise.
            wholes ([`Wholes`], *optional*): Gives all of P, if this is not all.
        """
        if self.rows is not None and rows is None:
            self._wholes.remove(self)
        self.P, self.code, self.started, self.kept, self.rows, self._wholes = P, code, True, True, rows, wholes
        self.forget_product()
