"""Whose hooks parameters carry: a parameter is stepped by one optimizer, and must not keep it alive."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary


# Which stream's hook a parameter carries: with two it would be stepped twice.
_OWNERS = WeakTensorKeyDictionary()


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
