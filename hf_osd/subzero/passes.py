"""Forward passes at W + scale Zt that leave W alone: what is computed with a weight is computed with the sum instead.

In place, W + eps Zt - 2 eps Zt + eps Zt would not be W again: in bfloat16 most bits of small weights would be lost.
So a mode of torch looks at every function that is called with a trained parameter. A linear layer becomes

    y = x Wᵀ + scale mu ((x V) Zᵀ) Uᵀ

which needs nothing of W's size, an embedding likewise; any other function gets a temporary W + scale Zt. Weights are
read only, so that whoever looks at the model at any time, between passes too, sees the weights that are trained.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .activations import FollowingWeight, is_observer
from .weight import LowRankWeight
from .weights import Weights


VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})  # attributes that are no mere descriptions
DESCRIPTIONS = frozenset(
    {"size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size", "type", "__len__"}
    | {"is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_shared", "is_pinned", "is_inference"}
    | {"get_device", "has_names", "__hash__"}
)
ADDRESSES = frozenset({"data_ptr", "storage", "untyped_storage"})


class Perturbed(TorchFunctionMode):
    """Within it every function sees W + scale Zt in the place of W.

    Args:
        weights ([`Weights`]): At the step whose directions are meant.
        query (`int`): Which of them.
        scale (`float`): eps or -eps.
        seen (`set[str]`): Gets the names of the weights that were used.
    """

    def __init__(self, weights: Weights, query: int, scale: float, seen: set[str]):
        super().__init__()
        self.by_id, self.query, self.scale, self.seen = weights.by_id, query, scale, seen
        self.step, self.observes = weights.step, query == 0 and scale > 0 and is_observer()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call the function with what it is to see."""
        kwargs = kwargs or {}
        if not any(map(self._is_trained, args)) and not (kwargs and any(map(self._is_trained, kwargs.values()))):
            return func(*args, **kwargs)
        name = func.__name__
        if name in DESCRIPTIONS or (name == "__get__" and func.__self__.__name__ not in VALUES):
            return func(*args, **kwargs)
        if name in ADDRESSES:
            raise ValueError(
                f"A kernel asks for the address of {self._names(args)}, where no forward pass is perturbed: use the "
                "model's plain PyTorch layers."
            )
        known = KNOWN.get(func)
        result = None if known is None else known(self, args, kwargs)
        return self.plainly(func, args, kwargs) if result is None else result

    def plainly(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any function, with temporaries W + scale Zt."""
        return func(*map(self.replaced, args), **{key: self.replaced(value) for key, value in kwargs.items()})

    def low_rank(self, value: Any) -> LowRankWeight | None:
        """The weight that a tensor is, if it is one perturbed in a subspace."""
        weight = self.by_id.get(id(value))
        if not isinstance(weight, LowRankWeight):
            return None
        self.seen.add(weight.name)
        return weight

    def observe(self, weight: LowRankWeight, x: Tensor) -> None:
        """Show inputs to a weight whose V follows them: once a step, which has two passes or more."""
        if self.observes and isinstance(weight, FollowingWeight):
            weight.observe(x, self.step)

    def _is_trained(self, value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return any(id(one) in self.by_id for one in value)
        return id(value) in self.by_id

    def replaced(self, value: Any) -> Any:
        """W + scale Zt for a weight, alone or in a list; anything else as it is."""
        if isinstance(value, (tuple, list)) and self._is_trained(value):
            return type(value)(map(self.replaced, value))
        weight = self.by_id.get(id(value))
        if weight is None:
            return value
        self.seen.add(weight.name)
        return weight.perturbed(self.query, self.scale)

    def _names(self, args: tuple) -> str:
        return ", ".join(self.by_id[id(value)].name for value in args if id(value) in self.by_id)


def _linear(mode: Perturbed, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """`functional.linear(x, W, bias)`."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    weight, x = mode.low_rank(given["weight"]), mode.replaced(given["input"])
    if weight is None:
        return None
    mode.observe(weight, x)
    if weight.is_made_for(x.numel() // max(1, x.shape[-1])):
        return None
    y = mode.plainly(functional.linear, (x,), {"weight": given["weight"].detach(), "bias": given.get("bias")})
    with _as_it_is(y):
        return weight.add_linear_(y, x, mode.query, mode.scale)


def _addmm(mode: Perturbed, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """`torch.addmm(bias, x, W)`, as GPT-2's layers call it."""
    weight = mode.low_rank(args[2]) if len(args) == 3 and not kwargs else None
    if weight is None:
        return None
    x = mode.replaced(args[1])
    mode.observe(weight, x)
    if weight.is_made_for(x.shape[0]):
        return None
    y = mode.plainly(torch.addmm, (args[0], x, args[2].detach()), {})
    with _as_it_is(y):
        return weight.add_transposed_(y, x, mode.query, mode.scale)


def _embedding(mode: Perturbed, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """`functional.embedding(rows, W, ...)`."""
    given = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
    weight = mode.low_rank(given["weight"]) if given.get("max_norm") is None else None
    if weight is None:
        return None
    y = functional.embedding(given["input"], given["weight"].detach())
    with _as_it_is(y):
        return weight.add_rows_(y, given["input"], mode.query, mode.scale)


KNOWN: dict[Any, Callable[[Perturbed, tuple, dict[str, Any]], Tensor | None]] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    functional.embedding: _embedding,
}


def _as_it_is(y: Tensor) -> Any:
    """No autocast: the products are made in y's precision."""
    return torch.autocast(y.device.type, enabled=False)


@contextmanager
def without_dropout(model: nn.Module, but: nn.Module | None = None) -> Iterator[None]:
    """All modules in evaluation mode; `but` one, whose flag a loss may ask for, in its own forward pass alone."""
    training = [module for module in model.modules() if module.training]
    hooks: list[Any] = []
    try:
        for module in training:
            module.training = module is but
            if module is but:
                hooks.append(module.register_forward_pre_hook(lambda own, x: setattr(own, "training", False)))
                hooks.append(
                    module.register_forward_hook(lambda own, x, y: setattr(own, "training", True), always_call=True)
                )
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True


class RandomState:
    """The state of torch's random numbers, for all passes of a step to draw the same.

    Args:
        devices (`set[torch.device]`): Those of the weights.
    """

    def __init__(self, devices: set[torch.device]):
        self.cpu = torch.get_rng_state()
        self.cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices if d.type == "cuda"]

    def restore(self) -> None:
        """As it was."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)


def loss_at(weights: Weights, query: int, scale: float, compute_loss: Callable[[], Tensor], seen: set[str]) -> Tensor:
    """The loss at W + scale Zt, 0-dim."""
    # what is compiled would keep the Z that it was compiled with
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), Perturbed(weights, query, scale, seen):
        loss = compute_loss()
    return loss.detach().mean()  # of several devices' losses, as Trainer does
