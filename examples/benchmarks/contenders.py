"""The optimizers that `step_time.py` compares: each by its name, as a function that steps the same weights.

Every contender has a state of its own and steps the same tensors at the same learning rate, so all of them read and
write the same memory. Libraries that are not installed, or cannot run on a device, are left out and said to be.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_osd import OSD
from hf_osd.optim import OPTIM_NAMES, PRESETS
from hf_osd.optim.options.mode import LAYERWISE_SUFFIX
from hf_osd.subspace import SUBSPACES, subspace_options


Step = Callable[[], object]
LR = 1e-3
PROJECTION_INTERVALS = (2, 4)
INTERVAL = 200  # steps between two SVDs: the default of galore-torch and of the rules here that renew P at intervals


@dataclass(frozen=True)
class Contender:
    """One optimizer.

    Attributes:
        name (`str`): As in the tables.
        make (`Callable`): Takes the weights and the rank, gives the step.
        package (`str`, *optional*): What to install for it, beyond this package.
        renews (`bool`): Whether P is made anew every `INTERVAL` steps: the cost of that is spread over them.
        period (`int`): Its steps are of this many kinds, in turn, and its time is their mean.
        cubic (`bool`): Takes exact SVDs or forms s x s matrices, which takes minutes for large weights on a CPU.
        cuda_only (`bool`): Cannot run on a CPU.
    """

    name: str
    make: Callable[[list[Parameter], int], Step]
    package: str | None = None
    renews: bool = False
    period: int = 1
    cubic: bool = False
    cuda_only: bool = False

    def obstacle(self, device: torch.device, size: int, cubic_up_to: int) -> str | None:
        """Why it cannot take part with weights of min(m, n) <= size, if it cannot."""
        if self.cuda_only and device.type != "cuda":
            return "calls torch.cuda in every step: GPUs only"
        if self.cubic and size > cubic_up_to:
            return f"an SVD or an s x s product takes too long here above s = {cubic_up_to}"
        return None


def bare_products(params: list[Parameter], rank: int) -> Step:
    """down, correlate and up: every product with an (m, n) operand that a step of Online Subspace Descent needs."""
    work = []
    for W in params:
        P = torch.linalg.qr(torch.randn(min(W.shape), min(rank, *W.shape), device=W.device)).Q.to(W.dtype)
        work.append((W, P))

    @torch.no_grad()
    def step() -> None:
        for W, P in work:
            G = W.grad
            if W.shape[0] <= W.shape[1]:
                R = P.mT @ G
                G @ R.mT
                W.addmm_(P, R, alpha=-1e-9)
            else:
                R = G @ P
                G.mT @ R
                W.addmm_(R, P.mT, alpha=-1e-9)

    return step


def autograd_pca_step(P: Tensor, G: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """P's step as the paper's published code takes it, in G's precision: autograd through P Pᵀ, s x s, and AdamW."""
    with torch.enable_grad():
        G_hat = G / G.norm()
        # || P Pᵀ Ĝ - Ĝ ||², without the term with lambda, which that code does not have
        S = P @ P.mT
        loss = ((S @ G_hat if G.shape[0] < G.shape[1] else G_hat @ S) - G_hat).norm() ** 2
        loss.backward()
    optimizer.step()
    P.grad = None


class PublishedStep:
    """Online Subspace Descent as the paper's published code computes it, with one AdamW for P and one for the weight.

    The order of the operations and the formats are those of `GaLoreProjector(proj_type="continuous")`; where P starts
    has no part in the time, so it starts at random orthonormal columns.
    """

    def __init__(self, params: list[Parameter], rank: int):
        self.work = []
        for W in params:
            m, n = W.shape
            r = min(rank, m, n)
            P = torch.linalg.qr(torch.randn(min(m, n), r, device=W.device)).Q.to(W.dtype).requires_grad_()
            D = torch.zeros((r, n) if m < n else (m, r), device=W.device, dtype=W.dtype, requires_grad=True)
            self.work.append((W, P, torch.optim.AdamW([P], lr=5e-3), D, torch.optim.AdamW([D], lr=LR)))

    def __call__(self) -> None:
        """One step."""
        for W, P, optimizer_P, D, optimizer_D in self.work:
            left = W.shape[0] < W.shape[1]
            with torch.no_grad():
                D.zero_()
                D.grad = P.mT @ W.grad if left else W.grad @ P
            optimizer_D.step()
            with torch.no_grad():
                W.add_(P @ D if left else D @ P.mT)
            autograd_pca_step(P, W.grad, optimizer_P)


def osd(**options: object) -> Callable[[list[Parameter], int], Step]:
    """One of ours."""
    return lambda params, rank: OSD([{"params": params, "rank": rank}], lr=LR, **options).step


class CapturedStep:
    """One of ours that a CUDA graph holds from the third step on.

    Args:
        params (`list[Parameter]`): The weights, whose gradients stay where they are.
        rank (`int`): Rank of the subspaces.
        options: Of [`OSD`].
    """

    def __init__(self, params: list[Parameter], rank: int, **options: object):
        lr = torch.tensor(LR, device=params[0].device)
        self.optimizer = OSD([{"params": params, "rank": rank}], lr=lr, capturable=True, **options)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0

    def __call__(self) -> None:
        """One step; the second one captures the others."""
        if self.graph is not None:
            self.graph.replay()
            return
        self.optimizer.step()
        self.eager_steps += 1
        if self.eager_steps == 2:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.optimizer.step()


def captured(**options: object) -> Callable[[list[Parameter], int], Step]:
    """One of ours in a CUDA graph."""
    return lambda params, rank: CapturedStep(params, rank, **options)


def torch_adamw(params: list[Parameter], rank: int) -> Step:
    """torch's, at full size."""
    return torch.optim.AdamW(params, lr=LR, fused=True).step


def bitsandbytes_adamw8bit(params: list[Parameter], rank: int) -> Step:
    """bitsandbytes', at full size."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=LR).step


def torchao_adamw(bits: int) -> Callable[[list[Parameter], int], Step]:
    """torchao's, at full size. Its first step compiles a kernel for each shape, on CPUs with a C++ compiler."""

    def make(params: list[Parameter], rank: int) -> Step:
        import torchao.optim

        return getattr(torchao.optim, f"AdamW{bits}bit")(params, lr=LR).step

    return make


def galore_group(params: list[Parameter], rank: int) -> dict[str, object]:
    """Projected parameters with the settings of GaLore's README."""
    return {"params": params, "rank": rank, "update_proj_gap": INTERVAL, "scale": 0.25, "proj_type": "std"}


def galore_adamw(params: list[Parameter], rank: int) -> Step:
    """GaLore's own library."""
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW([galore_group(params, rank)], lr=LR, no_deprecation_warning=True).step


def galore_adamw8bit(params: list[Parameter], rank: int) -> Step:
    """GaLore's own library with bitsandbytes' moments."""
    from galore_torch import GaLoreAdamW8bit

    return GaLoreAdamW8bit([galore_group(params, rank)], lr=LR).step


def apollo_adamw(params: list[Parameter], rank: int) -> Step:
    """APOLLO's own library with the settings of its README."""
    from apollo_torch import APOLLOAdamW

    group = galore_group(params, rank) | {"proj": "random", "scale_type": "channel", "scale": 1}
    return APOLLOAdamW([group], lr=LR).step


BARE = "three products"
PEERS = [
    Contender("torch AdamW fused", torch_adamw),
    Contender("bitsandbytes AdamW8bit", bitsandbytes_adamw8bit, "bitsandbytes"),
    Contender("torchao AdamW8bit", torchao_adamw(8), "torchao"),
    Contender("torchao AdamW4bit", torchao_adamw(4), "torchao"),
    Contender("galore-torch", galore_adamw, "galore-torch", renews=True, cubic=True),
    Contender("galore-torch 8-bit", galore_adamw8bit, "galore-torch", renews=True, cubic=True, cuda_only=True),
    Contender("apollo-torch", apollo_adamw, "apollo-torch", renews=True),
    Contender("autograd, as the paper's code", PublishedStep, cubic=True),
]
OURS = [
    Contender(name, osd(weight_rule=rule), "bitsandbytes" if rule.endswith("8bit") else None)
    for name, rule in OPTIM_NAMES.items()
    if not name.endswith(LAYERWISE_SUFFIX)
]
OURS += [Contender(f"osd_adamw, preset {name}", osd(**preset.options)) for name, preset in PRESETS.items()]
OURS += [
    Contender(f"osd_adamw, subspace {name}", osd(subspace=name), renews="update_interval" in subspace_options(name))
    for name in SUBSPACES
    if name != "online_pca"
]
OURS += [
    Contender(f"osd_adamw, projection_interval {k}", osd(projection_interval=k), period=k)
    for k in PROJECTION_INTERVALS
]
OURS += [Contender("osd_adamw, residual scaled", osd(residual="scaled"))]
OURS += [
    Contender("osd_adamw, P on its own stream", osd(projection_stream=True), cuda_only=True),
    Contender("osd_adamw, CUDA graph", captured(), cuda_only=True),
    Contender("osd_adamw, CUDA graph, P on its own stream", captured(projection_stream=True), cuda_only=True),
    Contender("osd_adamw8bit, CUDA graph", captured(weight_rule="adamw8bit"), "bitsandbytes", cuda_only=True),
]
CONTENDERS = {contender.name: contender for contender in [Contender(BARE, bare_products), *OURS, *PEERS]}
