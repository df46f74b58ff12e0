"""Moments in 8 bits: a code for each element and an absmax for each block, in bitsandbytes' format.

Its kernels encode and decode. But its encoder for the CPU (0.50) is slow and never chooses some of the smallest codes,
so that 0 becomes another number. There a table is looked up, eight times faster and nearest. So it is on CUDA's other
streams than the default one, where that encoder runs whatever stream its input is made on, and no graph can hold it
(bitsandbytes' pull request 2052).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


# The table, 1 MiB, knows a number by sign, exponent and 11 bits of the mantissa: next to the middle between two codes
# it may choose the farther one, whose error is larger by 1/2048 of the number at most. Of 1,000 codes one is so.
SHIFT = 32 - 1 - 8 - 11


def decode(codes: Tensor, absmax: Tensor, signed: bool, block: int) -> Tensor:
    """The elements in float32, in the shape of their codes."""
    code = code_book(signed, codes.device)
    return _kernels().dequantize_blockwise(A=codes, absmax=absmax, code=code, blocksize=block, dtype=torch.float32)


def encode(value: Tensor, signed: bool, block: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 in the shape of `value` (float32, contiguous), and absmax of each block of so many elements."""
    device = value.device
    if device.type == "cuda":
        _code_by_place(signed, device)  # made now: it cannot be while a graph is captured
    if device.type != "cpu" and not _on_another_stream(device):
        return _kernels().quantize_blockwise(A=value, code=code_book(signed, device), blocksize=block)
    flat = value.view(-1)
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block) if len(flat) % block else flat.view(-1, block)
    absmax = torch.maximum(blocks.amin(dim=1).neg_(), blocks.amax(dim=1))
    share = blocks / absmax.unsqueeze(1)  # 0 / 0 is not a number, whose code is that of 0
    place = share.view(torch.int32).bitwise_right_shift_(SHIFT).add_(1 << (31 - SHIFT))
    codes = _code_by_place(signed, device).index_select(0, place.view(-1))
    return codes[: len(flat)].view_as(value), absmax


def replace_(codes: Tensor, new: Tensor, skip: Tensor) -> None:
    """Take the new codes, or none of them where `skip`, bool, 0-dim."""
    if codes.is_cpu:  # `where` with one condition for all takes as long there as all the rest of encoding
        mask = skip.logical_not().to(torch.uint8).neg_()  # 255, all bits, or 0
        codes.bitwise_xor_(new.bitwise_xor_(codes).bitwise_and_(mask))
    else:
        torch.where(skip, codes, new, out=codes)


@cache
def code_book(signed: bool, device: torch.device) -> Tensor:
    """Bitsandbytes' dynamic map: the 256 values in [-1, 1] (or [0, 1]) that a code stands for."""
    from bitsandbytes.functional import create_dynamic_map

    with torch.device("cpu"):  # whatever torch.set_default_device says
        return create_dynamic_map(signed=signed).to(device)


def _on_another_stream(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.current_stream(device).cuda_stream != 0


@cache
def _code_by_place(signed: bool, device: torch.device) -> Tensor:
    """The nearest code of every number by its first bits, negative ones first."""
    code = code_book(signed, torch.device("cpu"))
    middles = (code[1:] + code[:-1]) / 2
    parts, size = [], 1 << 16
    for start in range(-1 << (31 - SHIFT), 1 << (31 - SHIFT), size):
        places = torch.arange(start, start + size, dtype=torch.int32, device="cpu")
        numbers = ((places << SHIFT) + (1 << (SHIFT - 1))).view(
            torch.float32
        )  # in the middle of those with these bits
        parts.append(torch.bucketize(numbers.nan_to_num(0.0), middles).to(torch.uint8))
    return torch.cat(parts).to(device)


def require_bitsandbytes() -> None:
    """Raise `ImportError` with the way out where 8-bit moments cannot be had."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "8-bit moments need bitsandbytes: run `pip install bitsandbytes`, or choose the rule without `8bit`."
        ) from error


@cache
def _kernels():
    import bitsandbytes  # noqa: F401 - importing it registers the operators

    return torch.ops.bitsandbytes
