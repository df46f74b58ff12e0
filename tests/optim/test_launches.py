"""How many kernels a step launches for each projected weight on a GPU.

They are counted on the meta device, for which the package takes the same way: an operator that computes is a launch,
and so is one that works through many tensors.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from hf_osd import OSD
from hf_osd.estimate.live_bytes import LiveBytes, meta_device


BLOCK = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]  # of LLaMA 60M, which has 8 of them
NO_KERNEL = (
    *("empty", "new_empty", "promote_types", "_local_scalar_dense", "_unsafe_view"),
    *("_record_function_enter_new", "_record_function_exit"),
)


class Launches(LiveBytes):
    """Counts operators that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if not func.is_view and name not in NO_KERNEL:
            self.found[name] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def launches(dtype: torch.dtype = torch.float32, **options: Any) -> Counter[str]:
    """Of the third step of all blocks."""
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in BLOCK * 8]
    optimizer = OSD([{"params": params, "rank": 128}], lr=1e-3, init="orthonormal", **options)
    for p in params:
        p.grad = torch.empty_like(p)
    with meta_device():
        for _ in range(3):
            with Launches() as counter:
                optimizer.step()
    return counter.found


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"weight_rule": "adamw8bit"}, 12),
        ({"weight_rule": "lion8bit"}, 12),
        ({"weight_rule": "adamw8bit", "weight_decay": 0.1}, 12),
        ({"weight_rule": "adamw"}, 10),
        *(
            ({"weight_rule": rule, "dtype": torch.bfloat16} | more, most)
            for rule, most in (("adamw8bit", 11.5), ("lion8bit", 11.5), ("adamw", 14))  # adamw casts R and D of each
            for more in ({}, {"weight_decay": 0.1}, {"projection_dtype": "bfloat16"})
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_launches_for_a_weight(options: dict[str, Any], most: float):
    found = launches(**options)
    weights = 8 * len(BLOCK)
    print(options, {name: round(count / weights, 2) for name, count in found.most_common()})
    assert found.total() / weights < most
