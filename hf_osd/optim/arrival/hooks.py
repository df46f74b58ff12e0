"""Whose hooks parameters carry: a parameter is stepped by one optimizer, and must not keep it alive."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary


# Which stream's hook a parameter carries: with two it would be stepped twice.
_OWNERS = WeakTensorKeyDictionary()


@cache
def called_without_gradient() -> bool:
    """Whether torch calls these hooks where a backward pass gives a leaf no gradient: 2.6 did not, 2.13 does."""
    leaf, other = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    called: list[Tensor] = []
    leaf.register_post_accumulate_grad_hook(called.append)
    with torch.enable_grad():
        _Without.apply(leaf, other).backward()
    return bool(called)


def refuse_deaf_torch(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse groups whose layers make R where the hook of a weight would never tell that its backward pass has ended.

    Raises:
        ValueError: If there is such a group, and torch does not call hooks of leaves without gradient.
    """
    prepared = any(group["rank"] is not None and group["source"] == "activations" for group in groups)
    if prepared and not called_without_gradient():
        raise ValueError(
            "`layerwise` with source='activations' needs a torch that calls the hooks of weights without a gradient, "
            f"and {torch.__version__} does not: all steps would wait for `step()`. Install a newer torch (2.13 does), "
            "or leave one of them out."
        )


class _Without(torch.autograd.Function):
    """A sum that gives its first part no gradient."""

    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


def put_on(target: Tensor, stream: Any, p: Tensor) -> RemovableHandle:
    """Let a stream hear of the gradient of `target`, as of that of `p`; another optimizer's hooks are taken off."""
    release([target], keep=stream)
    _OWNERS[target] = weakref.ref(stream)
    return target.register_post_accumulate_grad_hook(_hook(stream, None if target is p else p))


def release(params: Iterable[Tensor], keep: Any) -> None:
    """Take the hooks of all optimizers but `keep`'s off: those of a training that was interrupted would train on."""
    for p in params:
        owner = _OWNERS[p]() if p in _OWNERS else None
        if owner is not None and owner is not keep:
            owner.remove()


def _hook(stream: Any, weight: Tensor | None) -> Callable[[Tensor], None]:
    # A parameter must not keep the optimizer alive, which keeps the parameter.
    reference = weakref.ref(stream)

    def hook(target: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive.on_gradient(target if weight is None else weight)

    return hook
