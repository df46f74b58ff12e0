"""How large the files will be, from shapes alone."""

from collections.abc import Iterable

import torch

from ..optim.options import table as options
from ..optim.options.rules import rules_of
from ..optim.step.geometry import ProjectedGeometry, geometry_of
from ..optim.step.state import P_ENTRIES, saved_projection, state_spec
from ..subspace import choose_side


def projection_bytes(
    shapes: Iterable[tuple[int, ...]],
    rank: int,
    include_moments: bool = False,
    *,
    side: str = "auto",
    projection_dtype: str = "float32",
    weight_rule: str = "adamw",
    projection_rule: str | None = None,
    subspace: str = "online_pca",
) -> int:
    """Bytes of P for weights of these shapes, as they will be saved; headers, some 100 bytes a tensor, not counted.

    With `source="activations"` layers that are given one input share P: give one shape for each input, and the side of
    the inputs, `right` for an `nn.Linear`. `hf-osd estimate` finds the inputs.

    Args:
        shapes (`Iterable[tuple[int, ...]]`): (m, n) of each projected weight, or (E, m, n) of a stack of experts'.
        rank (`int`): r; clipped to min(m, n) for each.
        include_moments (`bool`, *optional*, defaults to `False`): Add all other state of the projected weights.
        side (`str`, *optional*, defaults to `"auto"`): As in [`OSD`].
        projection_dtype (`str`, *optional*, defaults to `"float32"`): `float32`, `bfloat16` or
            `int8`, which is saved as `float32`.
        weight_rule, projection_rule, subspace: As in [`OSD`]; they matter with `include_moments` only.

    Raises:
        ValueError: For an option that [`OSD`] would refuse, and for shapes that are neither.

    Example:
    ```python
    >>> from hf_osd.hub import projection_bytes

    >>> projection_bytes([(4096, 11008)], rank=128)  # 4096 * 128 * 4
    2097152

    ```
    """
    group = options.DEFAULTS | {
        "rank": rank,
        "side": side,
        "projection_dtype": None if projection_dtype == "float32" else projection_dtype,
        "weight_rule": weight_rule,
        "projection_rule": projection_rule,
        "subspace": subspace,
    }
    options.validate(group, "projection_bytes")
    rules, total = rules_of(group), 0
    for shape in shapes:
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"`shapes` must hold (m, n) or (E, m, n) of positive sizes, got {tuple(shape)}.")
        own = group | {"sides": [choose_side(shape[-2], shape[-1], side)], "param_names": [""]}
        geometry = geometry_of(own, 0, torch.empty(shape, device="meta"), 0)
        assert isinstance(geometry, ProjectedGeometry)
        total += saved_projection(geometry).nbytes
        if include_moments:
            total += sum(entry.nbytes for name, entry in state_spec(geometry, rules).items() if name not in P_ENTRIES)
    return total
