"""How a moment is kept between steps: as floats, or block-wise in 8 bits. A format, never an algorithm.

A rule always computes in full precision on decoded tensors. `load` and `store` take flat slices, so that a large
parameter is decoded piece by piece.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .blockwise import decode, encode, replace_
from .protocol import KeptMoment


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
    """A format for moments, which are loaded whole and in their shape, or as a flat piece.

    Attributes:
        stackable (`bool`): Whether there are `load_stack` and `store_stack`: it keeps others than it computes with.
    """

    stackable: ClassVar[bool]

    def spec(self, kept: KeptMoment, divided: int | None = None) -> dict[str, TensorSpec]:
        """The entries of the optimizer state that hold this moment, whose dimension `divided` is sharded."""

    def load(self, state: dict[str, Tensor], kept: KeptMoment, piece: slice | None) -> tuple[Tensor, Any]:
        """The moment in the precision of the computation, and what `store` needs; `None` if it is the stored one."""

    def store(self, stored: Any, value: Tensor, skip: Tensor) -> None:
        """Keep what `load` gave, after the rule has updated it; nothing changes where `skip`."""

    def form(self, state: dict[str, Tensor], kept: KeptMoment) -> tuple[int, ...] | None:
        """What this moment, as it is in a state, and others share where they can be stacked; `None`: it cannot."""

    def load_stack(self, states: Sequence[dict[str, Tensor]], kept: KeptMoment) -> tuple[Tensor, Any]:
        """As `load`, the moments of several parameters, (k, ...)."""

    def store_stack(self, stored: Any, value: Tensor, skip: Tensor) -> None:
        """As `store`, with `skip` (k, 1, ...); where that is so, `value` may be anything."""


@dataclass(frozen=True)
class Dense:
    """One float tensor.

    Args:
        dtype (`torch.dtype`, *optional*):
            Of moments with a sign. Defaults to the precision of the computation (float32; float64 for float64
            weights), in which case the rule works on the stored tensor itself. Second moments always have that
            precision: bfloat16 rounds 0.999 v back to v, so they could never fall.
    """

    dtype: torch.dtype | None = None

    stackable: ClassVar[bool] = False  # there is nothing to decode, or one launch

    def spec(self, kept: KeptMoment, divided: int | None = None) -> dict[str, TensorSpec]:
        """One entry."""
        dtype = self.dtype if self.dtype is not None and kept.signed else kept.dtype
        return {kept.key: TensorSpec(kept.shape, dtype, divided)}

    def load(self, state: dict[str, Tensor], kept: KeptMoment, piece: slice | None) -> tuple[Tensor, Tensor | None]:
        """The stored tensor itself where the dtypes agree."""
        stored = state[kept.key]
        if piece is not None:
            stored = stored.view(-1)[piece]
        return (stored, None) if stored.dtype == kept.dtype else (stored.to(kept.dtype), stored)

    def store(self, stored: Tensor, value: Tensor, skip: Tensor) -> None:
        """Round `value` into the stored tensor."""
        stored.copy_(value)  # a skipped step left `value` as it was decoded: rounding gives it back exactly

    def form(self, state: dict[str, Tensor], kept: KeptMoment) -> tuple[int, ...] | None:
        """None: see `stackable`."""
        return None

    def load_stack(self, states: Sequence[dict[str, Tensor]], kept: KeptMoment) -> tuple[Tensor, Any]:  # noqa: D102
        raise NotImplementedError

    def store_stack(self, stored: Any, value: Tensor, skip: Tensor) -> None:  # noqa: D102
        raise NotImplementedError


class Blocks(NamedTuple):
    """A piece of a moment in 8 bits.

    Attributes:
        codes (`torch.Tensor`): uint8, one for each element.
        absmax (`torch.Tensor`): float32, one for each block.
        block (`int`): Elements of a block.
        signed (`bool`): Which map the codes are from.
    """

    codes: Tensor
    absmax: Tensor
    block: int
    signed: bool


class BlockStack(NamedTuple):
    """Moments of several parameters in 8 bits.

    Attributes:
        codes (`tuple[torch.Tensor, ...]`): Of each.
        absmax (`tuple[torch.Tensor, ...]`): Of each, flat.
        old (`Blocks`): Copies of both, stacks.
    """

    codes: tuple[Tensor, ...]
    absmax: tuple[Tensor, ...]
    old: Blocks


@dataclass(frozen=True)
class BlockWise8bit:
    """One byte per element and one float32 absmax per 256, through bitsandbytes' block-wise kernels.

    Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861. Small moments stay dense.

    Where rows are divided among processes no block spans two of them, so that codes and absmax can be divided anew:
    blocks are the largest that rows divide into, down to 64 elements. Other divided moments stay dense.
    """

    stackable: ClassVar[bool] = True

    def spec(self, kept: KeptMoment, divided: int | None = None) -> dict[str, TensorSpec]:
        """Codes in the shape of the moment, and their absmax."""
        numel = torch.Size(kept.shape).numel()
        absmax: tuple[int, ...] = (-(-numel // BLOCK_SIZE),)
        if divided is not None:
            row = torch.Size(kept.shape[1:]).numel()
            block = math.gcd(row, BLOCK_SIZE)
            absmax = (kept.shape[0], row // block)
        if numel < MIN_8BIT_SIZE or divided is not None and (divided > 0 or block < MIN_BLOCK_SIZE):
            return _DENSE.spec(kept, divided)
        return {
            kept.key: TensorSpec(kept.shape, torch.uint8, divided),
            kept.key + "_absmax": TensorSpec(absmax, torch.float32, divided),
        }

    def load(
        self, state: dict[str, Tensor], kept: KeptMoment, piece: slice | None
    ) -> tuple[Tensor, Tensor | Blocks | None]:
        """Decoded; a piece must start at a block."""
        if state[kept.key].dtype != torch.uint8:
            return _DENSE.load(state, kept, piece)
        stored = _blocks(state, kept, piece)
        value = decode(stored.codes, stored.absmax, stored.signed, stored.block)
        return value.to(kept.dtype), stored

    def store(self, stored: Tensor | Blocks, value: Tensor, skip: Tensor) -> None:
        """Encoded. Codes are kept where `skip`: quantising what was decoded does not always give the same codes."""
        if isinstance(stored, Tensor):
            return _DENSE.store(stored, value, skip)
        codes, absmax, block, signed = stored
        value = value.to(torch.float32).contiguous()  # bitsandbytes before 0.50 takes it for that
        new_codes, new_absmax = encode(value, signed, block)
        replace_(codes, new_codes.view_as(codes), skip)
        torch.where(skip, absmax, new_absmax, out=absmax)

    def form(self, state: dict[str, Tensor], kept: KeptMoment) -> tuple[int, ...] | None:
        """Shape of the absmax, where it is in 8 bits and blocks do not reach from one parameter into the next.

        A loaded state may be dense, or have blocks of rows, where `spec` has neither: that of divided parameters.
        """
        codes = state[kept.key]
        if codes.dtype is not torch.uint8:
            return None
        absmax = state[kept.key + "_absmax"].shape
        return absmax if len(absmax) > 1 or codes.numel() % BLOCK_SIZE == 0 else None

    def load_stack(self, states: Sequence[dict[str, Tensor]], kept: KeptMoment) -> tuple[Tensor, BlockStack]:
        """Decoded all at once."""
        codes, absmax, blocks, _ = zip(*(_blocks(state, kept, None) for state in states), strict=True)
        old = Blocks(torch.stack(codes), torch.stack(absmax), blocks[0], kept.signed)
        value = decode(old.codes, old.absmax.view(-1), old.signed, old.block)
        return value.to(kept.dtype), BlockStack(codes, absmax, old)

    def store_stack(self, stored: BlockStack, value: Tensor, skip: Tensor) -> None:
        """Encoded all at once."""
        codes, absmax, old = stored
        new_codes, new_absmax = encode(value.to(torch.float32), old.signed, old.block)
        replace_(old.codes, new_codes.view_as(old.codes), skip)
        torch.where(skip.view(-1, 1), old.absmax, new_absmax.view_as(old.absmax), out=old.absmax)
        torch._foreach_copy_(codes, old.codes.unbind())
        torch._foreach_copy_(absmax, old.absmax.unbind())


_DENSE = Dense()


def _blocks(state: dict[str, Tensor], kept: KeptMoment, piece: slice | None) -> Blocks:
    codes, absmax = state[kept.key], state[kept.key + "_absmax"]
    # flat blocks, the last one shorter, or whole blocks in each row
    block = BLOCK_SIZE if absmax.ndim == 1 else codes.shape[1:].numel() // absmax.shape[1]
    absmax = absmax.view(-1)
    if piece is not None:
        codes, absmax = codes.view(-1)[piece], absmax[piece.start // block : -(-piece.stop // block)]
    return Blocks(codes, absmax, block, kept.signed)
