"""The one line that says what is projected, what is not, and what that saves."""

import logging
import os
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn

from ..text import announce, format_bytes, format_count, shortened
from .memory import adamw_state_bytes, predicted_state_bytes
from .options.table import LR_MULTIPLE
from .osd import OSD
from .selection.quantised import is_quantised
from .step.geometry import ProjectedGeometry


logger = logging.getLogger("hf_osd")

KINDS_SHOWN = 8
_SUMMARIZED: WeakSet[OSD] = WeakSet()


def announce_summary(optimizer: OSD, model: object) -> None:
    """Say the line once for an optimizer, on the main process: where it is made for a model, or Trainer trains."""
    if optimizer not in _SUMMARIZED and _is_main_process():
        announce(summary(optimizer, model))
        if loses_small_steps(optimizer):
            logger.warning(
                "Small steps of bfloat16 weights are rounded away: set stochastic_rounding=true, or load the model in "
                "float32 (dtype=torch.float32), with bf16=True in Trainer."
            )
    _SUMMARIZED.add(optimizer)


def _is_main_process() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # of a launcher, before the processes have met


def summary(optimizer: OSD, model: object = None) -> str:
    """What is projected, by the names of the layers, what that saves, and how large first updates are.

    Args:
        optimizer ([`OSD`]): The optimizer.
        model (`nn.Module`, *optional*): The model, to tell of what is frozen in it, too; anything else tells nothing.

    Example:
        `OSD: 28 matrices projected to rank 8 (1.2M parameters: q_proj, o_proj), 0.3M parameters at full size
        (embed_tokens, 5 vectors); optimizer state 0.4 MB, AdamW's 12.0 MB; first updates 0.14 of AdamW's (root mean
        square) at learning rate 5e-05`. With a preset: `OSD (preset finetune): ...`. With `source="activations"`:
        `...; 26 learn from activations, 2 from gradients (no plain linear layer: experts.down_proj); optimizer state
        at most 0.4 MB, ...`, which ends when layers have met their inputs.
    """
    ranks, numel, matrices, vectors = set(), {True: 0, False: 0}, 0, 0
    kinds: dict[bool, dict[str, None]] = {True: {}, False: {}}  # as ordered sets
    for group in optimizer.trained_groups:
        names = group.get("param_names") or [""] * len(group["params"])
        for name, p in zip(names, group["params"], strict=True):
            geometry = optimizer.weight_of(p).geometry
            projected = isinstance(geometry, ProjectedGeometry)
            numel[projected] += p.numel()
            if isinstance(geometry, ProjectedGeometry):
                matrices += geometry.matrices
                ranks.add(geometry.rank)
            if p.ndim < 2:
                vectors += 1
            elif name:
                kinds[projected][_kind(name)] = None
    rank = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}" if ranks else "no rank"
    projected_kinds, whole_kinds = (shortened(kinds[projected], KINDS_SHOWN) for projected in (True, False))
    whole = ", ".join(filter(None, [whole_kinds, f"{vectors} vectors" if vectors else ""]))
    preset = optimizer.asked.preset
    return (
        f"OSD{f' (preset {preset})' if preset else ''}: "
        f"{matrices} matrices projected to {rank} ({format_count(numel[True], 'M')} parameters"
        f"{f': {projected_kinds}' if projected_kinds else ''}), "
        f"{format_count(numel[False], 'M')} parameters at full size{f' ({whole})' if whole else ''}"
        f"{_frozen(model) if isinstance(model, nn.Module) else ''}{_sources(optimizer, matrices)}"
        f"{_other_groups(optimizer)}; optimizer state {'' if _sharing_is_known(optimizer) else 'at most '}"
        f"{format_bytes(predicted_state_bytes(optimizer), smallest='MB')}, "
        f"AdamW's {format_bytes(adamw_state_bytes(optimizer), smallest='MB')}{_first_updates(optimizer)}"
    )


def _sources(optimizer: OSD, matrices: int) -> str:
    """How many learn from activations, how many from gradients, and why."""
    if optimizer.layers is None:
        return ""
    count = len(optimizer.layers.layers)
    kept = {group["weight_dtype"] for group in optimizer.trained_groups} - {None}
    text = f"; {count} learn from activations{''.join(f', kept in {dtype}' for dtype in kept)}"
    reasons: dict[str, dict[str, None]] = {}
    for name, reason in optimizer.layers.left.items():
        reasons.setdefault(reason, {})[_kind(name)] = None
    why = "; ".join(f"{reason}: {shortened(kinds, KINDS_SHOWN)}" for reason, kinds in reasons.items())
    return text + (f", {matrices - count} from gradients ({why})" if reasons else "")


def _first_updates(optimizer: OSD) -> str:
    """Their root mean square over AdamW's, whose entries are lr.

    Those of a D are, too, and up(D) has sqrt(r/s) of that. Entries of `residual="sign"` are 1, and all but orthogonal
    to up(D). What `scaled` adds is known from the gradient alone. Two-sided, where P and Q start from the gradient's
    singular vectors, R is diagonal at first, and most entries of D are next to nothing.
    """
    squares, numel, scaled, two_sided = 0.0, 0, False, False
    for group in optimizer.trained_groups:
        if group["rank"] is None or group["weight_rule"] == "sgd":
            continue
        scaled |= group["residual"] == "scaled"
        for p in group["params"]:
            geometry = optimizer.weight_of(p).geometry
            if isinstance(geometry, ProjectedGeometry):
                mean_square = _first_mean_square(group, geometry.full_scale)
                squares += p.numel() * group.get(LR_MULTIPLE, 1) ** 2 * mean_square
                numel += p.numel()
                two_sided |= geometry.two_sided
    if not numel:
        return ""
    first = optimizer.param_groups[0]
    lr = float(first.get("initial_lr", first["lr"])) / first.get(LR_MULTIPLE, 1)
    size = f"{(squares / numel) ** 0.5:.2g} of AdamW's (root mean square) at learning rate {lr:.3g}"
    return f"; first updates {'before the residual ' * scaled}{'at most ' * two_sided}{size}"


def loses_small_steps(optimizer: OSD) -> bool:
    """Whether there are weights in bfloat16 and nothing is done about their rounding."""
    groups = [group for group in optimizer.trained_groups if not group["stochastic_rounding"]]
    return any(p.dtype == torch.bfloat16 and p.ndim > 1 for group in groups for p in group["params"])


def _first_mean_square(group: Mapping[str, Any], full: float) -> float:
    """Of the first update of a weight over lr; `full` is sqrt(s/r), the length of P's columns if `unbiased`."""
    auto = group["scale"] == "auto"
    scale = full if auto else group["scale"] * (full if group["unbiased"] else 1)
    signs = group["residual_scale"] * (1 if auto else group["scale"]) if group["residual"] == "sign" else 0
    return (scale / full) ** 2 + signs**2


def _other_groups(optimizer: OSD) -> str:
    """What `full_size_optim` and `lr_pattern` have made of groups."""
    rule = optimizer.defaults["weight_rule"]
    others = {group["weight_rule"] for group in optimizer.trained_groups if group["rank"] is None} - {rule}
    rates: dict[float, list[str]] = {}
    for group in optimizer.trained_groups:
        if LR_MULTIPLE in group:
            names = group.get("param_names") or [f"{len(group['params'])} parameters"]
            rates.setdefault(group[LR_MULTIPLE], []).extend(names)
    texts = [f"at full size by {', '.join(sorted(others))}"] if others else []
    texts += [f"{rate:g} times the learning rate for {shortened(own, 2)}" for rate, own in rates.items()]
    return "".join(f"; {text}" for text in texts)


def _sharing_is_known(optimizer: OSD) -> bool:
    """Whether all layers have met their inputs, so that it is known which of them share P."""
    return optimizer.layers is None or all(layer.input is not None for layer in optimizer.layers.layers.values())


def _kind(name: str) -> str:
    """`q_proj` for `base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight`."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    while len(parts) > 1 and parts[-1] in ("weight", "base_layer", "default", "modules_to_save"):
        parts.pop()
    return parts[-1] if parts else name


def _frozen(model: nn.Module) -> str:
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    quantised = sum(is_quantised(module) for module in model.modules())
    if not frozen and not quantised:
        return ""
    return f", {format_count(frozen, 'M')} frozen" + (f" ({quantised} quantised layers)" if quantised else "")
