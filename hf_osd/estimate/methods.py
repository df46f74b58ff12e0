"""What each way to train keeps for its optimizer, and what a step of it needs for a moment.

Ours is asked itself: its state is what `state_spec` declares, and a step of one parameter of each shape is run on the
meta device. The others are described here, as Trainer runs their current releases.
"""

import math
import warnings
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import OSD, create_osd_optimizer, select
from ..optim.memory import predicted_entry_bytes
from ..optim.options.rules import rules_of
from ..optim.step.geometry import ProjectedGeometry
from ..optim.step.movement import STACK_LIMIT
from .models import explained
from .trace import LiveBytes, meta_device


BNB_BLOCK, BNB_MIN_SIZE = 256, 4096  # bitsandbytes: elements for each absmax, and the smallest tensor in 8 bits


@dataclass
class Method:
    """The optimizer's part of the memory.

    Attributes:
        name (`str`): As `TrainingArguments.optim` has it, or `lora`.
        state (`int`): Bytes of its state, P and what belongs to P aside.
        projection (`int`): Bytes of P and of its own moments.
        saved (`int`): Bytes of P alone, or of what stands for it, as checkpoints and the Hub hold it.
        temporaries (`dict[str, int]`): For each trained parameter what its step allocates, beside the state.
        layerwise (`bool`): Whether parameters are stepped in the backward pass and gradients freed at once.
        model (`str`): Which model is trained: `full`, or `lora`.
    """

    name: str
    state: int = 0
    projection: int = 0
    saved: int = field(default=0, kw_only=True)
    temporaries: dict[str, int] = field(default_factory=dict)
    layerwise: bool = False
    model: str = "full"


def adamw(model: nn.Module) -> Method:
    """The fused AdamW of torch, Trainer's default: two moments in the parameter's dtype, a counter, no temporaries."""
    return Method("adamw_torch_fused", sum(2 * p.nbytes + 4 for _, p in trained(model)))


def lora(model: nn.Module) -> Method:
    """The same on the factors of `lora_model`."""
    return replace(adamw(model), name="lora", model="lora")


def adamw8bit(model: nn.Module) -> Method:
    """bitsandbytes: two codes of a byte and two absmax for 256 of them; small ones in float32, as are embeddings.

    Trainer asks for the latter. Its kernels on GPUs have no temporaries; on CPUs they decode a parameter's state.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    state = 0
    for _, p in trained(model):
        dense = p in embeddings or p.numel() < BNB_MIN_SIZE
        state += 8 * p.numel() if dense else 2 * (p.numel() + 4 * math.ceil(p.numel() / BNB_BLOCK))
    return Method("adamw_bnb_8bit", state)


def galore(model: nn.Module, rank: int, target_modules: Any) -> Method:
    """galore-torch's AdamW on the matrices that ours projects; experts' stacks, which it cannot take, stay whole.

    In float32 its P is a view of the SVD's factor, which it keeps alive: (s, s), not (s, r).
    """
    projected = {name for name, p in select(model, target_modules).projected.items() if p.ndim == 2}
    method = Method("galore_adamw")
    for name, p in trained(model):
        size = p.element_size()
        if name not in projected:
            method.state += 2 * p.nbytes
            method.temporaries[name] = 2 * p.nbytes  # sqrt of the second moment, and the direction
            continue
        s, length = sorted(p.shape)
        r = min(rank, s)
        method.state += 2 * r * length * size
        method.projection += s * (r * size if size < 4 else s * 4)
        low, cast = r * length * size, p.numel() * 4 if size < 4 else 0
        svd = cast + 4 * s * (s + 2 * length)  # the gradient in float32, U and Vh, and the copy that the SVD works on
        method.temporaries[name] = max(svd, 3 * low + 2 * p.nbytes)  # lifted to (m, n), and once more times its scale
    return method


def osd(model: nn.Module, optim: str, rank: int, options: dict[str, Any], *, layerwise: bool) -> Method:
    """One of ours; `options` are those of `create_osd_optimizer`, without the rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`rank` is")
        optimizer = create_osd_optimizer(model, optim, rank=rank, **options)
    sizes = predicted_entry_bytes(optimizer)
    projection = sum(size for name, size in sizes.items() if name.startswith("projection"))
    names = {rules_of(group).subspace.code or "projection" for group in optimizer.trained_groups if group["rank"]}
    return Method(
        optim + "_layerwise" * layerwise,
        sizes.total() - projection,
        projection,
        step_temporaries(optimizer, layerwise),
        layerwise,
        saved=sum(sizes[name] for name in names),
    )


def step_temporaries(optimizer: OSD, layerwise: bool) -> dict[str, int]:
    """Bytes that the first two steps of each parameter allocate beside its state; the first one makes its P.

    An ordinary step moves the P of one shape together, so that what it allocates is that of all whose P do.
    """
    alike: dict[tuple, list[tuple[str, Tensor]]] = defaultdict(list)
    for index, group in enumerate(optimizer.trained_groups):
        for name, p in zip(group["param_names"], group["params"], strict=True):
            geometry = optimizer.weight_of(p).geometry
            P = geometry.projection_shape if isinstance(geometry, ProjectedGeometry) and not layerwise else None
            alike[index, P or p.shape, p.dtype, P].append((name, p))
    found: dict[str, int] = {}
    for (*_, P), members in alike.items():
        params = sorted((p for _, p in members), key=Tensor.numel, reverse=True)
        together = max(1, STACK_LIMIT // math.prod(P)) if P else 1
        most = max(_temporaries(optimizer, params[:k]) for k in {1, together})
        found.update((name, most) for name, _ in members)
    return found


def _temporaries(optimizer: OSD, params: list[Tensor]) -> int:
    for p in params:
        p.grad = torch.empty_like(p)
    counter, peaks = LiveBytes([X for p in params for X in (p, p.grad)]), []
    with meta_device(), counter:
        for _ in range(2):
            start = len(counter.series)
            optimizer.step()
            peaks.append(max(counter.series[start:]))
    for p in params:
        p.grad = None
        del optimizer.state[p]
    state = counter.series[-1] - counter.live
    return max(peaks) - state


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that require gradients."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def lora_model(model: nn.Module, rank: int) -> nn.Module:
    """The model with peft's adapters on all linear layers, which keeps them in float32."""
    from peft import LoraConfig, get_peft_model

    with explained(f"peft refuses {type(model).__name__}"), warnings.catch_warnings(), meta_device():
        warnings.simplefilter("ignore")  # of GPT-2's layers, and of transformers' names
        return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"), low_cpu_mem_usage=True)  # type: ignore
