"""`OSD`: Online Subspace Descent as an ordinary `torch.optim.Optimizer`."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..declare import plain
from ..layers import CHILD, PreparedLayers
from ..subspace import SubspaceRule
from ..subspace.precision import own_precision
from .arrival.clipping import CLIP_NORM2
from .arrival.hooks import release
from .arrival.stream import GradientStream
from .groups import (
    divided,
    named,
    refuse_ignored,
    refuse_same_names,
    refuse_unprepared,
    refuse_without_movement,
    settle_group,
    warn_clipped,
    warn_far,
    with_plain_names,
)
from .options import table as options
from .options.asked import Asked
from .options.mode import MODE_DEFAULTS, Mode
from .saving import STAND_INS, SavedOptimizer
from .statistics import share_observations, summarize
from .step.capture import check_capture
from .step.divided import DividedMovements, with_projections
from .step.empty_step import only_make_states
from .step.input_weight import InputWeight
from .step.layer_weights import LayerWeights
from .step.movement import Movements
from .step.rounding import refuse_without_bfloat16
from .step.sides import is_matrix
from .step.streams import SideStreams
from .step.weights import AnyWeight, Weights


class OSD(SavedOptimizer):
    """Online Subspace Descent (Liang et al. 2024, [arXiv 2408.12857](https://huggingface.co/papers/2408.12857)).

    Groups with a `rank` keep their moments in a subspace of that rank for each weight, which learns by one step of
    online PCA at every step (Algorithm 1); the parameters of the other groups get the same weight rule at full size.
    Every option before `layerwise` may also be given per group. Nothing is read back to the host in a step, except at
    a parameter's first one and where `subspace="svd"` computes an SVD.

    A gradient that is not finite never enters the state: that parameter's step is skipped, and counted in
    `statistics`. Weight decay is decoupled and acts in the full space.

    Args:
        params (`Iterable`): Parameters, (name, parameter) pairs, or groups of either.
        lr (`float` or `torch.Tensor`, *optional*, defaults to 1e-3): Learning rate; a tensor with `capturable`.
        rank (`int`, *optional*):
            Rank r of the subspaces. It is for matrices (m, n), and stacks (E, m, n) of experts' matrices, of which
            each is projected by itself and left alone in steps in which its gradient is zero. Parameters of other
            dimensions are updated at full size (in a group that has a `rank` of its own they are refused), and so are
            groups without it. Clipped to min(m, n), with one warning. Without a model, embeddings and heads are
            matrices like others, and the weight of a Conv1d is a stack: `create_osd_optimizer` leaves them at full
            size.
        weight_rule (`str`, *optional*, defaults to `"adamw"`):
            Update rule of the weights: `adamw`, `adamw8bit`, `lion`, `lion8bit`, `adafactor`, `sgd`.
        source (`str`, *optional*, defaults to `"gradients"`):
            What R and P are made of: `gradients`, or `activations`, with which gradients of projected linear layers
            never exist. The layers make R in the backward pass, and P learns from their inputs, one P for those that
            are given the same. For `online_pca`, `power`, `random` and `static`. [`create_osd_optimizer`] and Trainer
            prepare the model for it. What cannot be prepared goes by gradients. Norms and clipping are those of what
            the layers make.
        subspace (`str` or `SubspaceRule`, *optional*, defaults to `"online_pca"`):
            How P moves: `online_pca`, `svd`, `random`, `cosine`, `importance`, `power`, `static`. Or a
            [`SubspaceRule`] of your own.
        alpha (`float`, *optional*, defaults to 5.0): P's learning rate over the weights' (the paper's default).
        projection_rule (`str`, *optional*):
            Update rule of P: `adamw`, `adamw8bit`, `lion`, `lion8bit`, `adafactor`, `sgd` (every pair of the paper's
            Table 6). Defaults to the weights' own.
        projection_lr (`float`, *optional*):
            P's learning rate at the initial learning rate, instead of `alpha`; it follows the schedule, and has the
            weights' multiples.
        projection_weight_decay (`float`, *optional*):
            P's decoupled decay (remark of Algorithm 1). Defaults to the weights' own.
        scale (`float` or `str`, *optional*, defaults to 1.0):
            Factor on the projected update (GaLore's 0.25; the paper's text has none), or `auto`: sqrt(s/r) of each
            weight, s its projected dimension, by which updates have the root mean square of those at full size. On
            both sides sqrt(m n)/r. The residual is scaled by it, too; signs, whose size is AdamW's, not by `auto`.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled weight decay.
        init (`str` or `Sequence[Tensor]` or `Mapping[str, Tensor]`, *optional*, defaults to `"auto"`):
            P's start: `svd` or `randomized_svd` of the first gradient, `auto`: one of them by size, `orthonormal`, or
            a saved P. That is tensors here: one for each parameter of the group, or by parameter name. See
            [`~subspace.choose_init`].
        side (`str`, *optional*, defaults to `"auto"`):
            Projected dimension: `left`, `right`, `auto`: the shorter (if sharded: whole) one, or `two_sided` (P X Q of
            the paper's section 4.3, whose moments are r x r).
        carry_moments (`bool`, *optional*, defaults to `False`):
            Turn moments into the new basis when P moves (LDAdam, arXiv 2410.16103). It helps where P is drawn from
            gradients often: `power`, and `svd` at short intervals.
        restart_moments (`bool`, *optional*, defaults to `False`):
            Start moments and their bias correction anew with each new P (RSO, arXiv 2502.07222).
        residual (`str`, *optional*, defaults to `"none"`):
            The gradient outside the subspace: `none` drops it (the paper), `scaled` adds it in the scale of the inside
            (Fira, arXiv 2410.01673), `sign` adds its sign (FRUGAL, arXiv 2411.07837). From activations it is of some
            columns at a time (`residual_sample`), and only `sign` goes. See [`~optim.step.residual`].
        residual_scale (`float`, *optional*, defaults to 1.0): Factor on the residual.
        residual_sample (`int`, *optional*, defaults to 4):
            With `source=activations` the residual is of one column of the gradient in `residual_sample`, others at
            each step. The fewer, the less is computed, kept of the inputs and exchanged for them. Steps in them are
            sqrt(residual_sample) times as long: the root mean square of all is the same.
        projection_sample (`int`, *optional*):
            P learns of one in `projection_sample` parts of the gradient, another at each step. Defaults to 4, and 1
            with `power` on gradients and two-sided. They are blocks of the rows of G (the columns, where P is on its
            left), or tokens of the activations. A, the only product that is there for P alone, costs as much less, and
            is without bias the same.
        projection_dtype (`str`, *optional*):
            How P is kept: `float32`, `bfloat16`, or `int8` with a scale for each row. Defaults to `float32`. In less
            than float32 P is rounded at random, so that small steps add up. Float64 parameters have float64 unless
            told.
        weight_dtype (`str`, *optional*):
            How projected weights are kept: `int8`, with a scale for each row, stepped by stochastic rounding
            (Q-GaLore, arXiv 2407.08296, keeps them so). Defaults to the model's own. They are read in the dtype that
            they had, for one layer at a time, and saved in it.
        moment_dtype (`str`, *optional*):
            How the weights' moments are kept: `float32` or `bfloat16`; second moments, which could never fall in
            bfloat16, in float32. Defaults to `float32`.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Round bfloat16 weights at random: steps too small for them add up instead of vanishing.
        seed (`int`, *optional*, defaults to 0): Seed of random P and rounding, the same on all processes.
        projection_interval (`int`, *optional*):
            Steps between moves of P: a step in between costs no product for P. For `online_pca` and `power`. Defaults
            to 1.
        lambda_ (`float`, *optional*):
            Weight of the orthogonality term of the PCA loss, Eq. 6 (the paper's default). For `online_pca`. Defaults
            to 0.1.
        update_interval (`int`, *optional*):
            Steps between new P (GaLore's `update_proj_gap` and its default). For `svd`, `random`, `cosine` and
            `importance`. Defaults to 200.
        distribution (`str`, *optional*):
            `orthonormal` columns, uniform over all subspaces (GoLore), or `gaussian` entries N(0, 1/s) (Flora). For
            `random`. Defaults to `orthonormal`.
        unbiased (`bool`, *optional*):
            Make P longer by sqrt(s/r), so that E[P Pᵀ] = I (RSO). For `random`. Defaults to false.
        mixing (`float`, *optional*):
            Share of the momentum in what P follows, rho (Adam's beta1; LDAdam's is 0.908). For `power`. Defaults to
            0.9. 0 looks at the last gradient alone, and is the only choice with rules that keep no first moment.
        betas (`tuple[float, float]`, *optional*):
            Decay rates of the moments, in both roles. For `adamw`, `adamw8bit`, `lion` and `lion8bit`. Defaults to
            (0.9, 0.999) with `adamw` and `adamw8bit`, (0.9, 0.99) with `lion` and `lion8bit`. Where the rules of W and
            P have other default ones, schedules such as `OneCycleLR` cycle those that are given.
        eps (`float`, *optional*):
            Added to the root of the second moment, in both roles. For `adamw` and `adamw8bit`. Defaults to 1e-08.
        momentum (`float`, *optional*):
            Decay of SGD's momentum, in both roles; 0 keeps no state. For `sgd`. Defaults to 0.9.
        layerwise (`bool`, *optional*, defaults to `False`):
            Step each parameter as soon as the backward pass has completed its gradient, and free that. `step` then
            only ends the step; a `GradScaler` is refused, whose scale nothing could undo.
        layerwise_clipping (`str`, *optional*):
            How `max_grad_norm` clips when layerwise: by `previous_norm`, the norm of the step before (at the first
            step each parameter by its own), or by `parameter`, each by its own. Defaults to `previous_norm`.
        max_grad_norm (`float`, *optional*): Norm that gradients are clipped to, with `layerwise`.
        gradient_accumulation (`bool`, *optional*, defaults to `False`):
            With `layerwise`: several backward passes come before a `step`, which then steps. What is projected adds up
            R, and P learns from each micro-batch; P_0 and SVDs are made from the first. What is not adds up its
            gradient. Norms are estimated ([`~optim.arrival.window.norm_stand_in`]).
        capturable (`bool`, *optional*, defaults to `False`):
            A step can be captured in a CUDA graph: the device decides all that the host does otherwise. As torch's
            AdamW: make a few steps, then capture. A learning rate that is to change must be a float32 tensor on the
            parameters' device; each group has a copy, which schedules fill (by hand: `fill_` each group's `lr`).
            Uncaptured steps are slower for it: part of the gradient is copied (`projection_sample`). For `online_pca`
            and `static`.
        projection_stream (`bool`, *optional*, defaults to `False`):
            Move P on a CUDA stream of its own, beside the steps of the weights that follow (the paper's "executed in
            parallel with weight updates"). The step ends when both have ended. It may help where the GPU has more to
            do than the host, as in CUDA graphs; not measured yet.
        partial_load (`bool`, *optional*, defaults to `False`):
            Start parameters anew that a loaded checkpoint does not fit, instead of refusing it.
        divide_projection (`bool`, *optional*):
            Whether the processes among which FSDP2 or tensor parallelism divides a weight divide its P and the moments
            of that, too, by rows. Defaults to where that is possible. Then P is gathered where it is used and its
            gradient reduce-scattered, as FSDP2 does with weights, in buckets of many. Rules that need all of P to move
            it, or make it anew, keep it whole on every process: by default P is divided with `online_pca`, without
            `carry_moments`. With source='activations' the forward pass gathers it, too. A checkpoint goes on either
            way.
        maximize (`bool`, *optional*, defaults to `False`): Not supported: negate the loss.
        selection (`Sequence[dict]`, *optional*):
            Groups that differ in what is projected, which `params` are divided into. Trainer's own arguments have it.
        asked ([`~optim.options.asked.Asked`], *optional*): What a summary and a model card tell. Likewise.

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
        lr: float | Tensor = 1e-3,
        *,
        # options: written by `make options`
        rank: int | None = None,
        weight_rule: str = "adamw",
        source: str = "gradients",
        subspace: str | SubspaceRule = "online_pca",
        alpha: float = 5.0,
        projection_rule: str | None = None,
        projection_lr: float | None = None,
        projection_weight_decay: float | None = None,
        scale: float | str = 1.0,
        weight_decay: float = 0.0,
        init: str | Sequence[Tensor] | Mapping[str, Tensor] = "auto",
        side: str = "auto",
        carry_moments: bool = False,
        restart_moments: bool = False,
        residual: str = "none",
        residual_scale: float = 1.0,
        residual_sample: int = 4,
        projection_sample: int | None = None,
        projection_dtype: str | None = None,
        weight_dtype: str | None = None,
        moment_dtype: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        projection_interval: int | None = None,
        lambda_: float | None = None,
        update_interval: int | None = None,
        distribution: str | None = None,
        unbiased: bool | None = None,
        mixing: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        momentum: float | None = None,
        layerwise: bool = False,
        layerwise_clipping: str | None = None,
        max_grad_norm: float | None = None,
        gradient_accumulation: bool = False,
        capturable: bool = False,
        projection_stream: bool = False,
        partial_load: bool = False,
        divide_projection: bool | None = None,
        # end of options
        layers: PreparedLayers | None = None,
        maximize: bool = False,
        selection: Sequence[Mapping[str, Any]] | None = None,
        asked: Asked | None = None,
    ):
        if maximize:
            raise ValueError("OSD has no `maximize`: P learns from the loss's own gradients. Negate the loss instead.")
        given = locals()
        defaults = {name: given[name] for name in options.DEFAULTS} | {"lr": lr}
        self.mode = Mode(**{name: plain(given[name]) for name in MODE_DEFAULTS})
        self.partial_load = self.mode.partial_load
        self.asked = asked or Asked()
        self._given_projections: dict[str, Tensor] = {}
        self._uncycled: dict[str, Any] = {}  # defaults that `defaults` does not have
        self._clipped: list[str] = []
        self._stream: GradientStream | None = None
        self._layers = layers
        self._weights: Weights | None = None
        self._groups: list[dict[str, Any]] | None = None  # that they were made of
        self._constructed = False
        super().__init__(with_plain_names(params if selection is None else divided(params, selection, lr)), defaults)
        if all(group["rank"] is None for group in self.param_groups):
            options.refuse_without_rank(defaults)
        refuse_without_bfloat16(self.param_groups)  # in any group: only now are they all known
        refuse_without_movement(self.param_groups, self.mode)
        self._constructed = True
        warn_clipped(self._clipped)
        warn_far(self.param_groups)
        self._simplify_defaults()
        if layers is not None:
            self._own(layers)
        if self.mode.layerwise:
            self._stream = GradientStream(self._weights_now(), self.mode)
            self._stream.attach()
        release((p for group in self.trained_groups for p in group["params"]), keep=self._stream)

    def _own(self, layers: PreparedLayers) -> None:
        """Step what prepared layers make, from now on until this optimizer goes."""
        self._quantize(layers)
        self._add_stand_ins(layers)
        self._layer_weights.share_given()
        self.weights.let_go()
        self.attach()
        layers.owner = weakref.ref(self)
        weakref.finalize(self, layers.remove).atexit = False  # nobody else would step what the layers make
        if self.mode.layerwise:
            layers.meeting.late = not self.mode.gradient_accumulation

    def _quantize(self, layers: PreparedLayers) -> None:
        """Keep the weights of layers in the dtype that their groups say, one after the other."""
        self._weights = None  # which refers to parameters as they were
        for group in self.trained_groups:
            if group["weight_dtype"] is not None:
                layers.quantize(group["params"])

    def _add_stand_ins(self, layers: PreparedLayers) -> None:
        """A last group, never stepped and not in `state_dict`, so that what goes through groups finds all gradients.

        `GradScaler` unscales them so, and `zero_grad` frees them.
        """
        names = any("param_names" in group for group in self.param_groups)
        stand_ins: list[Any] = list(layers.parameters())
        if not stand_ins:  # nothing could be prepared
            return
        if names:
            stand_ins = [(f"{CHILD}.{key}", B) for key, B in layers.named_parameters()]
        own = {"params": stand_ins, "rank": None, STAND_INS: True}
        own |= {name: self.param_groups[0][name] for name in options.CYCLED}  # as schedules look for them
        super().add_param_group(options.DEFAULTS | self.defaults | own)

    def begin_loop(self) -> None:
        """From now on the model's parameters are those that it always has, but for stand-ins that have a gradient."""
        if self._layers is not None:
            self._layers.findable = False

    def _simplify_defaults(self) -> None:
        """Leave in `defaults` what printing, pickling and schedulers may see: groups have taken the rest by now."""
        if not isinstance(self.defaults["init"], str):
            self.defaults["init"] = "auto"
        self.defaults["subspace"] = str(self.defaults["subspace"])
        for name in options.CYCLED:  # a schedule looks for it, and is to cycle the weights' momentum, not P's alone
            if not all(options.has_cycled(group, name) for group in self.param_groups):
                self._uncycled[name] = self.defaults.pop(name)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # What `GradScaler.step` asks: it then tells `step` its scale, which is how that can refuse it.
        return self._stream is not None or self.mode.capturable

    @property
    def weights(self) -> Weights:
        """All weights as they are stepped; made anew where groups or states are other objects than before."""
        weights, groups = self._weights, self.__dict__["param_groups"]
        if weights is None or self._groups is not groups or weights.state is not self.state:
            observing = weights is not None and weights.observing
            if weights is not None and self._groups is groups:
                weights.meet()  # for it knows which parameters have been taken out of groups
            made_of = (
                self.trained_groups,
                self.state,
                self._given_projections,
                self.mode.divide_projection is not False,
            )
            weights = (
                Weights(*made_of, capturable=self.mode.capturable)
                if self._layers is None
                else LayerWeights(*made_of, self._layers)
            )
            self._weights, self._groups = weights, groups
            weights.observing = observing
        return weights

    @property
    def stream(self) -> GradientStream | None:
        """Hooks of `layerwise`; `None` in the ordinary mode."""
        return self._stream

    @property
    def layers(self) -> PreparedLayers | None:
        """Those that make R in the backward pass (`source="activations"`); `None` with `source="gradients"`."""
        return self._layers

    def weight_of(self, p: Tensor) -> AnyWeight:
        """How `p` is stepped: its side, rank and shapes are in `geometry`. Read it, do not change it."""
        return self.weights.of(p)

    @property
    def collect_statistics(self) -> bool:
        """Whether the coming step is observed, for `statistics`."""
        return self.weights.observing

    @collect_statistics.setter
    def collect_statistics(self, value: bool) -> None:
        self.weights.observing = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the optimizer's options where it has none of its own."""
        own = set(param_group)
        refuse_ignored(param_group)
        # A copy, for what is settled here is this optimizer's: the same dictionary can make another one.
        shared = options.DEFAULTS | self._uncycled | self.defaults
        group = named(param_group, self.trained_groups)
        super().add_param_group(shared | (with_plain_names([group])[0] if self._constructed else group))
        group, where = self.param_groups[-1], f"parameter group {len(self.param_groups) - 1}"
        if "rank" not in own and not any(map(is_matrix, group["params"])):
            group["rank"] = None
        position = sum(len(other["params"]) for other in self.trained_groups[:-1])
        try:
            refuse_same_names(self.param_groups)
            changed = options.changed_by(group, own, shared)
            options.refuse_own_without_rank(group, changed, where)
            refuse_unprepared(group, changed, where, self._layers)
            given, clipped = settle_group(group, where, position, self.mode, "rank" in own, self._layers)
            if self._constructed:
                refuse_without_bfloat16(self.param_groups)
            self._given_projections |= given
            self.weights.groups = self.trained_groups
            self.weights.meet()
            self.weights.let_go()
        except Exception:
            self.param_groups.pop()
            raise
        group[CLIP_NORM2] = None
        if self._constructed:
            warn_clipped(clipped)
            warn_far([group])
        self._clipped += clipped
        if self._stream is not None:
            self._stream.extend()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; in a mode that takes them, those that still wait.

        Args:
            closure (`Callable`, *optional*): Evaluates the model and returns the loss. Called once, in every mode.
        """
        if self._stream is not None or self.mode.capturable:
            self._refuse_scaler()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._layers is not None and not self._layers.installed:
            raise ValueError("The model's layers are plain again: call `attach()`, or make a new optimizer.")
        weights = self.weights
        if "cuda" in weights.device_types and torch.cuda.is_current_stream_capturing():
            check_capture(weights)
        if not self.state and only_make_states(weights):
            return loss
        if self._layers is not None:
            self._layers.agree()
        if self._stream is not None:
            self._stream.finish()
            return loss
        streams = SideStreams(weights.device_types) if self.mode.projection_stream else None
        movements = DividedMovements(streams) if weights.divided else Movements(streams)
        leaders: list[InputWeight] = []
        if weights.observing:
            weights.observations.clear()
        with own_precision(weights.device_types):
            work = weights.with_gradients()
            try:
                for p, weight, G, check in with_projections(work) if weights.divided else work:
                    if weight.mark is None:
                        weights.create_state(weight, p)
                    arrived: Any = weight.project(G, check)
                    if weights.observing:
                        weights.observe(weight, arrived, check)
                    movements.counters.append((weight.slot.state["skipped_steps"], check.broken))
                    weight.update(arrived, check, movements)
                if self._layers is not None:
                    leaders = self._layer_weights.learn(movements)
            finally:  # where one cannot be stepped, the others before it have made whole steps
                movements.finish()
                for _, weight, _, _ in work:
                    for slot in weight.slots:
                        slot.state = {}
                for weight in leaders:
                    weight.release()
            if weights.observing:
                share_observations(weights)
        return loss

    def _refuse_scaler(self) -> None:
        if hasattr(self, "grad_scale"):  # set by GradScaler.step, which takes it back only after a step without errors
            del self.grad_scale, self.found_inf  # type: ignore[attr-defined]
            if self._stream is None:
                raise ValueError(
                    "With `capturable` no `GradScaler` decides over steps: call its `unscale_`, then the step itself, "
                    "which leaves out what is not finite, and its `update`."
                )
            raise ValueError(
                "A `GradScaler` (fp16) cannot unscale: the step has been made with scaled gradients. "
                "Train in bf16, or without `layerwise`."
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those that have been taken off the parameters as well."""
        # without any R, what was seen is of a backward pass that comes after this
        begun = self._stream is not None and self._stream.begun
        made = self._layers is not None and (self._layers.has_gradients or begun)
        super().zero_grad(set_to_none)
        if self._layers is not None and made:
            self._layers.forget()
        if self._stream is not None:
            self._stream.discard()

    def attach(self) -> None:
        """Put hooks on the parameters, or prepared layers into the model, again, after `remove`."""
        if self._layers is not None:
            self._layers.install()
        if self._stream is not None:
            self._stream.attach()

    def remove(self) -> None:
        """Take hooks and prepared layers off: gradients come as in any model again, and `step` is refused."""
        if self._layers is not None:
            self._layers.remove()
        if self._stream is not None:
            self._stream.remove()

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step before clipping, in a mode that takes them off the parameters."""
        norm2 = None if self._stream is None else self._stream.grad_norm2
        return None if norm2 is None else norm2.sqrt()

    def statistics(self) -> dict[str, float]:
        """The last step with `collect_statistics = True`, read from the device in one transfer.

        Returns:
            `dict[str, float]`: `pca_loss`, mean share of the gradients' energy outside their subspaces, and
            `orthogonality`, mean ||PᵀP - I|| / sqrt(r), where a step was observed; `skipped_steps`, the number of
            parameter steps skipped for a gradient that was not finite, since the state began (of experts on several
            processes, up to the last step observed).
        """
        return summarize(self.weights)


def osd_of(optimizer: Any) -> OSD | None:
    """The [`OSD`] that this optimizer is or, in accelerate's wrapper, holds; `None` for any other."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer if isinstance(optimizer, OSD) else None
