"""Moments of a whole parameter as a checkpoint has them whose processes divided that."""

from typing import Any

import torch
from torch import Tensor

from hf_osd import OSD
from hf_osd.optim.step.state import divided_specs
from hf_osd.update_rules.blockwise import encode


def divide_moments(entries: dict[str, Any], optimizer: OSD, p: Tensor, dim: int) -> None:
    """
    Let the 8-bit moments in a saved state be dense, or in blocks of rows, as of a parameter divided at a dimension.

    Args:
        entries: The saved state of the parameter; changed in place.
        optimizer: That it is of.
        p: The parameter.
        dim: Dimension of the parameter.
    """
    weight = optimizer.weight_of(p)
    spec = divided_specs(weight.geometry, weight.rules)[dim]
    for moments in (weight.moments, weight.P.moments):
        for _, kept in moments.kept:
            if entries[kept.key].dtype != torch.uint8:
                continue
            value, _ = moments.storage.load(entries, kept, None)
            del entries[f"{kept.key}_absmax"]
            entries[kept.key] = value
            if spec[kept.key].dtype == torch.uint8:
                shape = spec[f"{kept.key}_absmax"].shape
                codes, absmax = encode(value.contiguous(), kept.signed, value.numel() // torch.Size(shape).numel())
                entries |= {kept.key: codes.view_as(value), f"{kept.key}_absmax": absmax.view(shape)}
