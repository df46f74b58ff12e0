"""Products that only P sees, in bfloat16 where the processor is made for it.

P is one of many that serve (paper, section 4: any smooth rule converges), and its gradient comes from one batch: a
relative error of 2e-3 in it is far below its noise. The products that the weights see stay in full precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@contextmanager
def reduced_precision(X: Tensor) -> Iterator[None]:
    """Inside, matrix products of float32 tensors on the CPU may round their factors to bfloat16; sums stay float32.

    oneDNN does so within the product, without a temporary of X's size. On other devices, in other precisions and on
    processors without bfloat16 units nothing changes.
    """
    if X.dtype != torch.float32 or X.device.type != "cpu" or not _has_bfloat16_units():
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _has_bfloat16_units() -> bool:
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):  # torch < 2.9
        return False
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return torch.backends.mkldnn.is_available() and any(getattr(torch.cpu, name, bool)() for name in asked)
