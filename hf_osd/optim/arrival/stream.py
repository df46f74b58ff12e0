"""Gradients taken off the parameters as the backward pass delivers them, so that they need not all exist at once.

Layerwise, a parameter is stepped the moment its gradient is complete. Where several backward passes come before a step
(gradient accumulation), what adds up in the subspace is kept of each, R and A, and `step()` does the rest. A residual
needs G itself while its parameter is stepped: G is freed at the end of the hook then, not before the update.

Letters and shapes as in `subspace.operators`.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ...layers.exchange import in_a_process_of_many
from ...subspace.precision import own_precision
from ..options.mode import Mode
from ..step.algorithm import ONLY
from ..step.full_weight import FullWeight
from ..step.gradients import check_of, refuse_unsupported, squared_norm
from ..step.movement import Movements
from ..step.sharding import is_sharded
from ..step.weights import Weights
from .clipping import Clipping
from .window import Arrived, Lows, Window


# Which stream's hook a parameter carries: with two it would be stepped twice.
_OWNERS = WeakTensorKeyDictionary()


class GradientStream:
    """Hooks that take gradients, and all that is known between them and `step()`.

    Args:
        weights (`Callable`): Gives the [`Weights`] that the optimizer has now.
        mode ([`Mode`]): The optimizer's.

    Attributes:
        clipping ([`Clipping`]): How gradients are clipped.
        grad_norm2 (`torch.Tensor`): Squared norm of the last step's gradients before clipping, 0-dim; `None` before.
    """

    def __init__(self, weights: Callable[[], Weights], mode: Mode):
        self._weights, self.mode, self.clipping = weights, mode, Clipping(mode)
        self.grad_norm2: Tensor | None = None
        self._attached = False
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._windows: dict[Tensor, Window] = {}
        self._norms2: dict[Tensor, Tensor] = {}  # of the parameters stepped since the last `step()`

    @property
    def weights(self) -> Weights:
        """The optimizer's, as they are now."""
        return self._weights()

    @property
    def attached(self) -> bool:
        """Whether the hooks are on."""
        return self._attached

    def attach(self) -> None:
        """Put the hooks on. They replace those of another optimizer."""
        self.remove()
        self._check_processes()
        self._attached = True
        self._attach_missing()

    def extend(self) -> None:
        """Put the hooks on parameters that were added to the optimizer, too."""
        if self.attached:
            self._check_processes()
            self._attach_missing()

    def _attach_missing(self) -> None:
        """Put hooks on parameters that need them and have none, as those that were unfrozen since."""
        for group in self.weights.groups:
            for p in group["params"]:
                if p.requires_grad and p not in self._handles:
                    owner = _OWNERS[p]() if p in _OWNERS else None
                    if owner is not None and owner is not self:
                        owner.remove()
                    _OWNERS[p] = weakref.ref(self)
                    self._handles[p] = p.register_post_accumulate_grad_hook(_hook(self))

    def remove(self) -> None:
        """Take the hooks off, and forget what has not been stepped with."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._attached = False
        self.discard()

    def discard(self) -> None:
        """Forget the gradients since the last step; steps that have been made with some are told."""
        if self._norms2:
            warnings.warn(
                f"A backward pass has ended without `step()`: it has stepped {len(self._norms2)} parameters, and not "
                "the others. Load the weights again to undo it.",
                stacklevel=4,
            )
        self._clear()

    def _clear(self) -> None:
        self._windows.clear()
        self._norms2.clear()

    def load(self, clip_norm2: float | None) -> None:
        """Go on from a state that has been loaded: what has come to a subspace is not in that state's.

        Args:
            clip_norm2 (`float`, *optional*): The norm that the next step is clipped by, as a state dict has it.
        """
        self.clipping.set_norm(clip_norm2)
        self.discard()

    def held_bytes(self) -> int:
        """Bytes of what waits for `step()`."""
        return sum(window.nbytes() for window in self._windows.values())

    def _check_processes(self) -> None:
        if any(is_sharded(p) for group in self.weights.groups for p in group["params"]):
            raise ValueError(
                "`layerwise` needs whole parameters, and these are sharded (FSDP2). Use source='activations' instead, "
                "which has no gradients of full size there either."
            )
        if in_a_process_of_many():
            raise ValueError(
                "`layerwise` would step before gradients are averaged over the processes. Leave it out, or use "
                "source='activations', which has no gradients of full size, instead."
            )

    @torch.no_grad()
    def on_gradient(self, p: Tensor) -> None:
        """The hook: this backward pass has nothing more to add to the gradient of `p`."""
        with own_precision(self.weights.device_types):
            self._take(p)

    def _take(self, p: Tensor) -> None:
        G, p.grad = p.grad, None
        assert G is not None
        self.weights.follow()
        weight = self.weights.of(p)
        refuse_unsupported(G, weight.geometry.name)
        if self.mode.gradient_accumulation:
            window = self._windows.setdefault(p, Window())
            if isinstance(weight, FullWeight):
                window.add_whole(G)
            else:
                self._add(p, G, window)
        elif p in self._norms2:
            raise ValueError(
                f"The gradient of {weight.geometry.name} arrived twice before `step()`. Several backward passes need "
                "an optimizer with `gradient_accumulation=True` (in a Trainer: pass it in `optimizers`); after a "
                "failed one call `zero_grad()`."
            )
        else:
            if self.weights.observing and not self._norms2:
                self.weights.observations.clear()
            arrived = self._arrive(p, G)
            del G  # its memory is free before the update's, unless its residual is used: then it goes with `arrived`
            self._norms2[p] = arrived.norm2.sum()
            self._apply(p, arrived)

    def _arrive(self, p: Tensor, G: Tensor, window: Window | None = None) -> Arrived:
        """Project `G` where `p` is projected; where it is one of several gradients, `window` has those before it."""
        weight = self.weights.of(p)
        if isinstance(weight, FullWeight):
            norm2 = squared_norm(G, False)
            return Arrived(G, norm2, norm2)
        geometry = weight.geometry
        turns = [ONLY] * geometry.matrices if window is None else window.turns(geometry.matrices)
        norm2 = squared_norm(G, geometry.stacked)
        lows = self._project(self.weights.ready(p), G, norm2, turns)
        weight.release()
        return Arrived(lows, norm2, norm2)

    def _add(self, p: Tensor, G: Tensor, window: Window) -> None:
        arrived = self._arrive(p, G, window)
        window.add(arrived.gradient, arrived.energy)  # type: ignore[arg-type]

    def _apply(self, p: Tensor, arrived: Arrived) -> None:
        """Step `p`."""
        energy, weight, movements = arrived.energy, self.weights.ready(p), Movements()
        stacked = weight.geometry.stacked
        clipped, check = self.clipping.clip_(arrived), check_of(energy, stacked)
        norm2, gradient = clipped.norm2, clipped.gradient
        own: Any = gradient if stacked or isinstance(gradient, Tensor) else gradient[0]
        if self.weights.observing:
            self.weights.observe(weight, own, check if norm2 is energy else check_of(norm2, stacked))
        movements.counters.append((weight.slot.state["skipped_steps"], check.broken))
        weight.update(own, check, movements)
        movements.finish()
        weight.release()

    def finish(self) -> None:
        """What is left for `step()`: to step with what was kept, and to note the norm."""
        if not self.attached:
            raise ValueError("The hooks of this optimizer have been removed: call `attach()` to train on.")
        self._check_processes()
        with own_precision(self.weights.device_types):
            self._finish()

    def _finish(self) -> None:
        self.weights.follow()
        if self.weights.observing and not self._norms2:
            self.weights.observations.clear()
        for group in self.weights.groups:
            for p in group["params"]:
                arrived = self._waiting(p)
                if arrived is not None:
                    self._norms2[p] = arrived.norm2.sum()
                    self._apply(p, arrived)
        if self._norms2:
            norms2 = list(self._norms2.values())
            total2 = torch.stack([norm2.to(norms2[0]) for norm2 in norms2]).sum()
            self.grad_norm2 = total2
            self.clipping.note(total2)
        self._clear()
        self._attach_missing()

    def _waiting(self, p: Tensor) -> Arrived | None:
        """What of `p` waits for `step()`."""
        window = self._windows.pop(p, None) or Window()
        if p.grad is not None:  # never taken: set by hand
            refuse_unsupported(p.grad, self.weights.of(p).geometry.name)
            window.add_whole(p.grad)
        if window.lows is None:
            return None if window.G is None else self._arrive(p, window.G)
        if window.G is not None:
            self._add(p, window.G, window)
        return window.arrived()

    @staticmethod
    def _project(weight: Any, G: Tensor, norm2: Tensor, turns: list) -> Lows:
        stacked, dtype = weight.geometry.stacked, weight.geometry.compute_dtype
        check = check_of(norm2, stacked)
        lows = weight.project(G, check, turns) if stacked else [weight.project(G, check, turns[0])]
        return [None if low is None else low.wide(dtype) for low in lows]

    def __getstate__(self) -> dict[str, Any]:
        """Hooks are not kept, only that they were there; nor gradients, as parameters do not keep theirs."""
        kept = {name: self.__dict__[name] for name in ("mode", "clipping", "grad_norm2")}
        empty: dict[str, Any] = {"_attached": False, "_handles": {}, "_windows": {}, "_norms2": {}}
        return kept | empty | {"_was_attached": self.attached}

    def restore(self, weights: Callable[[], Weights]) -> None:
        """Belong to the copy of the optimizer; put the hooks on again if the original had them."""
        self._weights = weights
        if self.__dict__.pop("_was_attached", False):
            self.attach()


def release(params: Iterable[Tensor], keep: GradientStream | None) -> None:
    """Take the hooks of all optimizers but `keep`'s off: those of a training that was interrupted would train on."""
    for p in params:
        owner = _OWNERS[p]() if p in _OWNERS else None
        if owner is not None and owner is not keep:
            owner.remove()


def _hook(stream: GradientStream) -> Callable[[Tensor], None]:
    # A parameter must not keep the optimizer alive, which keeps the parameter.
    reference = weakref.ref(stream)

    def hook(p: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive.on_gradient(p)

    return hook
