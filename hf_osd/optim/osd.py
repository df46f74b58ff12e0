"""`OSD`: Online Subspace Descent as an ordinary `torch.optim.Optimizer`."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..subspace import choose_side
from ..update_rules import RULES, GradientCheck, require_bitsandbytes
from . import options
from .experts import observe_matrices, project_matrices, step_matrices
from .gradients import check_gradients, refuse_unsupported
from .loading import match_state
from .param_step import step_full
from .plan import Plan, ProjectedPlan, Rules, given_projections, make_plan, names_of, resume_plan, rules_of
from .rounding import refuse_without_bfloat16
from .state import create_state


class OSD(torch.optim.Optimizer):
    """Online Subspace Descent (Liang et al. 2024, [arXiv 2408.12857](https://huggingface.co/papers/2408.12857)).

    Groups with a `rank` keep their moments in a subspace of that rank for each weight, which learns by one step of
    online PCA at every step (Algorithm 1); the parameters of the other groups get the same weight rule at full size.
    Every option below may also be given per group. Nothing is read back to the host in a step, except at a
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
            `online_pca` (the paper), `svd` (periodic, GaLore) or `static`.
        alpha (`float`, *optional*, defaults to 5.0): P's learning rate is `alpha * lr`. The paper's default.
        lambda_ (`float`, *optional*, defaults to 0.1): Weight of the orthogonality term in Eq. 6. The paper's default.
        scale (`float`, *optional*, defaults to 1.0): Factor on the projected update. The paper's text has none.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled weight decay.
        projection_lr (`float`, *optional*):
            P's learning rate at the initial `lr`, instead of `alpha`; it follows `lr`'s schedule.
        projection_weight_decay (`float`, *optional*): P's decay; defaults to `weight_decay` (remark of Algorithm 1).
        betas (`tuple[float, float]`, *optional*):
            For AdamW and Lion, in both roles; defaults to (0.9, 0.999) and (0.9, 0.99).
        eps (`float`, *optional*): For AdamW, in both roles; defaults to 1e-8.
        momentum (`float`, *optional*): For SGD, in both roles; defaults to 0.9.
        init (`str`, `Sequence[torch.Tensor]` or `Mapping[str, torch.Tensor]`, *optional*, defaults to `"auto"`):
            P_0: `svd` or `randomized_svd` of the parameter's first gradient that is not zero, `orthonormal` (seeded),
            or tensors: one for each parameter of the group, or by parameter name. `auto` is `svd` for small matrices
            and `randomized_svd` for large ones ([`~subspace.choose_init`]).
        side (`str`, *optional*, defaults to `"auto"`): `left`, `right`, or the shorter dimension.
        update_interval (`int`, *optional*): Steps between SVDs with `subspace="svd"`; defaults to 200 (GaLore).
        projection_dtype (`str`, *optional*):
            How P is kept, `float32` or `bfloat16`; defaults to float32 (float64 for float64 parameters). In bfloat16
            steps of P below about 1/256 of an entry are lost.
        moment_dtype (`str`, *optional*): How the weights' moments are kept, likewise; not for 8-bit rules.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Whether bfloat16 weights are rounded at random, so that steps too small for them add up, not vanish.
        seed (`int`, *optional*, defaults to 0): Seed of all that is random, the same on all processes.
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
        subspace: str = "online_pca",
        alpha: float = 5.0,
        lambda_: float = 0.1,
        scale: float = 1.0,
        weight_decay: float = 0.0,
        projection_lr: float | None = None,
        projection_weight_decay: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        momentum: float | None = None,
        init: str | Sequence[Tensor] | Mapping[str, Tensor] = "auto",
        side: str = "auto",
        update_interval: int | None = None,
        projection_dtype: str | None = None,
        moment_dtype: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        partial_load: bool = False,
        maximize: bool = False,
    ):
        if maximize:
            raise ValueError("OSD has no `maximize`: P learns from the loss's own gradients. Negate the loss instead.")
        given = locals()
        defaults = {name: given[name] for name in options.DEFAULTS} | {"lr": lr}
        self._reset_derived()
        self._given_projections: dict[Tensor, Tensor] = {}
        self._clipped: list[str] = []
        self._constructed = False
        self.partial_load = partial_load
        self.collect_statistics = False
        super().__init__(params, defaults)
        if all(group["rank"] is None for group in self.param_groups):
            options.refuse_without_rank(defaults)
        refuse_without_bfloat16(self.param_groups)  # in any group: only now are they all known
        self._constructed = True
        self._warn_clipped()
        # Groups have taken their own by now; tensors are not for `defaults`, which is printed and pickled.
        if not isinstance(init, str):
            self.defaults["init"] = "auto"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the optimizer's options where it has none of its own."""
        extra = set(param_group) - {"params", "param_names", "lr", "initial_lr", "name"}
        options.refuse_unknown(extra, options.DEFAULTS, "a parameter group")
        super().add_param_group(param_group)
        group, position = self.param_groups[-1], len(self._params()) - len(self.param_groups[-1]["params"])
        try:
            self._settle(group, position)
            if self._constructed:
                refuse_without_bfloat16(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        self._reset_derived()

    def _settle(self, group: dict[str, Any], position: int) -> None:
        """Validate a new group and store in it what is decided once: primitives only."""
        where = f"parameter group {len(self.param_groups) - 1}"
        options.check_lr(group["lr"], where)
        options.validate(group, where)
        if any(RULES[rule].eight_bit for rule in (group["weight_rule"], options.projection_rule(group)) if rule):
            require_bitsandbytes()
        names = names_of(group, position)
        given, is_default = group["init"], group["init"] is self.defaults["init"]
        if not isinstance(given, str):
            group["init"] = "given"
        if group["rank"] is None:
            if not isinstance(given, str) and not is_default:
                raise ValueError(f"`init` of {where} has no effect without a `rank`.")
            return
        for name, p in zip(names, group["params"], strict=True):
            if p.ndim not in (2, 3):
                raise ValueError(
                    f"{name} has shape {tuple(p.shape)} and cannot be projected: only matrices can, and stacks of "
                    "them such as experts' weights. Put it into a group without `rank`."
                )
        group["sides"] = [choose_side(p.shape[-2], p.shape[-1], group["side"]) for p in group["params"]]
        group["alpha"] = options.projection_alpha(group, group["lr"])
        self._clipped += [
            name for name, p in zip(names, group["params"], strict=True) if group["rank"] >= min(p.shape[-2:])
        ]
        if not isinstance(given, str):
            self._given_projections |= given_projections(given, group, names, position)

    def _warn_clipped(self) -> None:
        """Say once, for all matrices, that their rank is not low."""
        if self._clipped:
            warnings.warn(
                f"`rank` is not below min(m, n) for {len(self._clipped)} matrices: they are projected at full rank, "
                f"which saves no memory. Choose a smaller rank or leave them out: {', '.join(self._clipped[:3])}"
                f"{' ...' if len(self._clipped) > 3 else ''}.",
                stacklevel=3,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure (`Callable`, *optional*): Evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.collect_statistics:
            self._observations.clear()
        work = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, G, _ in work:
            refuse_unsupported(G, self.plan_of(p).name)
        stacked = [self.plan_of(p).stacked for p, _, _ in work]
        checks = check_gradients([G for _, G, _ in work], stacked)
        rules = {id(group): rules_of(group) for group in self.param_groups}
        for (p, G, group), check in zip(work, checks, strict=True):
            self._step_param(p, G, group, rules[id(group)], check)
        return loss

    def _step_param(self, p: Tensor, G: Tensor, group: dict[str, Any], rules: Rules, check: GradientCheck) -> None:
        plan, state = self.plan_of(p), self.state[p]
        if not state:
            state.update(create_state(p, plan, rules))
        state["skipped_steps"].add_(check.broken)
        if not isinstance(plan, ProjectedPlan):
            step_full(p, G, state, group, plan, rules, check)
            return
        lows = project_matrices(G, state, group, plan, rules, check, self._given_projections.get(p))
        if plan.complete:
            self._given_projections.pop(p, None)  # copied into the state: not kept twice
        seen = observe_matrices(lows, state, plan, check) if self.collect_statistics else None
        if seen is not None:
            self._observations[p] = seen
        step_matrices(p, lows, state, group, plan, rules, check)

    def statistics(self) -> dict[str, float]:
        """What the last step with `collect_statistics = True` saw, read from the device in one transfer.

        Returns:
            `dict[str, float]`: `pca_loss`, mean share of the gradients' energy outside their subspaces, and
            `orthogonality`, mean ||PᵀP - I|| / sqrt(r), where a step was observed; `skipped_steps`, the number of
            parameter steps skipped for a gradient that was not finite, since the state began.
        """
        skipped = [state["skipped_steps"] for state in self.state.values() if "skipped_steps" in state]
        if not skipped:
            return {}
        device, seen = skipped[0].device, list(self._observations.values())
        values = {"skipped_steps": torch.stack([value.to(device).sum() for value in skipped]).sum()}
        for i, name in enumerate(("pca_loss", "orthogonality")):
            if seen:
                # not a number where the gradient was broken: that step was skipped and shows nothing
                values[name] = torch.cat([pair[i].to(device, torch.float32).reshape(-1) for pair in seen]).nanmean()
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state exactly: dtypes as saved, on the parameters' devices.

        Raises:
            ValueError: If it was saved with other rules, ranks, sides or targets, with a table of what differs (unless
                `partial_load`), or if an entry does not fit; nothing is changed then.
        """
        # torch's loader casts every entry but `step` to the parameter's dtype: P and 8-bit codes would be lost.
        # So it loads the groups alone, and the state is set here.
        state, groups = match_state(self.param_groups, state_dict, self.partial_load)
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(state)
        self._reset_derived()

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and deepcopy keep: everything that cannot be derived."""
        kept = ("_given_projections", "_clipped", "_constructed", "partial_load", "collect_statistics")
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and forget what was derived."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("stochastic_rounding", False)  # saved before there was the option
        self._reset_derived()

    def _reset_derived(self) -> None:
        self._plans: dict[Tensor, Plan] = {}
        self._observations: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def plan_of(self, p: Tensor) -> Plan:
        """How `p` is stepped: its side, rank and shapes. Read it, do not change it."""
        # Parameters may be exchanged behind the optimizer's back (accelerate's FSDP2 path does), so plans are made
        # when a parameter is first met, and read the state, which may have been loaded, at that moment only.
        if p not in self._plans:
            position = 0
            for group in self.param_groups:
                for index, other in enumerate(group["params"]):
                    if other not in self._plans:
                        plan = make_plan(group, index, other, position)
                        self._plans[other] = resume_plan(plan, self.state.get(other))
                    position += 1
        return self._plans[p]
