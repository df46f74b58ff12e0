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

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize


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

    def load_stack(self, states: Sequence[dict[str, Tensor]], kept: Sequence[KeptMoment]) -> tuple[list[Tensor], Any]:
        """As `load`, of several parameters, each moment (k, ...)."""

    def store_stack(self, stored: Any, values: Sequence[Tensor], skip: Tensor) -> None:
        """As `store`, with `skip` (k, 1, ...); where that is so, the values may be anything."""


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

    def load_stack(self, states: Any, kept: Any) -> Any:  # noqa: D102
        raise NotImplementedError

    def store_stack(self, stored: Any, values: Any, skip: Tensor) -> None:  # noqa: D102
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
        parts (`list[torch.Tensor]`): The bytes of all codes and absmax in the states, flat.
        copy (`torch.Tensor`): Of all of them, one after the other.
        old (`list[Blocks]`): Of each moment, a stack: views of that copy.
    """

    parts: list[Tensor]
    copy: Tensor
    old: list[Blocks]


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
        if codes.dtype is not torch.uint8 or not codes.is_contiguous():
            return None
        absmax = state[kept.key + "_absmax"].shape
        return absmax if len(absmax) > 1 or codes.numel() % BLOCK_SIZE == 0 else None

    def load_stack(
        self, states: Sequence[dict[str, Tensor]], kept: Sequence[KeptMoment]
    ) -> tuple[list[Tensor], BlockStack]:
        """Decoded all at once, from one copy of the bytes of all moments."""
        k, found = len(states), [[_blocks(state, own, None) for state in states] for own in kept]
        parts = [blocks.codes.view(-1) for each in found for blocks in each]
        parts += [blocks.absmax.view(torch.uint8) for each in found for blocks in each]
        copy = torch.cat(parts)
        firsts = [each[0] for each in found]
        places = copy.split([k * b.codes.numel() for b in firsts] + [k * b.absmax.nbytes for b in firsts])
        old, values = [], []
        for first, own, codes, absmax in zip(firsts, kept, places, places[len(kept) :], strict=False):
            stack = Blocks(codes.view(k, *first.codes.shape), absmax.view(torch.float32).view(k, -1), *first[2:])
            values.append(decode(stack.codes, stack.absmax.view(-1), stack.signed, stack.block).to(own.dtype))
            old.append(stack)
        return values, BlockStack(parts, copy, old)

    def store_stack(self, stored: BlockStack, values: Sequence[Tensor], skip: Tensor) -> None:
        """Encoded all at once, and copied back so."""
        for (codes, absmax, block, signed), value in zip(stored.old, values, strict=True):
            new_codes, new_absmax = encode(value.to(torch.float32), signed, block)
            replace_(codes, new_codes.view_as(codes), skip)
            torch.where(skip.view(-1, 1), absmax, new_absmax.view_as(absmax), out=absmax)
            del new_codes, new_absmax  # before the next ones
        torch._foreach_copy_(stored.parts, stored.copy.split([part.numel() for part in stored.parts]))


_DENSE = Dense()


def _blocks(state: dict[str, Tensor], kept: KeptMoment, piece: slice | None) -> Blocks:
    codes, absmax = state[kept.key], state[kept.key + "_absmax"]
    # flat blocks, the last one shorter, or whole blocks in each row
    block = BLOCK_SIZE if absmax.ndim == 1 else codes.shape[1:].numel() // absmax.shape[1]
    absmax = absmax.view(-1)
    if piece is not None:
        codes, absmax = codes.view(-1)[piece], absmax[piece.start // block : -(-piece.stop // block)]
    return Blocks(codes, absmax, block, kept.signed)
