"""`OSD`: Online Subspace Descent as an ordinary `torch.optim.Optimizer`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..subspace import SubspaceRule
from .arrival.stream import CLIP_NORM2, GradientStream, take_norm
from .groups import refuse_same_names, settle_group, warn_clipped
from .loading import match_state
from .options import table as options
from .options.mode import MODE_DEFAULTS, Mode, refuse_without_projection
from .statistics import summarize
from .step.gradients import check_gradients
from .step.movement import Movements
from .step.plan import Plan, ProjectedPlan
from .step.rounding import refuse_without_bfloat16
from .step.weights import ParameterSteps


class OSD(torch.optim.Optimizer):
    """Online Subspace Descent (Liang et al. 2024, [arXiv 2408.12857](https://huggingface.co/papers/2408.12857)).

    Groups with a `rank` keep their moments in a subspace of that rank for each weight, which learns by one step of
    online PCA at every step (Algorithm 1); the parameters of the other groups get the same weight rule at full size.
    Every option up to `seed` may also be given per group. Nothing is read back to the host in a step, except at a
    parameter's first one and where `subspace="svd"` computes an SVD.

    A gradient that is not finite never enters the state: that parameter's step is skipped, and counted in
    `statistics`. Weight decay is decoupled and acts in the full space.

    Args:
        params (`Iterable`): Parameters, (name, parameter) pairs, or groups of either.
        lr (`float`, *optional*, defaults to 1e-3): Learning rate of the weights.
        rank (`int`, *optional*):
            r. Groups without it are updated at full size; parameters of groups with it must be matrices (m, n), or
            stacks (E, m, n) of experts' matrices, of which each is projected by itself and left alone in steps in
            which its gradient is zero. Clipped to min(m, n), with one warning.
        weight_rule (`str`, *optional*, defaults to `"adamw"`):
            One of `adamw`, `adamw8bit`, `lion`, `lion8bit`, `adafactor`, `sgd`.
        projection_rule (`str`, *optional*): Likewise for P; defaults to `weight_rule` (Algorithm 1).
        subspace (`str`, *optional*, defaults to `"online_pca"`):
            How P moves: `online_pca` (the paper), `svd` (periodic, GaLore), `random`, `cosine`, `importance`, `power`,
            `static`, or a [`SubspaceRule`] of your own.
        alpha (`float`, *optional*, defaults to 5.0): P's learning rate is `alpha * lr`. The paper's default.
        lambda_ (`float`, *optional*, defaults to 0.1): Weight of the orthogonality term in Eq. 6. The paper's default.
        scale (`float`, *optional*, defaults to 1.0): Factor on the projected update. The paper's text has none.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled weight decay.
        projection_lr (`float`, *optional*):
            P's learning rate at the initial `lr`, instead of `alpha`; it follows `lr`'s schedule.
        projection_schedule (`str`, *optional*): `lr`, the default, or `constant`: P's learning rate stays what it is.
        projection_weight_decay (`float`, *optional*): P's decay; defaults to `weight_decay` (remark of Algorithm 1).
        betas (`tuple[float, float]`, *optional*):
            For AdamW and Lion, in both roles; defaults to (0.9, 0.999) and (0.9, 0.99).
        eps (`float`, *optional*): For AdamW, in both roles; defaults to 1e-8.
        momentum (`float`, *optional*): For SGD, in both roles; defaults to 0.9.
        init (`str`, `Sequence[torch.Tensor]` or `Mapping[str, torch.Tensor]`, *optional*, defaults to `"auto"`):
            P_0: `svd` or `randomized_svd` of the parameter's first gradient that is not zero, `orthonormal` (seeded),
            or tensors: one for each parameter of the group, or by parameter name. `auto` is `svd` for small matrices
            and `randomized_svd` for large ones ([`~subspace.choose_init`]).
        side (`str`, *optional*, defaults to `"auto"`):
            `left`, `right`, the shorter (if sharded: whole) dimension, or `two_sided` (paper 4.3: moments are r x r).
        update_interval (`int`, *optional*):
            Steps between new P with `svd`, `random`, `cosine` and `importance`; defaults to 200 (GaLore).
        projection_interval (`int`, *optional*): Steps between moves of P with `online_pca` and `power`; defaults to 1.
        distribution (`str`, *optional*): For `random`: `orthonormal`, the default, or `gaussian`.
        mixing (`float`, *optional*): For `power`: share of the momentum; defaults to 0.9.
        carry_moments (`bool`, *optional*, defaults to `False`):
            Whether moments are turned into the new basis when P moves (LDAdam, arXiv 2410.16103). It helps where P is
            drawn from gradients often: `power`, and `svd` at short intervals.
        residual (`str`, *optional*, defaults to `"none"`):
            What becomes of the gradient outside the subspace: `none` (the paper), `scaled` (Fira, arXiv 2410.01673)
            or `sign` (FRUGAL, arXiv 2411.07837). See [`~optim.step.residual`].
        residual_scaling (`str`, *optional*): For `scaled`: by `column` (the default), or by `matrix`.
        residual_limit (`float`, *optional*):
            For `scaled`: largest growth of the residual's norm in a step, 0 for no limit; defaults to 1.01 (Fira).
        residual_scale (`float`, *optional*, defaults to 1.0): Factor on the residual.
        projection_dtype (`str`, *optional*):
            How P is kept, `float32` or `bfloat16`; defaults to float32 (float64 for float64 parameters). In bfloat16
            steps of P below about 1/256 of an entry are lost.
        moment_dtype (`str`, *optional*): How the weights' moments are kept, likewise; not for 8-bit rules.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Whether bfloat16 weights are rounded at random, so that steps too small for them add up, not vanish.
        seed (`int`, *optional*, defaults to 0): Seed of all that is random, the same on all processes.
        layerwise (`bool`, *optional*, defaults to `False`):
            Step each parameter as soon as the backward pass has completed its gradient, and free that. `step` then
            only ends the step; a `closure` is refused, and so is a `GradScaler`, whose scale nothing could undo.
        layerwise_clipping (`str`, *optional*):
            How `max_grad_norm` clips where all gradients are never there at once: `parameter`, each parameter by its
            own norm, or `previous_norm`, all by the norm of the step before (at the first step each by its own).
            Defaults to `previous_norm`, which a log line then says.
        max_grad_norm (`float`, *optional*):
            Clip gradients, with `layerwise` or `ddp_compression`; elsewhere use `clip_grad_norm_`.
        gradient_accumulation (`bool`, *optional*, defaults to `False`):
            With `layerwise`, that several backward passes come before a `step`, which then steps. What is projected
            adds up R, and P learns from each micro-batch; P_0 and SVDs are made from the first. What is not adds up
            its gradient. Norms are estimated ([`~optim.arrival.exchange.norm_stand_in`]).
        ddp_compression (`str`, *optional*):
            `subspace`: average over data-parallel processes r (m + n) numbers of a projected gradient, not m n; those
            that make a P whole. Norms are estimated likewise. All processes must use the same parameters; one that no
            process has used is stepped with a gradient of zero, as if it had been. DDP must leave what is projected:
            [`create_osd_optimizer`], called before the model is wrapped, and Trainer tell it.
        partial_load (`bool`, *optional*, defaults to `False`):
            Whether `load_state_dict` starts parameters anew that the saved state does not fit, instead of refusing.
        maximize (`bool`, *optional*, defaults to `False`): Not supported: negate the loss.

    Raises:
        ValueError: For an option that is unknown, out of range or without effect, for a projected parameter that is
            neither a matrix nor a stack of them, and at a step for sparse and complex gradients.

    Example:
    ```python
    >>> import torch
    >>> from hf_osd import OSD

    >>> linear = torch.nn.Linear(64, 32)
    >>> optimizer = OSD([{"params": [linear.weight], "rank": 8}, {"params": [linear.bias]}], lr=1e-3)
    >>> linear(torch.randn(4, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.state[linear.weight]["projection"].shape
    torch.Size([32, 8])

    ```
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        rank: int | None = None,
        weight_rule: str = "adamw",
        projection_rule: str | None = None,
        subspace: str | SubspaceRule = "online_pca",
        alpha: float = 5.0,
        lambda_: float = 0.1,
        scale: float = 1.0,
        weight_decay: float = 0.0,
        projection_lr: float | None = None,
        projection_schedule: str | None = None,
        projection_weight_decay: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        momentum: float | None = None,
        init: str | Sequence[Tensor] | Mapping[str, Tensor] = "auto",
        side: str = "auto",
        update_interval: int | None = None,
        projection_interval: int | None = None,
        distribution: str | None = None,
        mixing: float | None = None,
        carry_moments: bool = False,
        residual: str = "none",
        residual_scaling: str | None = None,
        residual_limit: float | None = None,
        residual_scale: float = 1.0,
        projection_dtype: str | None = None,
        moment_dtype: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        layerwise: bool = False,
        layerwise_clipping: str | None = None,
        max_grad_norm: float | None = None,
        gradient_accumulation: bool = False,
        ddp_compression: str | None = None,
        partial_load: bool = False,
        maximize: bool = False,
    ):
        if maximize:
            raise ValueError("OSD has no `maximize`: P learns from the loss's own gradients. Negate the loss instead.")
        given = locals()
        defaults = {name: given[name] for name in options.DEFAULTS} | {"lr": lr}
        self.mode = Mode(**{name: given[name] for name in MODE_DEFAULTS})
        self._stream: GradientStream | None = None
        self._reset_derived()
        self._given_projections: dict[str, Tensor] = {}
        self._clipped: list[str] = []
        self._constructed = False
        self.partial_load = partial_load
        self.collect_statistics = False
        super().__init__(params, defaults)
        if all(group["rank"] is None for group in self.param_groups):
            options.refuse_without_rank(defaults)
            refuse_without_projection(self.mode)
        refuse_without_bfloat16(self.param_groups)  # in any group: only now are they all known
        self._constructed = True
        warn_clipped(self._clipped)
        self._simplify_defaults()
        if self.mode.takes_gradients:
            self._stream = GradientStream(self)
            self._stream.attach()

    def _simplify_defaults(self) -> None:
        """Leave in `defaults` what printing, pickling and schedulers may see: groups have taken the rest by now."""
        if not isinstance(self.defaults["init"], str):
            self.defaults["init"] = "auto"
        self.defaults["subspace"] = str(self.defaults["subspace"])
        for name in ("betas", "momentum"):
            if self.defaults[name] is None:  # each rule's own: nothing that OneCycleLR could cycle
                del self.defaults[name]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # What `GradScaler.step` asks: it then tells `step` its scale, which is how the stream can refuse it.
        return self._stream is not None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the optimizer's options where it has none of its own."""
        own = set(param_group) - {"params", "param_names", "lr", "initial_lr", "name"}
        options.refuse_unknown(own, options.DEFAULTS, "a parameter group")
        # A copy, for what is settled here is this optimizer's: the same dictionary can make another one.
        shared = options.DEFAULTS | self.defaults
        super().add_param_group(shared | param_group)
        group, where = self.param_groups[-1], f"parameter group {len(self.param_groups) - 1}"
        position = sum(len(other["params"]) for other in self.param_groups[:-1])
        try:
            refuse_same_names(self.param_groups)
            options.refuse_own_without_rank(group, own, shared, where)
            given, clipped = settle_group(group, where, position, self.mode)
            if self._constructed:
                refuse_without_bfloat16(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        group[CLIP_NORM2] = None
        self._given_projections |= given
        self._clipped += clipped
        self._reset_derived()
        if self._stream is not None and self._stream.attached:
            self._stream.attach()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; in a mode that takes them, those that still wait.

        Args:
            closure (`Callable`, *optional*): Evaluates the model again and returns the loss.
        """
        loss = None
        if self._stream is not None:
            self._stream.finish(closure)
            return None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = self._steps
        if self.collect_statistics:
            steps.observations.clear()
        work = steps.gradients()
        plans = [self.plan_of(p) for p, _, _ in work]
        stacked, shardings = [plan.stacked for plan in plans], [plan.sharding for plan in plans]
        checks = check_gradients([G for _, G, _ in work], stacked, shardings)
        movements = Movements()
        try:
            for (p, G, group), plan, check in zip(work, plans, checks, strict=True):
                gradient = steps.project(p, G, group, check) if isinstance(plan, ProjectedPlan) else G
                steps.apply(p, gradient, group, check, movements=movements)
        finally:  # where one cannot be stepped, the others before it have made whole steps
            movements.finish()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those that have been taken off the parameters as well."""
        super().zero_grad(set_to_none)
        if self._stream is not None:
            self._stream.discard()

    def attach(self) -> None:
        """Put the hooks of `layerwise` or `ddp_compression` on the parameters again, after `remove`."""
        if self._stream is not None:
            self._stream.attach()

    def remove(self) -> None:
        """Take the hooks off: gradients stay on the parameters again, as in any model, and `step` is refused."""
        if self._stream is not None:
            self._stream.remove()

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step before clipping, in a mode that takes them off the parameters."""
        norm2 = None if self._stream is None else self._stream.grad_norm2
        return None if norm2 is None else norm2.sqrt()

    def statistics(self) -> dict[str, float]:
        """What the last step with `collect_statistics = True` saw, read from the device in one transfer.

        Returns:
            `dict[str, float]`: `pca_loss`, mean share of the gradients' energy outside their subspaces, and
            `orthogonality`, mean ||PᵀP - I|| / sqrt(r), where a step was observed; `skipped_steps`, the number of
            parameter steps skipped for a gradient that was not finite, since the state began.
        """
        return summarize(self.state.values(), list(self._steps.observed().values()))

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer; the norm that `previous_norm` clips by is in the groups."""
        saved = super().state_dict()
        return saved if self._stream is None else self._stream.with_norm(saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state exactly: dtypes as saved, on the parameters' devices.

        Raises:
            ValueError: If it was saved with other rules, ranks, sides or targets, with a table of what differs (unless
                `partial_load`), or if an entry does not fit; nothing is changed then.
        """
        # torch's loader casts every entry but `step` to the parameter's dtype: P and 8-bit codes would be lost.
        # So it loads the groups alone, and the state is set here.
        self._steps.make_plans()  # which settles the sides of parameters that were sharded since
        state, groups = match_state(self.param_groups, state_dict, self.partial_load)
        groups, clip_norm2 = take_norm(groups)
        super().load_state_dict({"state": {}, "param_groups": groups})
        if self._stream is not None:
            self._stream.set_norm(clip_norm2)
        self.state.update(state)
        self._reset_derived()

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and deepcopy keep: everything that cannot be derived."""
        kept = "_given_projections _clipped _constructed partial_load collect_statistics mode _stream".split()
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and forget what was derived."""
        super().__setstate__(state)  # torch's `load_state_dict` comes by here too, with state and groups alone
        for name, default in (("mode", Mode()), ("_stream", None)):
            self.__dict__.setdefault(name, default)  # saved before there were modes
        for group in self.param_groups:
            for name, default in options.DEFAULTS.items():
                group.setdefault(name, default)  # saved before there was the option
        self._reset_derived()
        if state.get("_stream") is not None:
            state["_stream"].restore(self)

    def _reset_derived(self) -> None:
        self._steps = ParameterSteps(self)

    def plan_of(self, p: Tensor) -> Plan:
        """How `p` is stepped: its side, rank and shapes. Read it, do not change it."""
        return self._steps.plan_of(p)


def osd_of(optimizer: Any) -> OSD | None:
    """The [`OSD`] that this optimizer is or, in accelerate's wrapper, holds; `None` for any other."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer if isinstance(optimizer, OSD) else None
