"""How a moment is kept between steps: as floats, or block-wise in 8 bits. A format, never an algorithm.

A rule always computes in full precision on decoded tensors. `load` and `store` take flat slices, so that a large
parameter is decoded piece by piece.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .protocol import Moment


BLOCK_SIZE = 256  # elements that share one absmax: bitsandbytes' block for optimizer states
MIN_BLOCK_SIZE = 64  # the smallest of bitsandbytes' kernels
MIN_8BIT_SIZE = 4096  # smaller tensors stay in float32, as in bitsandbytes: their states are no memory


class TensorSpec(NamedTuple):
    """One entry of the optimizer state.

    Attributes:
        shape (`tuple`): Its shape.
        dtype (`torch.dtype`): Its dtype.
        divided (`int`, *optional*): The dimension that is divided among processes, where the parameter is sharded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    divided: int | None = None


class MomentStorage(Protocol):
    """A format for moments. `prefix` tells the weight's moments (empty) from the projection's (`"projection_"`)."""

    def spec(
        self, moment: Moment, prefix: str, compute_dtype: torch.dtype, divided: int | None = None
    ) -> dict[str, TensorSpec]:
        """The entries of the optimizer state that hold this moment, whose dimension `divided` is sharded."""

    def load(
        self, state: dict, moment: Moment, prefix: str, compute_dtype: torch.dtype, piece: slice | None
    ) -> Tensor:
        """The moment in `compute_dtype`: whole and in its shape, or the flat piece `piece` of it."""

    def store(
        self, state: dict, moment: Moment, prefix: str, value: Tensor, piece: slice | None, skip: Tensor
    ) -> None:
        """Keep `value`, what `load` gave after the rule has updated it; nothing changes where `skip`."""


@dataclass(frozen=True)
class Dense:
    """One float tensor.

    Args:
        dtype (`torch.dtype`, *optional*):
            Defaults to the precision of the computation (float32; float64 for float64 weights), in which case the
            rule works on the stored tensor itself.
    """

    dtype: torch.dtype | None = None

    def spec(
        self, moment: Moment, prefix: str, compute_dtype: torch.dtype, divided: int | None = None
    ) -> dict[str, TensorSpec]:
        """One entry."""
        return {prefix + moment.name: TensorSpec(moment.shape, self.dtype or compute_dtype, divided)}

    def load(
        self, state: dict, moment: Moment, prefix: str, compute_dtype: torch.dtype, piece: slice | None
    ) -> Tensor:
        """The stored tensor itself where the dtypes agree."""
        stored = state[prefix + moment.name]
        value = stored if piece is None else stored.view(-1)[piece]
        return value if value.dtype == compute_dtype else value.to(compute_dtype)

    def store(
        self, state: dict, moment: Moment, prefix: str, value: Tensor, piece: slice | None, skip: Tensor
    ) -> None:
        """Round `value` into the stored tensor; nothing to do where it is the stored tensor."""
        stored = state[prefix + moment.name]
        if stored.dtype != value.dtype:  # a skipped step left `value` what was decoded: rounding gives it back exactly
            (stored if piece is None else stored.view(-1)[piece]).copy_(value)


@dataclass(frozen=True)
class BlockWise8bit:
    """One byte per element and one float32 absmax per 256, through bitsandbytes' block-wise kernels.

    Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861. Small moments stay dense.

    Where rows are divided among processes no block spans two of them, so that codes and absmax can be divided anew:
    blocks are the largest that rows divide into, down to 64 elements. Other divided moments stay dense.
    """

    def spec(
        self, moment: Moment, prefix: str, compute_dtype: torch.dtype, divided: int | None = None
    ) -> dict[str, TensorSpec]:
        """Codes in the shape of the moment, and their absmax."""
        numel = torch.Size(moment.shape).numel()
        name = prefix + moment.name
        absmax: tuple[int, ...] = (-(-numel // BLOCK_SIZE),)
        if divided is not None:
            row = torch.Size(moment.shape[1:]).numel()
            block = math.gcd(row, BLOCK_SIZE)
            absmax = (moment.shape[0], row // block)
        if numel < MIN_8BIT_SIZE or divided is not None and (divided > 0 or block < MIN_BLOCK_SIZE):
            return Dense().spec(moment, prefix, compute_dtype, divided)
        return {
            name: TensorSpec(moment.shape, torch.uint8, divided),
            name + "_absmax": TensorSpec(absmax, torch.float32, divided),
        }

    def load(
        self, state: dict, moment: Moment, prefix: str, compute_dtype: torch.dtype, piece: slice | None
    ) -> Tensor:
        """Decoded; a piece must start at a block."""
        name = prefix + moment.name
        if state[name].dtype != torch.uint8:
            return Dense().load(state, moment, prefix, compute_dtype, piece)
        codes, absmax, block = _piece(state, name, piece)
        value = _kernels().dequantize_blockwise(
            A=codes,
            absmax=absmax,
            code=_code_book(moment.signed, codes.device),
            blocksize=block,
            dtype=torch.float32,
        )
        return value.to(compute_dtype)

    def store(
        self, state: dict, moment: Moment, prefix: str, value: Tensor, piece: slice | None, skip: Tensor
    ) -> None:
        """Encoded. Codes are kept where `skip`: quantising what was decoded does not always give the same codes."""
        name = prefix + moment.name
        if state[name].dtype != torch.uint8:
            return Dense().store(state, moment, prefix, value, piece, skip)
        codes, absmax, block = _piece(state, name, piece)
        new_codes, new_absmax = _kernels().quantize_blockwise(
            A=value.to(torch.float32).contiguous(),  # bitsandbytes before 0.50 takes it for that
            code=_code_book(moment.signed, codes.device),
            blocksize=block,
        )
        torch.where(skip, codes, new_codes.view_as(codes), out=codes)
        torch.where(skip, absmax, new_absmax, out=absmax)


def _piece(state: dict, name: str, piece: slice | None) -> tuple[Tensor, Tensor, int]:
    codes, absmax = state[name], state[name + "_absmax"]
    # flat blocks, the last one shorter, or whole blocks in each row
    block = BLOCK_SIZE if absmax.ndim == 1 else codes.shape[1:].numel() // absmax.shape[1]
    absmax = absmax.view(-1)
    if piece is None:
        return codes, absmax, block
    return codes.view(-1)[piece], absmax[piece.start // block : -(-piece.stop // block)], block


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


@cache
def _code_book(signed: bool, device: torch.device) -> Tensor:
    """Bitsandbytes' dynamic map: the 256 values in [-1, 1] (or [0, 1]) that a code stands for."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=signed).to(device)
