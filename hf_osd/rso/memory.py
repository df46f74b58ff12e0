"""What RSO holds and exchanges, in numbers."""

from collections.abc import Iterator

from torch import nn

from .outer_loop import outer_loop
from .plain_state import ADAPTER


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that full training would train, by their name in this model: W, not P and B.

    Of a model without RSO: those that require gradients.
    """
    loop = outer_loop(model)
    layers = [] if loop is None else list(loop.layers.values())
    weights = {id(layer.base_layer.weight) for layer in layers}  # type: ignore[union-attr]
    factors = {id(layer.lora_B[ADAPTER].weight) for layer in layers}  # type: ignore[union-attr, index]
    for name, p in model.named_parameters():
        if id(p) in weights or p.requires_grad and id(p) not in factors:
            yield name, p


def subspace_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """P and B, which the model holds beside its own weights; nothing without RSO."""
    loop = outer_loop(model)
    for layer, B in [] if loop is None else loop.factors():
        yield layer.lora_A[ADAPTER].weight
        yield B


def subspace_bytes(model: nn.Module) -> int:
    """Bytes of P and B: for a weight (m, n), r (m + n) numbers.

    The inner optimizer's moments of B, 2 r m numbers for AdamW, come on top.
    """
    return sum(p.nbytes for p in subspace_parameters(model))


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of gradients that a data-parallel process averages in a step: r m numbers for a weight (m, n), not m n.

    Of a model without RSO: those of full training.
    """
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)
