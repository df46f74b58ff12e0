"""Float tensors that are alive during operations."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Floats(TorchDispatchMode):
    """How many float tensors of given sizes are alive after each operation, at most."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.alive, self.most = sizes, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() in self.sizes:
            if type(out) is torch.Tensor and out._base is None:
                self.alive.append(weakref.ref(out))
        self.most = max(self.most, self.count())
        return out

    def count(self) -> int:
        return len({ref().untyped_storage().data_ptr() for ref in self.alive if ref() is not None})
