"""Which layers of a model can be prepared, and the stand-ins that they begin with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..subspace import effective_rank
from .layer import plain_class
from .linear import prepared_classes
from .outside import columns_at_once


def owners_of(model: nn.Module) -> dict[Tensor, tuple[list[nn.Module], str | None]]:
    """Of each parameter the modules that have it, and why they cannot be prepared, if so."""
    found: dict[Tensor, tuple[list[nn.Module], str | None]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                modules, reason = found.get(p, ([], None))
                found[p] = [*modules, module], reason or _reason(module, name)
    return found


def _reason(module: nn.Module, name: str) -> str | None:
    """Why what a module does with a parameter is not known to be y = x Wᵀ + b."""
    if plain_class(module) not in prepared_classes() or name != "weight":
        return "no plain linear layer"
    if "forward" in vars(module):
        return "its forward is replaced"
    p = module._parameters[name]
    if getattr(p, "_backward_hooks", None) or getattr(p, "_post_accumulate_grad_hooks", None):
        return "a hook waits for its gradient"
    return None


def zeros_like_R(p: Tensor, rank: int, module: nn.Module, whole: bool, sample: int | None) -> Tensor:
    """Zeros shaped like R with what is made beside it; without memory unless `whole`, for processes to exchange."""
    right = plain_class(module) is nn.Linear
    inputs = p.shape[1 if right else 0]
    columns = effective_rank(rank, *p.shape) + (0 if sample is None else columns_at_once(inputs, sample))
    shape = (p.shape[0], columns) if right else (columns, p.shape[1])
    return torch.zeros(shape if whole else (1, 1), dtype=p.dtype, device=p.device).expand(shape)


def keeping_without_memory(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves or converts tensors, for stand-ins: those without memory get none."""

    def moved(t: Tensor) -> Tensor:
        if type(t) is nn.Parameter and t.stride() == (0, 0):  # a gradient has memory
            return fn(t[:1, :1]).expand(t.shape)
        return fn(t)

    return moved


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `ValueError` for a model that DDP has: it would not exchange what is prepared afterwards."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("source='activations' prepares the model before DDP wraps it: make the optimizer first.")
