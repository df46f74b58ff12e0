"""Gradients averaged over processes in the subspace: r (m + n) numbers for each weight instead of m n.

R is linear in G, so the average of the processes' R is R of the averaged gradient; and with that R, the average of
their G_i Rᵀ is A of the averaged gradient. Both are exact. Only the norm of the averaged gradient cannot be had from
them. Its stand-in is

    ||G||² ~ mean ||G_i||² * ||R||² / mean ||R_i||²

that is, the part outside the subspace is taken to shrink in the average as much as the part inside does. It scales P's
gradient (which Adam and Lion do not see but beside the orthogonality term), and it is what clipping goes by; never the
update of the weights.

Letters and shapes as in `subspace.operators`; G_i is the gradient of process i.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..step.geometry import Geometry, ProjectedGeometry
from ..step.low_rank import LowRank


def world_size() -> int:
    """Processes that train together; 1 outside `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_(*tensors: Tensor) -> None:
    """Replace tensors of one dtype by their mean over all processes, in one exchange."""
    flat = torch.cat([X.reshape(-1) for X in tensors]) if len(tensors) > 1 else tensors[0].contiguous()
    flat.div_(world_size())  # before the sum, as DDP does: half precision does not overflow
    dist.all_reduce(flat)
    parts = flat.split([X.numel() for X in tensors]) if len(tensors) > 1 else [flat]
    for X, part in zip(tensors, parts, strict=True):
        if X.data_ptr() != part.data_ptr():
            X.copy_(part.view_as(X))


def average_projected(
    lows: Sequence[LowRank | None],  # of this process; A is made anew
    G: Tensor,  # (m, n) gradient of this process, or a stack (E, m, n)
    energy: Tensor,  # ||G_i||², () or (E,)
    geometry: ProjectedGeometry,
) -> tuple[list[LowRank | None], Tensor]:
    """R and A of the averaged gradient, and the stand-in for its squared norm."""
    own = [low for low in lows if low is not None]
    assert len(own) == geometry.matrices  # those without a P are exchanged whole
    norms = torch.stack([energy, squared_norms_of_R(lows, energy)])
    Rs = [low.R.to(G.dtype, copy=True) for low in own]  # in the precision that G would be exchanged in
    average_(*Rs)
    average_(norms)
    matrices = G.unbind() if geometry.stacked else (G,)
    As = [geometry.op.correlate(G_e, R) for low, G_e, R in zip(own, matrices, Rs, strict=True) if low.A is not None]
    if As:
        average_(*As)
    made = iter(As)
    averaged: list[LowRank | None] = []
    for low, R in zip(own, Rs, strict=True):
        averaged.append(LowRank(R.to(low.R.dtype), None if low.A is None else next(made).to(low.A.dtype)))
    return averaged, norm_stand_in(norms[0], averaged, norms[1])


def average_window_(lows: Sequence[LowRank | None], energy: Tensor, R_energy: Tensor) -> None:
    """Average R, A and the energies of an accumulation window, whose A each process has made with its own R."""
    average_(*(X for low in lows if low is not None for X in low if X is not None), energy, R_energy)


def squared_norms_of_R(lows: Sequence[LowRank | None], like: Tensor) -> Tensor:
    """||R||² of each matrix, zero without one, in the shape of `like`: () or (E,)."""
    zero = like.new_zeros(())
    return torch.stack([zero if low is None else low.R.square().sum() for low in lows]).view_as(like)


def norm_stand_in(energy: Tensor, lows: Sequence[LowRank | None], R_energy: Tensor) -> Tensor:
    """||G||² of a mean or sum of gradients, from the mean or sum of their ||G_i||² and ||R_i||² and its R."""
    # Where nothing lies in the subspace (0 / 0) the parts' own; a broken gradient stays one.
    return torch.where(R_energy == 0, energy, energy * (squared_norms_of_R(lows, energy) / R_energy))


class _Broadcast:
    """Forward pre-hook: gives every process the parameters of the first one, once. DDP does so for those it knows."""

    def __init__(self, params: Sequence[nn.Parameter]):
        self.params: Sequence[nn.Parameter] = params
        self.handle: torch.utils.hooks.RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: object) -> None:
        if self.handle is not None:
            self.handle.remove()
        if world_size() > 1:
            with torch.no_grad():
                for p in self.params:
                    dist.broadcast(p.data, src=0)
        self.params = ()


def exclude_from_ddp(model: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """Tell DDP, which is to wrap `model` later, to leave these parameters' gradients to the optimizer.

    Raises:
        ValueError: If `model` is wrapped already: DDP has its buckets by then.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "`ddp_compression` must be known before the model is wrapped: create the optimizer from the bare model, "
            "then wrap it."
        )
    include_in_ddp(model)
    chosen, names = set(params), set()
    for name, p in model.named_parameters(remove_duplicate=False):
        if p in chosen:
            names |= {name, name if "." in name else f".{name}"}  # DDP's two spellings for the root's own
    broadcast = _Broadcast([p for p in model.parameters() if p in chosen])
    broadcast.handle = model.register_forward_pre_hook(broadcast)
    before = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = sorted(before | names)  # type: ignore[assignment]
    model._excluded_by_osd = (names - before, broadcast)  # type: ignore[assignment]


def include_in_ddp(model: nn.Module) -> None:
    """Undo `exclude_from_ddp`: with another optimizer, nobody else would average these gradients."""
    names, broadcast = vars(model).pop("_excluded_by_osd", (set(), None))
    if broadcast is not None:
        broadcast.handle.remove()
        ignored = set(model._ddp_params_and_buffers_to_ignore)  # type: ignore[arg-type]
        model._ddp_params_and_buffers_to_ignore = sorted(ignored - names)  # type: ignore[assignment]


def exchange_bytes(geometries: Iterable[Geometry], dtypes: Iterable[torch.dtype]) -> tuple[int, int]:
    """Bytes that one process contributes to a step's exchanges: in the subspace, and of whole gradients.

    Args:
        geometries (`Iterable[Geometry]`): The parameters', `OSD.weight_of(p).geometry`.
        dtypes (`Iterable[torch.dtype]`): Their gradients' dtypes.
    """
    compressed = whole = 0
    for geometry, dtype in zip(geometries, dtypes, strict=True):
        numel = torch.Size(geometry.shape).numel() * dtype.itemsize
        whole += numel
        if isinstance(geometry, ProjectedGeometry):
            numbers, norms = geometry.rank * sum(geometry.size), 3 if geometry.stacked else 2
            wide = torch.promote_types(dtype, torch.float32)
            compressed += geometry.matrices * (numbers * dtype.itemsize + norms * wide.itemsize)
        else:
            compressed += numel
    return compressed, whole
