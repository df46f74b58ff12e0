"""Layers whose weights are codes, not numbers: they are frozen by nature, so no optimizer can train them."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...layers.int8 import Int8Weight


EXPERTS = (
    "Experts",
    "NaiveMoe",
)  # endings of transformers' classes of experts; the second is older
CODE_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32)  # and all floats of one byte

WAY_OUT = (
    "To train all weights with OSD, load the model in full precision, without `quantization_config`; on quantised "
    "weights train adapters: LoRA with optim='adamw_torch' (QLoRA)."
)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or a layer of experts, with a quantised weight.

    bitsandbytes' 4- and 8-bit layers, tensors of torchao and quanto, float8 weights, and the packed integers of GPTQ,
    AWQ, HQQ and others, whose layers are no `nn.Linear` but are called that.
    """
    name = type(module).__name__
    if not (isinstance(module, nn.Linear) or "Linear" in name or name.endswith(EXPERTS)):
        return False
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(_is_code(tensor) for tensor in tensors)


def _is_code(tensor: Tensor) -> bool:
    if type(tensor).__name__ == "Params4bit":  # floats until bitsandbytes moves them to a device
        return True
    if isinstance(tensor, Int8Weight):
        return False
    if is_traceable_wrapper_subclass(tensor):
        from torch.distributed.tensor import DTensor

        if not isinstance(tensor, DTensor):
            return True
    one_byte = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return tensor.ndim >= 2 and (one_byte or tensor.dtype in CODE_DTYPES)
