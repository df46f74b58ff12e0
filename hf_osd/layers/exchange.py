"""What data-parallel processes tell each other of their layers' inputs. R they average as any gradient.

Letters and shapes as in `shared_input`.
"""

import os
import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .int8 import Int8Weight
from .shared_input import SharedInput


def in_a_process_of_many() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def ddp_may_come() -> bool:
    """Whether DDP may be going to wrap the model, not FSDP2, as far as accelerate knows."""
    accelerate: Any = sys.modules.get("accelerate.state")
    known = {} if accelerate is None else accelerate.AcceleratorState._shared_state
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    fsdp = str(getattr(known["distributed_type"], "value", "")) == "FSDP" if "distributed_type" in known else asked
    return in_a_process_of_many() and not fsdp


def group_of_ddp() -> tuple[Any, Any]:
    """The processes of the DDP whose forward pass this is, and a weak reference to it.

    `None` and one to nothing outside of one, and where it has but one process.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or dist.get_world_size(ddp.process_group) == 1:
        return None, lambda: None
    return ddp.process_group, weakref.ref(ddp)


def all_holders(holders: Mapping[str, str], group: Any) -> dict[str, str]:
    """What all processes have found of layers that share an input: some may not have called all of them."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, dict(holders), group=group)
    found: dict[str, str] = {}
    for own in every:
        for name, holder in own.items():
            if found.setdefault(name, holder) != holder:
                raise ValueError(
                    f"{name} shares its input with {found[name]} on one process and with {holder} on another: leave "
                    "source='activations' out for it (`exclude_modules`)."
                )
    return found


def share_int8(weights: Iterable[Tensor], group: Any) -> None:
    """Give all processes the int8 weights of the first, bit for bit: DDP has given them what those are read as."""
    for W in weights:
        for part in (W.int_data, W.scale) if isinstance(W, Int8Weight) else ():
            dist.broadcast(part, group=group, group_src=0)


def add_energies(inputs: Iterable[SharedInput], group: Any) -> None:
    """Replace ||x||² of each input by its sum over the processes, which keep A of their own tokens: one exchange.

    Args:
        inputs (`Iterable[SharedInput]`): Those whose P the processes divide.
        group (`ProcessGroup`): The processes.
    """
    alike: dict[tuple, list[SharedInput]] = {}
    for shared in inputs:
        if shared.P is not None and shared.learns:
            alike.setdefault((shared.P.device, shared.first.dtype), []).append(shared)
    for (device, dtype), members in alike.items():
        none = torch.zeros((), dtype=dtype, device=device)
        found = torch.stack([none if shared.energy is None else shared.norm2().to(dtype) for shared in members])
        dist.all_reduce(found, group=group)
        for shared, energy in zip(members, found.unbind(), strict=True):
            shared.energy = energy


def average_inputs(inputs: Mapping[SharedInput, torch.dtype], group: Any) -> None:
    """Replace A and ||x||² of each input by their mean over the processes: one exchange for all.

    Args:
        inputs (`Mapping[SharedInput, torch.dtype]`): With the precision that R is exchanged in: A is in the same.
        group (`ProcessGroup`): The processes.
    """
    alike: dict[tuple, list[SharedInput]] = {}
    for shared, dtype in inputs.items():
        if shared.P is not None and shared.learns:
            alike.setdefault((shared.P.device, dtype), []).append(shared)
    for (device, dtype), members in alike.items():
        parts: list[Tensor] = []
        for shared in members:
            assert shared.P is not None
            none = torch.zeros((), dtype=dtype, device=device)
            parts += [torch.zeros_like(shared.P, dtype=dtype) if shared.A is None else shared.A.to(dtype)]
            parts += [none if shared.energy is None else shared.energy.to(dtype)]
        flat = torch.cat([part.reshape(-1) for part in parts]).div_(dist.get_world_size(group))
        dist.all_reduce(flat, group=group)
        means = flat.split([part.numel() for part in parts])
        views = iter([mean.view_as(part) for mean, part in zip(means, parts, strict=True)])
        for shared in members:
            shared.A, shared.energy = next(views).to(shared.first.dtype), next(views).to(shared.first.dtype)
            shared.averaged = True
