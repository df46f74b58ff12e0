"""The rows of the conformance table: every entry of every axis in some combination, and small problems to run them."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_osd import OSD


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from own_subspace_rule import Oja  # noqa: E402


# P is renewed at step 3 and moments are saved at step 5, in the middle of an interval
EVERY_3 = {"update_interval": 3}
TWO_SIDED, SCALED, SIGN, CARRY = (
    {"side": "two_sided"},
    {"residual": "scaled"},
    {"residual": "sign"},
    {"carry_moments": True},
)

ROWS: dict[str, dict[str, Any]] = {
    "online_pca": {},
    "online_pca_left_lion": {"side": "left", "weight_rule": "lion"},
    "online_pca_right_adafactor": {"side": "right", "weight_rule": "adafactor", "projection_rule": "sgd"},
    "online_pca_two_sided": TWO_SIDED,
    "online_pca_two_sided_carry": TWO_SIDED
    | CARRY
    | {"weight_rule": "lion", "projection_rule": "adamw", "init": "orthonormal"},
    "online_pca_two_sided_8bit": TWO_SIDED | {"weight_rule": "adamw8bit"} | SCALED,
    "online_pca_interval": {"projection_interval": 3, "weight_rule": "sgd"},
    "online_pca_scaled": SCALED,
    "online_pca_scaled_half": SCALED | {"residual_scale": 0.5},
    "online_pca_sign": SIGN | {"residual_scale": 0.1},
    "online_pca_carry": CARRY,
    "online_pca_carry_8bit": CARRY | {"weight_rule": "adamw8bit"},
    "online_pca_low_precision": CARRY | {"projection_dtype": "bfloat16", "moment_dtype": "bfloat16"},
    "online_pca_low_precision_int8": {"projection_dtype": "int8"},
    "svd": EVERY_3,
    "svd_randomized_two_sided": EVERY_3 | TWO_SIDED | {"init": "randomized_svd", "weight_rule": "sgd"},
    "svd_two_sided_restart": EVERY_3 | TWO_SIDED | {"restart_moments": True, "weight_rule": "adafactor"},
    "svd_carry_scaled": EVERY_3 | CARRY | SCALED,
    "random": EVERY_3,
    "random_gaussian": EVERY_3 | {"distribution": "gaussian"},
    "random_sign": EVERY_3 | SIGN | {"weight_rule": "lion", "residual_scale": 0.1},
    "random_unbiased_restart_8bit": EVERY_3 | {"unbiased": True, "restart_moments": True, "weight_rule": "adamw8bit"},
    "random_two_sided_carry": EVERY_3 | TWO_SIDED | CARRY,
    "cosine": EVERY_3,
    "cosine_right_carry": EVERY_3 | CARRY | {"side": "right", "weight_rule": "sgd"},
    "cosine_two_sided_scaled": EVERY_3 | TWO_SIDED | SCALED,
    "importance": EVERY_3,
    "importance_two_sided_8bit": EVERY_3 | TWO_SIDED | {"weight_rule": "lion8bit"},
    "importance_randomized_carry": EVERY_3 | CARRY | {"init": "randomized_svd", "side": "left"},
    "power": {},
    "power_lion_carry": CARRY | {"weight_rule": "lion", "side": "right", "mixing": 0.5},
    "power_sgd_interval": {"weight_rule": "sgd", "mixing": 0.0, "projection_interval": 2},
    "power_8bit_carry_scaled": CARRY | SCALED | {"weight_rule": "adamw8bit"},
    "static_sign_adafactor": SIGN | {"weight_rule": "adafactor", "init": "orthonormal", "residual_scale": 0.1},
    "own": {},
    "own_8bit_carry_scaled": CARRY | SCALED | {"weight_rule": "lion8bit"},
}
RULE_OF: dict[str, Any] = {name: name.split("_")[0] for name in ROWS}
RULE_OF |= {name: "online_pca" for name in ROWS if name.startswith("online_pca")}
RULE_OF |= {name: Oja(every=2) for name in ROWS if name.startswith("own")}
EIGHT_BIT = [name for name in ROWS if "8bit" in name]
STEPS, SAVED_AT = 8, 5


def options_of(row: str) -> dict[str, Any]:
    """The options of [`OSD`] that a row stands for."""
    return {"subspace": RULE_OF[row], "weight_decay": 0.1, **ROWS[row]}


def shapes_of(row: str) -> tuple[list[tuple[int, int]], int]:
    """A wide and a tall matrix, and a rank at which 8-bit moments are kept in 8 bits."""
    return ([(96, 160), (160, 96)], 64) if row in EIGHT_BIT else ([(12, 20), (20, 12)], 4)


def weights(row: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5).to(dtype))
        for shape in shapes_of(row)[0]
    ]


def make(row: str, params: Iterable[nn.Parameter], lr: float = 1e-2, **options: Any) -> OSD:
    params = [(f"W{i}", p) for i, p in enumerate(params)]
    return OSD([{"params": params, "rank": shapes_of(row)[1]}], lr=lr, **(options_of(row) | options))


def gradients(step: int, params: list[nn.Parameter]) -> list[Tensor]:
    """A signal of low rank, noise, and sizes that change."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for p in params:
        m, n = p.shape[-2:]
        signal = torch.randn(*p.shape[:-2], m, 3, generator=generator) @ torch.randn(
            *p.shape[:-2], 3, n, generator=generator
        )
        found.append(((signal + torch.randn(p.shape, generator=generator)) * (1 + step % 3)).to(p.dtype))
    return found


def run(
    params: list[nn.Parameter], optimizer: OSD, steps: range, change: Callable[[Tensor], None] | None = None
) -> None:
    for step in steps:
        for p, G in zip(params, gradients(step, params), strict=True):
            p.grad = G
            if change is not None:
                change(p.grad)
        optimizer.step()


def backward(params: list[nn.Parameter], step: int) -> float:
    """Loss of a product of the two matrices on a batch, with gradients."""
    first, second = params
    generator = torch.Generator().manual_seed(step % 4)
    X = torch.randn(first.shape[1], 64, generator=generator).to(first.dtype)
    loss = (second @ (first @ X) - torch.roll(X, 1, 0)).float().square().mean()
    loss.backward()
    return loss.item()


def state_of(optimizer: OSD) -> list[dict[str, Tensor]]:
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def assert_same(ours: tuple[list[nn.Parameter], OSD], others: tuple[list[nn.Parameter], OSD]) -> None:
    """Bit for bit."""
    for p, q in zip(ours[0], others[0], strict=True):
        assert torch.equal(p, q)
    for state, other in zip(state_of(ours[1]), state_of(others[1]), strict=True):
        assert state.keys() == other.keys()
        for name, value in state.items():
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
