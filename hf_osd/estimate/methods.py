"""What each way to train keeps for its optimizer, and what a step of it needs for a moment.

Ours is asked itself: its state is what `state_spec` declares, and a step of one parameter of each shape is run on the
meta device; with `source="activations"` whole steps of the prepared model, in which layers that are given one input
find each other. The others are described here, as Trainer runs their current releases.
"""

import copy
import math
import warnings
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..optim import OSD, create_osd_optimizer, select
from ..optim.memory import predicted_entry_bytes
from ..optim.options.mode import LAYERWISE_SUFFIX
from ..optim.options.presets import RSO, RSO_NAMES
from ..optim.step.geometry import ProjectedGeometry
from ..optim.step.movement import STACK_LIMIT
from ..optim.step.state import saved_projection
from ..subzero import NAME
from ..subzero.options import Options
from ..subzero.selection import input_sides, trained_weights
from ..subzero.weight import DenseWeight, LowRankWeight, Weight
from ..subzero.weights import Weights
from .live_bytes import LiveBytes, meta_device
from .models import explained, inputs_of
from .trace import loss_of


TOKENS = 16  # with which layers meet their inputs
BNB_BLOCK, BNB_MIN_SIZE = 256, 4096  # bitsandbytes: elements for each absmax, and the smallest tensor in 8 bits


@dataclass
class Method:
    """The optimizer's part of the memory.

    Attributes:
        name (`str`): As `TrainingArguments.optim` has it, or `lora`.
        state (`int`): Bytes of its state, P and what belongs to P aside.
        projection (`int`): Bytes of P and of its own moments.
        saved (`int`): Bytes of P alone, as the Hub holds it.
        temporaries (`dict[str, int]`): For each trained parameter what its step allocates, beside the state.
        layerwise (`bool`): Whether parameters are stepped in the backward pass and gradients freed at once.
        model (`str`):
            Which model is trained: `full`, `lora`, `forward` (all of it, without gradients), or by another name
            `prepared`.
        prepared ([`Prepared`], *optional*): The model that runs otherwise with this optimizer, ready to be run.
    """

    name: str
    state: int = 0
    projection: int = 0
    saved: int = field(default=0, kw_only=True)
    temporaries: dict[str, int] = field(default_factory=dict)
    layerwise: bool = False
    model: str = "full"
    prepared: "Prepared | None" = None

    @property
    def unprepared(self) -> str:
        """The model before an optimizer has prepared it: `full`, or `lora`."""
        return self.model if self.prepared is None else "full"


class Prepared(NamedTuple):
    """A model on the meta device whose layers know their inputs, and the optimizer without which it would not."""

    model: nn.Module
    optimizer: OSD

    @property
    def kept(self) -> list[Tensor]:
        """The optimizer's state, and P that the layers use."""
        layers, states = self.optimizer.layers, self.optimizer.state.values()
        used = [] if layers is None else [shared.P for shared in layers.inputs()]
        return [*used, *(value for entries in states for value in entries.values())]

    def end_step(self) -> None:
        """What comes after a backward pass in which parameters have been stepped."""
        with meta_device(), LiveBytes():
            self.optimizer.step()


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


def galore(model: nn.Module, rank: int, target_modules: Any, exclude_modules: Any = None) -> Method:
    """galore-torch's AdamW on the matrices that ours projects; experts' stacks, which it cannot take, stay whole.

    In float32 its P is a view of the SVD's factor, which it keeps alive: (s, s), not (s, r).
    """
    projected = {name for name, p in select(model, target_modules, exclude_modules).projected.items() if p.ndim == 2}
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


def subzero(model: nn.Module, options: Options) -> Method:
    """Forward passes alone: U and V of every matrix, and what the update of a parameter allocates."""
    trained, matrices = trained_weights(model, None)
    weights = Weights(trained, matrices, options, {}, input_sides(options, model, trained, matrices))
    alike: dict[tuple, int] = {}
    temporaries = {}
    for name, weight in weights.weights.items():
        key = (weight.W.shape, weight.W.dtype)
        if key not in alike:
            alike[key] = _update(weight)
        temporaries[name] = alike[key]
    return Method(NAME, projection=weights.basis_bytes, temporaries=temporaries, model="forward")


def _update(weight: Weight) -> int:
    """Bytes that an update allocates."""
    drawn = isinstance(weight, LowRankWeight) or (isinstance(weight, DenseWeight) and weight.kept)
    weight.Z = [weight.W.new_empty(weight.code_shape, dtype=weight.dtype)] if drawn else []
    if isinstance(weight, LowRankWeight):
        weight.U, weight.V = (weight.W.new_empty(size, weight.rank) for size in weight.W.shape)
    counter = LiveBytes([weight.W, *weight.Z, *(getattr(weight, name) for name in "UV" if hasattr(weight, name))])
    c = weight.W.new_empty(1)
    if isinstance(weight, DenseWeight):
        weight.seeds = [0]
    with meta_device(), counter, torch.no_grad():
        weight.update_(c, 1.0, 0, 0)
    return max(counter.series, default=0)


def osd(model: nn.Module, optim: str, rank: int, options: dict[str, Any], *, layerwise: bool) -> Method:
    """One of ours; `options` are those of `create_osd_optimizer`, without the rank."""
    name = optim + LAYERWISE_SUFFIX * layerwise
    by_activations = (RSO if optim in RSO_NAMES else options).get("source") == "activations"
    if by_activations:
        model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`rank` is")
        # without hooks, but for what would refuse them
        optimizer = create_osd_optimizer(model, name if by_activations else optim, rank=rank, **options)
    if not by_activations:
        return replace(_of_state(name, optimizer, step_temporaries(optimizer, layerwise)), layerwise=layerwise)
    prepared = Prepared(model, optimizer)
    temporaries = {"": _two_steps(prepared)}  # from which on it is known what layers share
    if optimizer.layers is not None:
        optimizer.layers.findable = True  # stand-ins, whose gradients are to be seen
    method = replace(_of_state(name, optimizer, temporaries), layerwise=layerwise, prepared=prepared)
    return replace(method, model=f"{name}, rank {rank}, {options}")


def _of_state(name: str, optimizer: OSD, temporaries: dict[str, int]) -> Method:
    sizes = predicted_entry_bytes(optimizer)
    projection = sum(size for name, size in sizes.items() if name.startswith("projection"))
    held = [weight.geometry for weight in optimizer.weights if weight.geometry.holds_projection]
    saved = sum(saved_projection(geometry).nbytes for geometry in held if isinstance(geometry, ProjectedGeometry))
    return Method(name, sizes.total() - projection, projection, temporaries, saved=saved)


def _two_steps(prepared: Prepared) -> int:
    """Train a prepared model: its layers meet their inputs, P starts, and moves as it will from then on.

    Returns:
        `int`: What a step allocates beside the state.
    """
    model, optimizer = prepared
    inputs = inputs_of(model, 1, TOKENS)
    counter, most, state = LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]), 0, 0
    with explained(f"{type(model).__name__} could not be run on {TOKENS} tokens"), meta_device(), counter:
        for _ in range(2):
            loss_of(model(**inputs)).backward()
            start, before = len(counter.series), counter.live
            optimizer.step()
            made = sum(v.nbytes for entries in optimizer.state.values() for v in entries.values()) - state
            most = max(most, max(counter.series[start:]) - before - made)
            state += made
            optimizer.zero_grad()
    return most


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
