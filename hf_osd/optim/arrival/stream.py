"""Gradients taken off the parameters as the backward pass delivers them, so that they need not all exist at once.

Layerwise, a parameter is stepped the moment its gradient is complete. Where several backward passes come before a step
(gradient accumulation), what adds up in the subspace is kept of each, R and A, and `step()` does the rest. A residual
needs G itself while its parameter is stepped: G is freed at the end of the hook then, not before the update.

Of a weight whose layers make R, R arrives at its stand-in. P moves when all weights that share it have been stepped.

Letters and shapes as in `subspace.operators`.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

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
from .hooks import put_on, refuse_deaf_torch
from .window import Arrived, Lows, Window


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
        self._half: set[Tensor] = set()  # weights of layers of which one of two gradients is complete

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
        if not self.mode.gradient_accumulation:
            refuse_deaf_torch(self.weights.groups)
        for p, target in self.weights.targets():
            if p.requires_grad and target not in self._handles:
                self._handles[target] = put_on(target, self, p)

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
        self._half.clear()

    @property
    def begun(self) -> bool:
        """Whether parameters have been stepped since the last `step()`."""
        return bool(self._norms2)

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
                "`layerwise` needs whole parameters, and these are sharded (FSDP2). Leave it out; with "
                "source='activations' projected layers have no gradients of full size there either."
            )
        if in_a_process_of_many():
            raise ValueError(
                "`layerwise` would step before gradients are averaged over the processes. Leave it out; with "
                "source='activations' projected layers have no gradients of full size there either."
            )

    @torch.no_grad()
    def on_gradient(self, p: Tensor) -> None:
        """The hook: this backward pass has nothing more to add to the gradient of `p`."""
        with own_precision(self.weights.device_types):
            self.weights.catch_up()
            if p in self.weights.layer_of:
                self._take_half(p)
            else:
                self._take(p)

    def _take_half(self, p: Tensor) -> None:
        """R of a weight of a layer is complete, or what the weight itself gets, from other uses: mostly nothing.

        A backward pass ends with both, in no order. Once both are there nothing needs the weight any more.
        """
        if self.mode.gradient_accumulation:  # R adds up where it is
            return
        self._refuse_second(p)
        if p not in self._half:
            self._half.add(p)
            return
        self._half.discard(p)
        G = self.weights.take(p)
        if G is not None:
            self._step(p, [G])
            self.weights.learn_early(p, self._norms2.keys())

    def _take(self, p: Tensor) -> None:
        G, p.grad = p.grad, None
        if G is None:  # a function has given it none
            return
        weight = self.weights.of(p)
        refuse_unsupported(G, weight.geometry.name)
        if self.mode.gradient_accumulation:
            window = self._windows.setdefault(p, Window())
            if isinstance(weight, FullWeight):
                window.add_whole(G)
            else:
                self._add(p, G, window)
        else:
            self._refuse_second(p, G)
            held = [G]
            del G
            self._step(p, held)

    def _refuse_second(self, p: Tensor, G: Tensor | None = None) -> None:
        """Raise `ValueError` for the gradient of a parameter that has been stepped since the last `step()`."""
        if p in self._norms2 and (G is not None or self.weights.has_gradient(p)):
            raise ValueError(
                f"The gradient of {self.weights.of(p).geometry.name} arrived twice before `step()`. Several backward "
                "passes need an optimizer with `gradient_accumulation=True` (in a Trainer: pass it in `optimizers`); "
                "after a failed one call `zero_grad()`."
            )

    def _step(self, p: Tensor, held: list[Tensor]) -> None:
        """Step `p` with the gradient that is held, and not by the caller."""
        if self.weights.observing and not self._norms2:
            self.weights.observations.clear()
        # its memory is free before the update's, unless its residual is used: then it goes with `arrived`
        arrived = self._arrive(p, held.pop())
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
        self.weights.catch_up()
        if self.weights.observing and not self._norms2:
            self.weights.observations.clear()
        for group in self.weights.groups:
            for p in group["params"]:
                arrived = self._waiting(p, group)
                if arrived is not None:
                    self._norms2[p] = arrived.norm2.sum()
                    self._apply(p, arrived)
        if self._norms2:
            norms2 = list(self._norms2.values())
            total2 = torch.stack([norm2.to(norms2[0]) for norm2 in norms2]).sum()
            self.grad_norm2 = total2
            self.clipping.note(total2)
        self.weights.conclude()
        self._clear()
        self._attach_missing()

    def _waiting(self, p: Tensor, group: Mapping[str, Any]) -> Arrived | None:
        """What of `p` waits for `step()`."""
        window = self._windows.pop(p, None) or Window()
        G = p.grad
        if p in self.weights.layer_of:
            self._refuse_second(p)
            G = self.weights.gradient_of(p, group)
        if G is not None:  # never taken: set by hand, or of a layer
            refuse_unsupported(G, self.weights.of(p).geometry.name)
            window.add_whole(G)
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
        empty: dict[str, Any] = {"_attached": False, "_handles": {}, "_windows": {}, "_norms2": {}, "_half": set()}
        return kept | empty | {"_was_attached": self.attached}

    def restore(self, weights: Callable[[], Weights], attach: bool) -> None:
        """Belong to the copy of the optimizer; put hooks on again that the original had, if it can use them."""
        self._weights = weights
        if self.__dict__.pop("_was_attached", False) and attach:
            self.attach()
