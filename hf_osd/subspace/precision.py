"""The precision of a step: its own, and of products that only P sees bfloat16 where the processor is made for it.

P is one of many that serve (paper, section 4: any smooth rule converges), and its gradient comes from one batch: a
relative error of 2e-3 in it is far below its noise. The products that the weights see stay in full precision.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor


_NARROW = 16
_SMALL = 1 << 15


def reduced_precision(X: Tensor) -> AbstractContextManager[Any]:
    """Inside, matrix products of float32 tensors on the CPU may round their factors to bfloat16; sums stay float32.

    oneDNN does so within the product, without a temporary of X's size. On other devices, in other precisions and on
    processors without bfloat16 units nothing changes.
    """
    wide = X.shape[-1] > _NARROW  # torch itself leaves narrower products as they are, but for batches of them
    if not wide or X.dtype != torch.float32 or not X.is_cpu or torch.compiler.is_compiling():
        return _AS_IT_IS
    return _IN_BFLOAT16 if _has_bfloat16_units() else _AS_IT_IS


def narrowed(*factors: Tensor) -> tuple[Tensor, ...]:
    """The factors of a product that `reduced_precision` allows, in bfloat16 where it is faster of these copies.

    Twice as fast it is on processors that compute with bfloat16 and whose kernels for float32 do not round to it.
    """
    X = factors[0]
    large = X.shape[-1] > _NARROW and X.numel() > _SMALL
    if not large or X.dtype != torch.float32 or not X.is_cpu or torch.compiler.is_compiling() or not _keeps_float32():
        return factors
    return tuple([X.to(torch.bfloat16) for X in factors])


def full_precision(X: Tensor) -> AbstractContextManager[Any]:
    """Inside, products with float32 tensors on the CPU may run on another kernel, in the precision of float32.

    oneDNN's is twice as fast as torch's usual one on processors without matrix units that have bfloat16; where there
    are such units it rounds to bfloat16, and nothing changes here. Matrix products only: `torch.dot` becomes slow.
    """
    # handing a small product over takes longer than the product
    large = X.is_cpu and X.dtype == torch.float32 and X.numel() > _SMALL
    return _IN_BFLOAT16 if large and not torch.compiler.is_compiling() and _keeps_float32() else _AS_IT_IS


def own_precision(device_types: Iterable[str]) -> AbstractContextManager[Any]:
    """Inside, autocast does not touch products on these devices: it would round R, P and moments to half precision.

    Args:
        device_types (`Iterable[str]`): Such as `"cpu"` and `"cuda"`.
    """
    stack = None
    for kind in device_types:
        if torch.is_autocast_enabled(kind):
            stack = stack or ExitStack()
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack or _AS_IT_IS


class _InBfloat16:
    # No `contextmanager`: its generator costs as much as a small product. The setting is the process's: where threads
    # step optimizers of their own, the first that enters changes it and the last that leaves sets it back.
    def __init__(self) -> None:
        self.lock, self.inside, self.before = Lock(), 0, ""

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                now = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
                self.before = now if now == "none" else _own_setting()
                torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.backends.mkldnn.matmul.fp32_precision = self.before  # type: ignore[attr-defined]


def _own_setting() -> str:
    """The setting of products themselves: `"none"` where they follow the one of all operators, and go on to."""
    every: Any = torch.backends
    products = every.mkldnn.matmul
    now, outer = products.fp32_precision, every.fp32_precision
    if now != outer:
        return now
    # read, it tells the value in effect: whose it is shows when the other one changes
    every.fp32_precision = "tf32" if outer == "ieee" else "ieee"
    follows = products.fp32_precision != now
    every.fp32_precision = outer
    return "none" if follows else now


_IN_BFLOAT16, _AS_IT_IS = _InBfloat16(), nullcontext()


@cache
def _keeps_float32() -> bool:
    """Whether products that may round to bfloat16 do not on this processor: tried, for nothing tells it."""
    if not _has_bfloat16_units():
        return False
    X = torch.linspace(-1, 1, 96 * 640, device="cpu").view(96, 640)
    with _IN_BFLOAT16:
        product = X @ X.t()
    exact = X.double() @ X.t().double()
    return bool((product - exact).norm() < 4e-6 * exact.norm())


@cache
def _has_bfloat16_units() -> bool:
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):  # torch < 2.9
        return False
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return torch.backends.mkldnn.is_available() and any(getattr(torch.cpu, name, bool)() for name in asked)
