"""Gradients taken off the parameters as the backward pass delivers them, so that they need not all exist at once.

Layerwise, a parameter is stepped the moment its gradient is complete. Where several backward passes come before a step
(gradient accumulation), what adds up in the subspace is kept of each, R and A, and `step()` does the rest. A residual
needs G itself while its parameter is stepped: G is freed at the end of the hook then, not before the update. With
`ddp_compression` alone the gradients are kept whole until `step()`, out of sight of whatever clips or scales them.

Letters and shapes as in `subspace.operators`.
"""

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..options.mode import Mode
from ..step.gradients import check_of, clip_coefficient, refuse_unsupported, squared_norm
from ..step.plan import ProjectedPlan
from ..step.sharding import is_sharded
from ..step.weights import ParameterSteps
from . import exchange
from .window import Arrived, Window


if TYPE_CHECKING:
    from ..osd import OSD


logger = logging.getLogger("hf_osd")

CLIP_NORM2 = "clip_norm2"  # key of the groups: None in live ones, see `take_norm`

# Which stream's hook a parameter carries: with two it would be stepped twice.
_OWNERS = WeakTensorKeyDictionary()


class GradientStream:
    """What a mode that takes gradients adds to an [`OSD`]: the hooks, and what is known between them and `step()`.

    Attributes:
        grad_norm2 (`torch.Tensor`): Squared norm of the last step's gradients before clipping, 0-dim; `None` before.
        clip_norm2 (`torch.Tensor`): The last finite one: what `previous_norm` clips by.
    """

    def __init__(self, optimizer: "OSD"):
        self._optimizer = weakref.ref(optimizer)
        self.grad_norm2: Tensor | None = None
        self.clip_norm2: Tensor | None = None
        if self.mode.clipping == "previous_norm" and self.mode.layerwise_clipping is None:
            logger.warning(
                "Layerwise, max_grad_norm=%s clips by the gradient norm of the step before. "
                "layerwise_clipping='parameter' clips each parameter by its own.",
                self.mode.max_grad_norm,
            )
        self._handles: list[RemovableHandle] = []
        self._groups: dict[Tensor, int] = {}
        self._windows: dict[Tensor, Window] = {}
        self._norms2: dict[Tensor, Tensor] = {}  # of the parameters stepped since the last `step()`

    @property
    def optimizer(self) -> "OSD":
        """Whose stream this is; not kept alive, for one that was dropped would step on until it is collected."""
        return self._optimizer()  # type: ignore[return-value]  # it calls

    @property
    def mode(self) -> Mode:
        """The optimizer's."""
        return self.optimizer.mode

    @property
    def steps(self) -> ParameterSteps:
        """The optimizer's, which makes them anew now and then."""
        return self.optimizer._steps

    @property
    def attached(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on. They replace those of another optimizer."""
        self.remove()
        self._check_processes()
        for index, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                if p.requires_grad and self._takes(group):
                    owner = _OWNERS[p]() if p in _OWNERS else None
                    if owner is not None and owner is not self:
                        owner.remove()
                    _OWNERS[p] = weakref.ref(self)
                    self._groups[p] = index
                    self._handles.append(p.register_post_accumulate_grad_hook(_hook(self)))

    def remove(self) -> None:
        """Take the hooks off, and forget what has not been stepped with."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._groups.clear()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients since the last step."""
        self._windows.clear()
        self._norms2.clear()

    def held_bytes(self) -> int:
        """Bytes of what waits for `step()`."""
        return sum(window.nbytes() for window in self._windows.values())

    def _takes(self, group: dict[str, Any]) -> bool:
        # Beside other processes, DDP averages the full-size parameters: they are complete after the backward pass
        # only, stay where they are, and `step()` finds them there.
        return group["rank"] is not None or (self.mode.layerwise and exchange.world_size() == 1)

    def _check_processes(self) -> None:
        if any(is_sharded(p) for group in self.optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "`layerwise` and `ddp_compression` are for whole parameters, and these are sharded: FSDP2 has "
                "averaged each gradient already, and kept no more than a shard of it. Leave both out."
            )
        if self.mode.ddp_compression is None and exchange.world_size() > 1:
            raise ValueError(
                "`layerwise` would step a parameter before its gradient is averaged over the processes. Set "
                "`ddp_compression='subspace'`, which averages in the subspace, or leave `layerwise` out (as FSDP2 "
                "needs it)."
            )

    @torch.no_grad()
    def on_gradient(self, p: Tensor) -> None:
        """The hook: this backward pass has nothing more to add to the gradient of `p`."""
        G, p.grad = p.grad, None
        assert G is not None
        group = self.optimizer.param_groups[self._groups[p]]
        name = self.steps.plan_of(p).name
        refuse_unsupported(G, name)
        if not self.mode.layerwise or (self.mode.gradient_accumulation and group["rank"] is None):
            self._windows.setdefault(p, Window()).add_whole(G)
        elif self.mode.gradient_accumulation:
            window = self._windows.setdefault(p, Window())
            arrived = self._arrive(p, G, group, window)
            window.add(arrived.gradient, arrived.energy)  # type: ignore[arg-type]
        elif p in self._norms2:
            raise ValueError(
                f"The gradient of {name} arrived twice before `step()`, and a layerwise step has been made with the "
                "first. Set `gradient_accumulation=True` where several backward passes come before a step, and where "
                "a weight is shared between segments of reentrant gradient checkpointing; call `zero_grad()` to go on "
                "after a backward pass that failed."
            )
        else:
            if self.optimizer.collect_statistics and not self._norms2:
                self.steps.observations.clear()
            arrived = self._arrive(p, G, group)
            del G  # its memory is free before the update's, unless its residual is used: then it goes with `arrived`
            self._norms2[p] = arrived.norm2.sum()
            self._apply(p, arrived, group)

    def _arrive(self, p: Tensor, G: Tensor, group: dict[str, Any], window: Window | None = None) -> Arrived:
        """Project `G` where `p` is projected, averaged over the processes unless it is one of several micro-batches.

        Args:
            window ([`Window`], *optional*): Where `G` is one of several gradients, what has come of those before it.
        """
        plan = self.steps.plan_of(p)
        first = None
        if window is not None and isinstance(plan, ProjectedPlan):
            first = window.may_make_projection(plan.matrices)
        exchanged = exchange.world_size() > 1 and isinstance(plan, ProjectedPlan)
        if exchanged and self.steps.makes_projection(p, group, first):
            exchange.average_(G)  # whole: so that all processes make the same P
            exchanged = False
        norm2 = squared_norm(G, plan.stacked)
        if not isinstance(plan, ProjectedPlan):
            return Arrived(G, norm2, norm2)
        shared = norm2
        if exchanged and plan.stacked:  # which experts had tokens on any process: the host may have to decide by it
            shared = norm2.clone()
            exchange.average_(shared)
        lows = self.steps.project(p, G, group, check_of(shared, plan.stacked), first)
        if exchanged and not self.mode.gradient_accumulation:
            lows, norm2 = exchange.average_projected(lows, G, norm2, plan)
        return Arrived(lows, norm2, norm2)

    def _apply(self, p: Tensor, arrived: Arrived, group: dict[str, Any], total2: Tensor | None = None) -> None:
        """Step `p`.

        Args:
            total2 (`torch.Tensor`, *optional*): Squared norm of all gradients, where it is known already.
        """
        gradient, R_norm2, stacked = arrived.gradient, arrived.norm2, self.steps.plan_of(p).stacked
        if self.mode.max_grad_norm is not None:
            # of a stack without its broken experts, which are skipped: the others must not be
            own2 = arrived.norm2.where(arrived.norm2.isfinite(), 0.0).sum() if stacked else arrived.norm2
            norm2 = {"parameter": own2, "previous_norm": self.clip_norm2, "norm": total2}[str(self.mode.clipping)]
            # Where there is none (at the first step no previous one, or another gradient is broken): each parameter by
            # its own, which is no less safe.
            norm2 = own2 if norm2 is None else norm2.to(own2)
            norm2 = torch.where(norm2.isfinite() & (norm2 > 0), norm2, own2)
            scale = clip_coefficient(norm2, self.mode.max_grad_norm)
            # of what is projected R and G alone: A goes with the gradient over its norm
            lows = [] if isinstance(gradient, Tensor) else [low for low in gradient if low is not None]
            for X in [gradient] if isinstance(gradient, Tensor) else [X for low in lows for X in (low.R, low.G)]:
                if X is not None:
                    X.mul_(scale)
            R_norm2 = R_norm2 * scale.square()
        norm_check = None if R_norm2 is arrived.energy else check_of(R_norm2, stacked)
        self.steps.apply(p, gradient, group, check_of(arrived.energy, stacked), norm_check)

    def finish(self, closure: object) -> None:
        """What is left for `step()`: to step with what was kept, and to note the norm."""
        self._refuse_to_finish(closure)
        self._check_processes()
        if self.optimizer.collect_statistics and not (self.mode.layerwise and self._norms2):
            self.steps.observations.clear()
        waiting = [
            (p, group, self._complete(p, window, group))
            for group in self.optimizer.param_groups
            for p in group["params"]
            if (window := self._window(p, group)) is not None
        ]
        self._norms2.update((p, arrived.norm2.sum()) for p, _, arrived in waiting)
        if self._norms2:
            norms2 = list(self._norms2.values())
            total2 = torch.stack([norm2.to(norms2[0]) for norm2 in norms2]).sum()
            for p, group, arrived in waiting:
                self._apply(p, arrived, group, total2)
            self.grad_norm2 = total2
            before = total2 if self.clip_norm2 is None else self.clip_norm2.to(total2)
            self.clip_norm2 = torch.where(total2.isfinite(), total2, before)
        self.discard()

    def _window(self, p: Tensor, group: dict[str, Any]) -> Window | None:
        """What waits for `step()`; with several processes, something does for every projected parameter."""
        window = self._windows.pop(p, None)
        if p.grad is not None:  # never taken: averaged by DDP, or set by hand
            refuse_unsupported(p.grad, self.steps.plan_of(p).name)
            window = window or Window()
            window.add_whole(p.grad)
        expected = group["rank"] is not None and p.requires_grad and p not in self._norms2
        if window is None and expected and exchange.world_size() > 1:
            window = Window()  # others may have used it, and wait
            window.add_whole(torch.zeros_like(p))
        return window

    def _complete(self, p: Tensor, window: Window, group: dict[str, Any]) -> Arrived:
        summed = self.mode.gradient_accumulation and exchange.world_size() > 1 and group["rank"] is not None
        if window.lows is None and window.G is not None and not summed:
            return self._arrive(p, window.G, group)
        if window.G is not None:
            arrived = self._arrive(p, window.G, group, window)
            window.add(arrived.gradient, arrived.energy)  # type: ignore[arg-type]
        if summed:
            window.average_()
        return window.arrived()

    def _refuse_to_finish(self, closure: object) -> None:
        if not self.attached:
            raise ValueError("The hooks of this optimizer have been removed: call `attach()` to train on.")
        if closure is not None:
            raise ValueError("A `closure` evaluates the model several times in a step, which this mode cannot undo.")
        if hasattr(self.optimizer, "grad_scale"):  # set by GradScaler.step
            raise ValueError(
                "A `GradScaler` (fp16) scales the loss, and the step has been made with scaled gradients before it "
                "could unscale them. Train in bf16, or without `layerwise` and `ddp_compression`."
            )

    def with_norm(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A state dict with the norm in its groups that the next step is clipped by."""
        if self.mode.clipping == "previous_norm":
            for group in saved["param_groups"]:
                group[CLIP_NORM2] = None if self.clip_norm2 is None else float(self.clip_norm2)
        return saved

    def set_norm(self, clip_norm2: float | None) -> None:
        """The norm that the next step is clipped by, as a state dict has it."""
        dtype = torch.promote_types(self.optimizer.param_groups[0]["params"][0].dtype, torch.float32)
        self.clip_norm2 = None if clip_norm2 is None else torch.tensor(clip_norm2, dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Hooks are not kept, only that they were there; nor gradients, as parameters do not keep theirs."""
        kept = {name: self.__dict__[name] for name in ("grad_norm2", "clip_norm2")}
        empty: dict[str, Any] = {"_handles": [], "_groups": {}, "_windows": {}, "_norms2": {}}
        return kept | empty | {"_was_attached": self.attached}

    def restore(self, optimizer: "OSD") -> None:
        """Belong to the copy of the optimizer; put the hooks on again if the original had them."""
        self._optimizer = weakref.ref(optimizer)
        if self.__dict__.pop("_was_attached", False):
            self.attach()


def release(params: Iterable[Tensor], keep: "OSD | None") -> None:
    """Take the hooks of all optimizers but `keep` off: those of a training that was interrupted would train on."""
    for p in params:
        owner = _OWNERS[p]() if p in _OWNERS else None
        if owner is not None and (keep is None or owner is not keep._stream):
            owner.remove()


def take_norm(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float | None]:
    """Saved groups without what `with_norm` put there, which belongs to no group, and that.

    The key stays, in every mode: a flattened state of `torch.distributed.checkpoint` is read by the live groups' keys.
    """
    norm2 = groups[0].get(CLIP_NORM2) if groups else None
    return [{**group, CLIP_NORM2: None} for group in groups], norm2


def _hook(stream: GradientStream) -> Callable[[Tensor], None]:
    # A parameter must not keep the optimizer alive, which keeps the parameter.
    reference = weakref.ref(stream)

    def hook(p: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive.on_gradient(p)

    return hook
