"""Weights as Q-GaLore keeps them (arXiv 2407.08296), simulated: after every step quantised and made floats again.

Of each group of 256 neighbours in a weight as it lies in memory, with q in 0..255 rounded at random,

    s = (max - min) / 255        z = -round(min / s)        q = stochastic_round(w / s) + z        w' = s (q - z)

as in its published code (0.25 bytes of s and z to 8 bits of q, in float32). What it does besides, a P in 4 bits that
is made anew when it has turned, is not in it: the weights' format alone is compared. The float that is rounded is that
of a float32 run, where Q-GaLore's own is bfloat16, which loses small steps before it rounds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


FLAG = "--q_galore_weights"
GROUP = 256
MOST = 255


def quantised(W: Tensor, noise: torch.Generator) -> Tensor:
    """W (any shape) after quantising and dequantising; a last group may be shorter."""
    flat = W.reshape(-1)
    whole = flat.numel() // GROUP * GROUP
    parts = [_groups(part, noise) for part in (flat[:whole].view(-1, GROUP), flat[None, whole:]) if part.numel()]
    return torch.cat([part.reshape(-1) for part in parts]).view_as(W)


def _groups(W: Tensor, noise: torch.Generator) -> Tensor:
    low, high = W.aminmax(dim=1, keepdim=True)
    s = (high - low).clamp(min=1e-5) / MOST
    z = (-(low / s).round()).clamp(0, MOST)
    q = (W / s + torch.rand(W.shape, generator=noise)).floor() + z
    return s * (q.clamp(0, MOST) - z)


def keep_weights() -> Callable[[], None]:
    """From now on every optimizer of ours in this process leaves projected weights so. Returns what ends it."""
    noise: dict[int, torch.Generator] = {}

    @torch.no_grad()
    def after_step(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("rank") is None:
                continue
            own = noise.setdefault(id(optimizer), torch.Generator().manual_seed(group["seed"]))
            for W in group["params"]:
                W.copy_(quantised(W, own))

    return register_optimizer_step_post_hook(after_step).remove


def obeyed(command: list[str]) -> list[str]:
    """A command line without `FLAG`, which has been done in this process where it was there."""
    if FLAG in command:
        keep_weights()
    return [argument for argument in command if argument != FLAG]
