"""Weights in 8 bits: integers and one scale for each row (torchao's layout, `torchao.prototype.quantized_training`).

P of a weight is kept so, too: its scales are those of its rows, each of which is one feature of what is projected.

    W = diag(s) K            K (m, n) int8, the largest of each row 127 in size; s (m,) float32

To read a `Int8Weight` is to dequantise it, for as long as the result is held. What changes it is the optimizer's step
([`round_rows_`]), and `copy_`, as `load_state_dict` calls it, which rounds to nearest.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


MOST = 127
LEAST = 2.0**-100  # scale: a float32 quotient by it stays finite, and so does what a row that was 0 may become
PIECE = 1 << 20  # entries worked on at a time: bounds float32 temporaries to 4 MiB, which caches hold
_COPIES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default)


class Int8Weight(Tensor):
    """A matrix that says it is of a floating-point `dtype`, kept in 8 bits.

    Args:
        int_data (`torch.Tensor`): K.
        scale (`torch.Tensor`): s.
        dtype (`torch.dtype`): What it is read as. One that says `torch.int8` is read as what `to` is told.
    """

    int_data: Tensor
    scale: Tensor
    expected: "Int8Weight | None" = None  # what a state has that came before its model

    @staticmethod
    def __new__(cls, int_data: Tensor, scale: Tensor, dtype: torch.dtype):  # noqa: D102
        shape, device = int_data.shape, int_data.device
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]

    def __init__(self, int_data: Tensor, scale: Tensor, dtype: torch.dtype):
        self.int_data, self.scale = int_data, scale

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["int_data", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], dtype: Any, *_: Any) -> "Int8Weight":
        return cls(parts["int_data"], parts["scale"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _COPIES:
            W = args[0]
            return cls(func(W.int_data), func(W.scale), W.dtype)
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.int8:
            return args[0].plain(dtype=kwargs.get("dtype")).to(device=kwargs.get("device"))
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].copy_rows_(args[1])
            return args[0]
        written = [arg for arg, own in zip(args, func._schema.arguments, strict=False) if own.is_write]
        if any(isinstance(arg, cls) for arg in (*written, kwargs.get("out"))):
            raise RuntimeError(f"{func} would change an int8 weight: use `copy_`, or `hf_osd.unload(model)` before.")
        return func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs))

    @classmethod
    def from_float(cls, W: Tensor) -> "Int8Weight":
        """W (m, n), rounded to nearest."""
        scale = torch.empty(W.shape[0], dtype=torch.promote_types(W.dtype, torch.float32), device=W.device)
        own = cls(torch.empty(W.shape, dtype=torch.int8, device=W.device), scale, W.dtype)
        own.copy_rows_(W.detach())
        return own

    @torch.no_grad()
    def copy_rows_(self, W: Tensor) -> None:
        """Be another int8 weight; or W (m, n) rounded to nearest, some rows at a time, or what is expected."""
        if isinstance(W, Int8Weight):
            self.int_data.copy_(W.int_data)
            self.scale.copy_(W.scale)
            return
        for rows in self.pieces():
            self.int_data[rows], self.scale[rows] = _nearest(W[rows].to(self.device, self.scale.dtype, copy=True))
        if self.expected is not None and self.become_(self.expected):
            self.expected = None

    @torch.no_grad()
    def become_(self, W: "Int8Weight") -> bool:
        """Be W, bit for bit, if this is W after it was read and rounded to nearest, or is W; whether it is."""
        same = all(self._is(W, rows) or self._is_rounded(W, rows) for rows in self.pieces())
        if same:
            self.copy_rows_(W)
        return same

    def _is(self, W: "Int8Weight", rows: slice) -> bool:
        return torch.equal(self.int_data[rows], W.int_data[rows]) and torch.equal(self.scale[rows], W.scale[rows])

    def _is_rounded(self, W: "Int8Weight", rows: slice) -> bool:
        K, s = _nearest(W.rows(rows).to(W.dtype).to(self.scale.dtype, copy=True))
        last = 4 * torch.finfo(s.dtype).eps  # a GPU divides by 127 otherwise than a CPU
        return torch.equal(self.int_data[rows], K.to(torch.int8)) and torch.allclose(self.scale[rows], s, last, 0)

    @torch.no_grad()
    def reads_as(self, W: Tensor) -> bool:
        """Whether W, plain, is what this is read as, or was, before it was given another dtype."""
        return all(torch.equal(self.rows(rows).to(self.dtype).to(W), W[rows]) for rows in self.pieces())

    def rows(self, rows: slice) -> Tensor:
        """Some rows, in the precision of the scales."""
        return self.int_data[rows].to(self.scale.dtype).mul_(self.scale[rows, None])

    def convert_(self, like: Tensor) -> None:
        """Be on the device of another tensor, and read as its dtype."""
        self.int_data = self.int_data.to(like.device)
        self.scale = self.scale.to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.data = Int8Weight(self.int_data, self.scale, like.dtype)  # what torch knows of it

    def pieces(self) -> list[slice]:
        """Slices of some rows each; on the meta device one, which allocates what any does."""
        m, n = self.shape
        step = max(1, PIECE // max(1, n))
        starts = range(0, m, step)
        return [slice(start, min(start + step, m)) for start in (starts[:1] if self.is_meta else starts)]

    def plain(self, dtype: torch.dtype | None = None) -> Tensor:
        """All of it, as a plain tensor; in the scales' precision where no float dtype is known."""
        dtype = dtype or self.dtype
        dtype = dtype if dtype.is_floating_point else self.scale.dtype
        W = torch.empty(self.shape, dtype=dtype, device=self.device)
        # rounded once: divided by the scales it is K again
        if not self.is_cpu:
            return torch.mul(self.int_data, self.scale[:, None], out=W)
        for rows in self.pieces():  # twice as fast there as a product of two dtypes
            W[rows] = self.rows(rows)
        return W

    def move_(self, X: Tensor, noise: torch.Generator) -> None:
        """Be X (m, n), rounded at random such that the mean is X; what X has not changed stays the same to the bit."""
        for rows in self.pieces():
            own = self.rows(rows)
            K = torch.sub(X[rows], own, out=own).div_(self.scale[rows, None]).add_(self.int_data[rows])
            self.round_rows_(K, rows, noise)

    def round_rows_(self, X: Tensor, rows: slice, noise: torch.Generator) -> None:
        """Rows of K <- X, (.., n) in units of their old scales, at random such that the mean is X; s as X needs it.

        With X = K both stay the same to the bit. What is below 2^-16 of a unit is lost. Changes X.
        """
        most = torch.maximum(X.amax(1), X.amin(1).neg_())
        factor = torch.where(most > 0, MOST / most, 1.0).clamp_(max=self.scale[rows] / LEAST)
        X.mul_(factor[:, None])
        self.scale[rows] = self.scale[rows] / factor
        # K = round(X + u), -1/2 < u < 1/2 an odd multiple of 2^-16, whose mean is 0; float32 has 2^-17 at 127
        words = torch.empty(-(-X.numel() // 4), dtype=torch.int64, device=X.device)
        words.random_(-(1 << 63), None, generator=noise).bitwise_or_(0x0001_0001_0001_0001)
        bits = words.view(torch.int16)[: X.numel()].view_as(X)
        self.int_data[rows] = X.add_(bits.to(X.dtype), alpha=2**-16).round_()


def _nearest(X: Tensor) -> tuple[Tensor, Tensor]:
    """K, in the dtype of X, and s of rows X, (.., n), rounded to nearest. Changes X."""
    most = X.abs().amax(1)
    s = torch.where(most > 0, (most / MOST).clamp_(min=LEAST), 1.0)
    return X.div_(s[:, None]).round_(), s


def plain(W: Any) -> Any:
    """A plain tensor instead of an int8 weight; anything else itself."""
    return W.plain() if isinstance(W, Int8Weight) else W


def parts_of(X: Tensor) -> tuple[Tensor, ...]:
    """What an int8 weight is kept in; nothing for any other tensor."""
    return (X.int_data, X.scale) if isinstance(X, Int8Weight) else ()


def held_bytes(X: Tensor) -> int:
    """Bytes that a tensor takes, which of an int8 weight are not those that it is read as."""
    return sum(part.nbytes for part in parts_of(X)) or X.nbytes


def quantize_(p: nn.Parameter, name: str) -> None:
    """Let a parameter be an int8 weight from now on, for all who hold it.

    Raises:
        ValueError: For one that somebody refers to weakly, as an optimizer of ours does that is still there, and for
            one that is not finite.
    """
    if isinstance(p, Int8Weight):
        return
    if not p.is_meta and not torch.stack(p.detach().aminmax()).isfinite().all():
        raise ValueError(f"{name} holds nan or infinity, which 8 bits cannot: load the model anew.")
    try:
        torch.utils.swap_tensors(p, nn.Parameter(Int8Weight.from_float(p), p.requires_grad))
    except RuntimeError as error:
        raise ValueError(
            f"{name} cannot be made int8, for another optimizer holds it, or a compiled function: delete that first."
        ) from error
