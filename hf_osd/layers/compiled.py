"""The product x P in functions that torch compiles: one operation of their graphs, without anything that changes.

Letters and shapes as in `shared_input`.
"""

import weakref
from itertools import count
from typing import Any

import torch
from torch import Tensor


def dtype_of_products(kind: str, dtype: torch.dtype) -> torch.dtype:
    """What products of such inputs come in: autocast may be on for one layer and off for another."""
    autocast = dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else dtype


_numbers = count()
_by_number: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def new_handle(owner: Any) -> Tensor:
    """A number that compiled functions find `owner.product` by: an input of theirs, not part of their code."""
    number = next(_numbers)
    _by_number[number] = owner
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("hf_osd::project", mutates_args=())
def _project(x: Tensor, handle: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[`SharedInput.product`] as one operation of a compiled graph, which so depends on nothing that changes.

    Blocks of one class share a graph, steps go by another P, and other tokens are learned of. Layers that share an
    input pass the same arguments, so that the compiler makes one call of theirs.
    """
    return _by_number[int(handle)].product(x, dtype, compiled=True)


@_project.register_fake
def _(x: Tensor, handle: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.reshape(-1, x.shape[-1]).shape[0], width, dtype=dtype)


def project_compiled(x: Tensor, handle: Tensor, width: int) -> Tensor:
    """In a compiled function, the x P of whose handle it is, `width` numbers a token with what comes beside it."""
    return torch.ops.hf_osd.project(x.detach(), handle, width, dtype_of_products(x.device.type, x.dtype))
