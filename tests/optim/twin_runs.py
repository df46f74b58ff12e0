"""`OSD` and the readable twin side by side, on gradients with a slowly turning subspace."""

import torch

from hf_osd import OSD
from reference.twin import Twin


SHAPES = {"left": (9, 14), "right": (14, 9)}
RANK = 4


def gradients(shape: tuple[int, int], steps: int) -> list[torch.Tensor]:
    """Gradients of changing size with a slowly turning dominant subspace."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    drift = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(base + 0.02 * t * drift + 0.5 * noise[t]) * (1 + t % 7) for t in range(steps)]


def run_both(side: str, osd_options: dict, twin_options: dict, lr: float = 2e-3, steps: int = 100) -> None:
    shape = SHAPES[side]
    W0 = torch.randn(shape, dtype=torch.float64)
    W = torch.nn.Parameter(W0.clone())
    optimizer = OSD([{"params": [W], "rank": RANK, "side": side}], lr=lr, **osd_options)
    twin = Twin(W0 if side == "left" else W0.T, RANK, transposed=side == "right", **twin_options)
    for t, G in enumerate(gradients(shape, steps)):
        schedule = 1 - t / (2 * steps)
        optimizer.param_groups[0]["lr"] = lr * schedule
        W.grad = G
        optimizer.step()
        twin.step(G if side == "left" else G.T, lr, schedule)
    P = optimizer.state[W]["projection"]
    # The required 1e-9: rounding of 1e-16 grows by the length of the run and Adam's division by small roots.
    torch.testing.assert_close(P, twin.P, rtol=0, atol=1e-9)
    torch.testing.assert_close(W.detach(), twin.W if side == "left" else twin.W.T, rtol=0, atol=1e-9)
