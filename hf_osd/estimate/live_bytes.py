"""Every allocation on the meta device counted, and stand-ins for what that device has not.

A tensor counts from the operation that makes it to the moment its storage is freed, so that what autograd saves, what
checkpointing drops and what overlaps come out of the model's own code, whatever its architecture.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..layers.int8 import parts_of


PLAIN_ATTENTION = nn.functional.scaled_dot_product_attention
GROUPED_PRODUCT = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)  # torch 2.8
# Sums that autograd makes in place, but not while a mode such as `LiveBytes` looks at it.
ADDED_IN_PLACE = (
    torch.ops.aten.add.Tensor,
    torch.ops.aten.scatter_add.default,
    torch.ops.aten.scatter.src,
    torch.ops.aten.index_add.default,
)
# Operators that work on a copy of their argument, on CPUs and GPUs alike: LAPACK's and cuSOLVER's SVD overwrites it.
WORKS_ON_A_COPY = (torch.ops.aten._linalg_svd.default,)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made within it that are alive, after every operation.

    Where the code asks for a value, which a meta tensor does not have, the answer is one: an optimizer's first step
    finds its gradients finite, and an expert its tokens.

    Attributes:
        live (`int`): Bytes alive now.
        backward (`bool`): Whether autograd runs, which adds in place: set by the caller.
        series (`list[int]`):
            Bytes alive at the end of each operation, before its own copies go; between two they can only become fewer.
    """

    def __init__(self, known: Any = ()):
        """Storages of the tensors in `known` do not count."""
        super().__init__()
        self.live, self.backward = 0, False
        self.series: list[int] = []
        self._added: int | None = None  # bytes alive before the sum that was the last operation
        self._alive: dict[int, weakref.ref | None] = {
            part.untyped_storage()._cdata: None for t in known for part in (t, *parts_of(t))
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run it, and count what it made."""
        kwargs = kwargs or {}
        if self._added is not None:  # the tensor that was added to is gone by now, if it was autograd's own
            self.series[-1] = max(self._added, self.live)
        adds = self.backward and func in ADDED_IN_PLACE and not torch.is_grad_enabled()
        self._added = self.live if adds else None
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        args, stand_in = _without_masks(func, args), STAND_INS.get(func)
        result = func(*args, **kwargs) if stand_in is None else stand_in(func, *args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_meta:
                self._see(value.untyped_storage())
        self.series.append(self.live + (args[0].nbytes if func in WORKS_ON_A_COPY else 0))
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            self.live -= size
            del self._alive[key]

        self.live += size
        self._alive[key] = weakref.ref(storage, freed)


@contextmanager
def meta_device() -> Iterator[None]:
    """Stand-ins for what code that runs on every device uses, and the meta device has not."""
    generator = torch.Generator()
    with (
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(torch, "Generator", lambda device=None: generator),
        mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # only ever to switch it off
        # torch knows no autocast of this device, which transformers 5.3 asks for
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),
    ):
        yield


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention by a fused kernel wherever devices have one: the meta device knows the plain formula only.

    What the kernels of all devices save: query, key, value, the mask, the output, and one float32 number for each of
    its rows. Heads of two sizes, as DeepSeek's, are fused on GPUs only. A mask that is trained, such as T5's biases of
    positions, takes the plain formula on CPUs; GPUs need a little less.
    """
    heads = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    one_size = query.shape[-1] == value.shape[-1]
    masked = attn_mask is not None and (attn_mask.requires_grad or attn_mask.ndim not in (2, 4))
    if query.ndim != 4 or masked or not (heads or (enable_gqa and one_size)):  # keys of one head for all, as Falcon's
        return PLAIN_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # what is added to the scores
    if one_size:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    bias = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, bias, query.requires_grad, is_causal=is_causal, scale=scale)[0]


def _grouped_product(func, A: Tensor, B: Tensor, *args, **kwargs) -> Tensor:
    """The meta device has it in bfloat16 only, CPUs and GPUs in float32 as well."""
    return func(A.bfloat16(), B.bfloat16(), *args, **kwargs).to(A.dtype)


def _drawn(func, size, **kwargs) -> Tensor:
    """Random numbers that go from the CPU to the meta device, which of a large model are billions: nobody looks."""
    del kwargs["generator"]
    return torch.empty(size, **kwargs)


def _nonzero(func, A: Tensor) -> Tensor:
    """Where a tensor is not 0, which the meta device cannot know: at one place in each row."""
    return func(A) if not A.is_meta else A.new_empty(A.shape[0], A.ndim, dtype=torch.long)


def _unique(func, A: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """One value for all, as of numbers of end tokens in a batch's sequences."""
    if not A.is_meta:
        return func(A, *args, **kwargs)
    none = A.new_empty(0, dtype=torch.long)
    return A.new_empty(1), none, none


def _without_masks(func, args: tuple) -> tuple:
    """A boolean index selects by the places where it is not 0."""
    if func not in INDEXING or not any(index is not None and index.is_meta for index in args[1]):
        return args
    places: list[Tensor | None] = []
    for index in args[1]:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        places += _nonzero(None, index).unbind(1) if masks else [index]
    return (args[0], places, *args[2:])


# What the meta device has not, or has only in part.
INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)
STAND_INS: dict[Any, Callable] = {
    GROUPED_PRODUCT: _grouped_product,
    torch.ops.aten.randn.generator: _drawn,
    torch.ops.aten.nonzero.default: _nonzero,
    torch.ops.aten.unique_consecutive.default: _unique,
}
