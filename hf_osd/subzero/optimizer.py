"""[`SubZero`]: an optimizer whose only gradient is a directional derivative, made of two forward passes."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..declare import plain, refuse_unknown
from ..optim.factory import decay_groups
from ..optim.options.table import check_lr
from ..optim.selection.wrappers import unwrapped
from .options import OPTIONS, Options, refuse_targets
from .passes import RandomState, loss_at, without_dropout
from .selection import given_bases, input_sides, trained_weights
from .state import AGREE, checked_seed, warn_restored
from .weights import Weights, fingerprint


LOW_PRECISION = (torch.bfloat16, torch.float16)


class SubZero(torch.optim.Optimizer):
    """Zeroth-order fine-tuning in random subspaces: two forward passes a step, no backward pass, memory of inference.

    SubZero (Yu et al. 2025, arXiv 2410.08989), with `perturbation="dense"` MeZO (arXiv 2305.17333). Of the directions
    Zt that are drawn at a step (letters as in `weights`),

        rho = (loss(W + eps Zt) - loss(W - eps Zt)) / (2 eps),    W <- (1 - lr weight_decay) W - lr rho Zt

    with the mean of rho over micro-batches and processes, and of rho Zt over queries. E[rho²] is about the squared
    norm of the gradient, as which Trainer logs and clips it. The passes only read the weights; bfloat16 ones are
    rounded at random by the update. In the passes dropout is off, nothing is compiled, and other random numbers are
    the same in all. A rho that is not finite counts as 0, each query's of each micro-batch by itself. In bfloat16,
    norms and biases are perturbed where eps Zt exceeds their rounding; what is in subspaces always is, for there the
    perturbation is added to products.

    A Trainer needs `optim="subzero"` alone. In a loop of your own a step is `optimizer.step(lambda: loss)`, without
    DDP; several micro-batches are several `optimizer.forward(lambda: loss / k).backward()` before `optimizer.step()`.

    Args:
        model (`nn.Module`): The model; frozen parameters stay as they are.
        lr (`float`, *optional*, defaults to 1e-6): Learning rate; the authors' are 1e-7 to 1e-6 for full fine-tuning.
        target_modules (`str` or `list[str]`, *optional*):
            Matrices to perturb in subspaces, see [`~optim.selection.targets.select`]; defaults to all.
        weight_decay (`float`, *optional*, defaults to 0): Decoupled, not of biases and norms.
        options:
            `rank` (24), `eps` (1e-3), `update_interval` (1000: steps between new U and V), `queries` (1),
            `perturbation` (`"subspace"`), `source` (`"random"`, or `"activations"`: V follows the inputs of linear
            layers), `init` (a [`ProjectionState`], folder or repository, in whose P U or V are drawn) and `seed` (0).

    Raises:
        ValueError: For options that are unknown, wrong or without effect, float16 or sharded weights, and models whose
            functions cannot be seen (compiled or scripted).

    Example:
    ```python
    >>> import torch
    >>> from hf_osd.subzero import SubZero

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    >>> optimizer = SubZero(model, lr=1e-3, rank=8)
    >>> x = torch.randn(16, 64)
    >>> loss = optimizer.step(lambda: model(x).square().mean())

    ```
    """

    _constructed = False

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        *,
        target_modules: str | Iterable[str] | None = None,
        weight_decay: float = 0.0,
        **options: Any,
    ):
        refuse_unknown(options, OPTIONS, "SubZero")
        self.options = Options(**{name: plain(value) for name, value in options.items()})
        check_lr(lr, "SubZero")
        refuse_targets(self.options, target_modules)
        self.model = unwrapped(model)
        trained, matrices = trained_weights(self.model, target_modules)
        given = given_bases(self.options, trained, matrices)
        sides = input_sides(self.options, self.model, trained, matrices)
        self.weights = Weights(trained, matrices, self.options, given, sides)
        if self.options.perturbation == "subspace" and not self.weights.low_rank:
            warnings.warn(
                f"No matrix is in a subspace: none has min(m, n) > rank={self.options.rank}, so all is perturbed "
                "densely, as by MeZO. Give a lower `rank`.",
                stacklevel=2,
            )
        dtype = max((torch.promote_types(p.dtype, torch.float32) for p in trained.values()), key=lambda d: d.itemsize)
        device = next(iter(trained.values())).device
        self.direction = nn.Parameter(torch.zeros(self.options.queries, dtype=dtype, device=device))
        names = {p: name for name, p in trained.items()}
        groups: list[dict[str, Any]] = [{"params": list(trained.values()), "weight_decay": 0.0}]
        if weight_decay:
            groups = decay_groups(self.model, weight_decay)
        groups = [{**group, "params": [(names[p], p) for p in group["params"] if p in names]} for group in groups]
        groups = [group for group in groups if group["params"]]
        agree = {name: getattr(self.weights, name) for name in AGREE}
        saved = {**self.options.plain(), **agree, "start": ""}
        groups.append({"params": [("rho", self.direction)], "weight_decay": 0.0, **saved})
        self._rho = self.direction.new_zeros(0, self.options.queries)  # (steps or more, queries), of all steps
        self._rates: list[tuple[float, ...]] = []  # lr of each group, likewise
        self._seen: set[str] | None = set()  # until the first step, what has been used
        self._averaged = False
        self._end: tuple[int, str] | None = None  # a step, and the fingerprint of the weights that it has left
        super().__init__(groups, {"lr": lr})
        self._constructed = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused but for the groups that it is made with."""
        if self._constructed:
            raise ValueError("SubZero's directions are of the parameters that it was made with: make a new one.")
        super().add_param_group(param_group)

    @property
    def steps(self) -> int:
        """Steps so far."""
        return len(self._rates)

    @property
    def weight_groups(self) -> list[dict[str, Any]]:
        """`param_groups` without the one of rho."""
        return self.param_groups[:-1]

    def forward(self, compute_loss: Callable[[], Tensor], but: nn.Module | None = None) -> Tensor:
        """The loss, with rho as its only gradient: mean loss + rho (d - d.detach()), d a stand-in for the direction.

        Args:
            compute_loss (`Callable`): The forward pass of a micro-batch, called twice for each query.
            but (`nn.Module`, *optional*): A module whose mode, training or not, changes in its own forward pass alone.
        """
        self._refuse_frozen()
        self.weights.begin(self.steps)
        eps, total, rho = self.options.eps, None, []
        if not self.steps and not self.param_groups[-1]["start"]:
            self.param_groups[-1]["start"] = fingerprint(self.weights)
        seen = set() if self._seen is None else self._seen
        random = RandomState({weight.W.device for weight in self.weights.weights.values()})
        with without_dropout(self.model, but):
            for query in range(self.options.queries):
                losses = []
                for scale in (eps, -eps):
                    random.restore()
                    losses.append(loss_at(self.weights, query, scale, compute_loss, seen))
                plus, minus = losses
                self._warn_of_precision(plus)
                rho.append((plus - minus) / (2 * eps))
                total = plus + minus if total is None else total + plus + minus
        assert total is not None
        d = self.direction
        mean = _finite(torch.stack(rho)).to(d.device, d.dtype) / self.options.queries
        with torch.enable_grad():
            return total / (2 * self.options.queries) + (mean * (d - d.detach())).sum().to(total.device)

    def _refuse_frozen(self) -> None:
        for weight in self.weights.weights.values():
            if not weight.W.requires_grad:
                raise ValueError(f"{weight.name} has been frozen since this optimizer was made: make a new one.")

    def average(self) -> None:
        """Make the mean of rho over the processes, once for a step; clip after it."""
        grad = self.direction.grad
        if grad is not None and not self._averaged and dist.is_available() and dist.is_initialized():
            dist.all_reduce(grad)
            grad.div_(dist.get_world_size())
            self._averaged = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update the weights by the rho that has been found; with a closure, which computes a loss, find it first.

        Raises:
            ValueError: Where no rho has been found since the last step, and for gradients.
        """
        loss = None
        if closure is not None:
            loss = self.forward(closure)
            loss.backward()
            loss = loss.detach()
        if any(p.grad is not None for group in self.weight_groups for p in group["params"]):
            raise ValueError("SubZero takes no gradients: call `optimizer.forward(lambda: loss).backward()`.")
        if self.direction.grad is None:
            raise ValueError(
                "There is no rho to step by: call `optimizer.step(lambda: loss)`, or before each step and after "
                "`zero_grad` `optimizer.forward(lambda: loss).backward()`."
            )
        self.average()
        rho = _finite(self.direction.grad)
        self.forget_rho()  # Trainer empties the model's gradients alone
        # as they are saved, so that a replay has the same
        rates = torch.tensor([float(group["lr"]) for group in self.weight_groups], dtype=rho.dtype).tolist()
        self._warn_unused()
        self._note(rho, tuple(rates))
        self.weights.update_(rho, *self.by_name(rates))
        self.weights.follow_(self.steps)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every optimizer."""
        super().zero_grad(set_to_none)
        self._averaged = False

    def forget_rho(self) -> None:
        """Drop the rho of micro-batches whose step is not to come, as where a run was broken off."""
        self.direction.grad, self._averaged = None, False

    def restart(self) -> None:
        """Begin a run of its own, with the weights of now."""
        self.forget_rho()
        self._rho, self._rates, self._end = self._rho[:0], [], None
        self.param_groups[-1]["start"] = ""
        for weight in self.weights.following:
            weight.load_({})
        self.weights.forget()

    def note_end(self) -> None:
        """Note what the last step has left, before the model is given other weights; once it has been, nothing."""
        if self.steps and not self.replaced:
            self._end = self.steps, fingerprint(self.weights)

    @property
    def replaced(self) -> bool:
        """Whether the model has been given other weights than the last step has left, as far as that was noted."""
        return self._end is not None and self._end[0] == self.steps and self._end[1] != fingerprint(self.weights)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse, for random numbers go by the objects of the model."""
        raise TypeError(
            "SubZero is neither copied nor pickled: make one for the model's copy, and load `state_dict()`."
        )

    def by_name(self, rates: Iterable[float]) -> tuple[dict[str, float], dict[str, float]]:
        """Learning rate and weight decay of each parameter, of the rates of the groups."""
        pairs = list(zip(self.weight_groups, rates, strict=True))
        lrs = {name: rate for group, rate in pairs for name in group["param_names"]}
        return lrs, {name: group["weight_decay"] for group, _ in pairs for name in group["param_names"]}

    def history(self) -> tuple[Tensor, Tensor]:
        """All rho so far (steps, queries), on their device, and the learning rates (steps, groups)."""
        rates = torch.tensor(self._rates, dtype=self._rho.dtype).view(self.steps, len(self.weight_groups))
        return self._rho[: self.steps].clone(), rates

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer; the state is the list of rho and learning rates, and what follows the inputs."""
        rho, rates = self.history()
        self.state[self.direction] = {"rho": rho, "lr": rates}
        for weight in self.weights.following:
            self.state[self.direction] |= weight.state()
        saved = super().state_dict()
        self.state.clear()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where the state was saved, with the seed that it was saved with.

        Raises:
            ValueError: If it was saved with other options, matrices in subspaces, `init` or parameters.
        """
        seed = checked_seed(state_dict, self.param_groups, self.options)
        warn_restored(state_dict, self.param_groups, self.options.seed)
        super().load_state_dict(state_dict)
        self.options = self.weights.options = replace(self.options, seed=seed)
        state = self.state.pop(self.direction)
        for weight in self.weights.following:
            weight.load_(state)
        self._rho, self._rates = state["rho"], [tuple(row) for row in state["lr"].tolist()]
        self._end = None
        self.forget_rho()
        self.weights.forget()

    def _note(self, rho: Tensor, rates: tuple[float, ...]) -> None:
        if self.steps == len(self._rho):
            self._rho = torch.cat([self._rho, rho.new_zeros(max(256, self.steps), len(rho))])
        self._rho[self.steps] = rho
        self._rates.append(rates)

    def _warn_of_precision(self, loss: Tensor) -> None:
        if loss.dtype in LOW_PRECISION and self._seen is not None:
            warnings.warn(
                f"The loss is {loss.dtype}: its differences are mostly rounding. Compute it in float32.", stacklevel=3
            )

    def _warn_unused(self) -> None:
        unused = [] if self._seen is None else [name for name in self.weights.weights if name not in self._seen]
        if unused:
            warnings.warn(
                f"No forward pass used {len(unused)} parameters, which move at random then: freeze them. "
                f"{', '.join(unused[:3])}",
                stacklevel=3,
            )
        self._seen = None


def _finite(rho: Tensor) -> Tensor:
    return torch.nan_to_num(rho, nan=0.0, posinf=0.0, neginf=0.0)


def subzero_of(optimizer: Any) -> SubZero | None:
    """The [`SubZero`] that this optimizer is or, in accelerate's wrapper, holds; `None` for any other."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer if isinstance(optimizer, SubZero) else None
