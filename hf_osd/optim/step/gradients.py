"""What is asked of gradients before a step: their norms and whether they are finite, all at once, on the device."""

from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...update_rules import GradientCheck
from .sharding import Sharding
from .stacks import lies_whole


PIECE = 2**20  # entries worked on at a time: bounds float32 temporaries to 4 MiB
EPS = 2.0**-122  # up to this ||G||² counts as zero; float32 holds it and its inverse exactly


def check_gradients(
    grads: Sequence[Tensor],
    stacked: Sequence[bool] | None = None,
    shardings: Sequence[Sharding | None] | None = None,
) -> list[GradientCheck]:
    """One `GradientCheck` for each gradient. A few launches for each device and precision, nothing read back.

    Args:
        grads (`list[torch.Tensor]`): The gradients; of a sharded parameter, this process's part.
        stacked (`list[bool]`, *optional*):
            Which of them are a stack (E, m, n), of whose E matrices a zero one is skipped. The tensors of their checks
            have the shape (E,).
        shardings (`list[Sharding]`, *optional*):
            How each is sharded. One all-reduce over each mesh then makes all processes agree; experts that are whole
            need none.
    """
    checks: dict[int, GradientCheck] = {}
    shardings = shardings or [None] * len(grads)
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, (G, sharding) in enumerate(zip(grads, shardings, strict=True)):
        is_stack = bool(stacked and stacked[i])
        over = None if sharding is None or sharding.dim is None else (sharding.mesh, sharding.copies)
        if is_stack and lies_whole(sharding):
            over = None
        alike[G.device, torch.promote_types(G.dtype, torch.float32), is_stack, over].append(i)
    for (device, dtype, are_stacks, over), members in alike.items():
        matrices: list[Tensor] = []
        for i in members:
            matrices += grads[i].unbind() if are_stacks else (grads[i],)
        norm2 = _squared_norms(matrices, device, dtype)
        if over is not None:
            norm2 = cast(Sharding, shardings[members[0]]).sum(norm2)
        check = check_of(norm2, are_stacks)
        if are_stacks:
            rows = zip(*(field.split([len(grads[i]) for i in members]) for field in check), strict=True)
        else:
            rows = zip(*map(torch.unbind, check), strict=True)
        for i, row in zip(members, rows, strict=True):
            checks[i] = GradientCheck(*row)
    return list(map(checks.__getitem__, range(len(grads))))


def check_of(norm2: Tensor, stacked: bool) -> GradientCheck:
    """The check of gradients with these squared norms, in their shape; `stacked` as in `check_gradients`."""
    broken = norm2.isfinite().logical_not_().to(torch.float32)
    if stacked:
        # not a number: nothing is learned or observed there either
        norm2 = norm2.masked_fill(norm2 == 0, float("nan"))
    skip = ~norm2.isfinite()
    found_inf = skip.to(torch.float32)
    # s = 1 / max(||G||², eps)
    return GradientCheck(norm2.clamp(min=EPS).reciprocal_(), skip, found_inf, (1 - found_inf).to(norm2.dtype), broken)


def squared_norm(G: Tensor, stacked: bool) -> Tensor:
    """||G||², 0-dim, in the precision of the computation; of a stack (E, m, n) for each matrix, (E,)."""
    matrices = list(G.unbind()) if stacked else [G]
    norm2 = _squared_norms(matrices, G.device, torch.promote_types(G.dtype, torch.float32))
    return norm2 if stacked else norm2[0]


def clip_coefficient(norm2: Tensor, max_norm: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies gradients of this squared total norm with, 0-dim."""
    return (max_norm / (norm2.sqrt() + 1e-6)).clamp_(max=1.0)


def _squared_norms(grads: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    if not grads:  # of a stack of no matrices
        return torch.empty(0, dtype=dtype, device=device)
    if device.type != "cpu":
        return torch.stack(torch._foreach_norm(grads, 2, dtype=dtype)).square_()
    found = []
    for G in grads:
        flat = G.view(-1) if G.is_contiguous() else _in_memory_order(G)
        if G.dtype == dtype:  # a dot product is several times faster there than a norm, which runs on one thread
            found.append(torch.dot(flat, flat))
        else:
            found.append(_wide_dot(flat, dtype))
    return torch.stack(found)


def _in_memory_order(G: Tensor) -> Tensor:
    """The entries of G, a view where they fill a piece of memory in some order."""
    return G.permute(sorted(range(G.ndim), key=G.stride, reverse=True)).reshape(-1)


def _wide_dot(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """||G||² in `dtype`, of which copies are made in pieces."""
    parts = (part.to(dtype) for part in flat.split(PIECE))
    return torch.stack([torch.dot(part, part) for part in parts]).sum()


def refuse_unsupported(G: Tensor, name: str) -> None:
    """Raise `ValueError` for a sparse or complex gradient."""
    if G.layout != torch.strided:
        raise ValueError(f"{name} has a sparse gradient, which OSD does not support: use dense embeddings.")
    if G.is_complex():
        raise ValueError(f"{name} has a complex gradient, which OSD does not support.")
