"""The peak of a training step, put together from the run of the model and the optimizer's part.

    peak = weights + state + P + the larger of
        ordinary:   the most that is alive in the forward and backward pass, the gradients that are complete included;
                    all gradients, what else is left for the step, and the largest temporaries of a parameter's step
        forward:    the most that is alive in a forward pass without gradients; the largest temporaries of an update
    layerwise:  the most that is alive in the forward and backward pass, no complete gradient included;
                    for each parameter what is alive when its gradient is complete, and the temporaries of its step
    with `source="activations"`: those steps are run in the pass; P moves after it, beside what is left

The state is there from the end of the first step on, so the peak is that of the second one, and a P that is made from
a gradient, with its SVD, counts as if the whole state were there. What a device's allocator loses in its blocks, the
context of the driver and the workspaces of its libraries come on top.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.int8 import held_bytes
from .methods import Method, lora_model
from .models import disable_checkpointing, enable_checkpointing, explained, inputs_of, meta_model
from .trace import StepTrace, trace_forward, trace_step


LARGEST_BATCH = 2**16  # more is not looked for


@dataclass(frozen=True)
class Parts:
    """Bytes of the parts of a training step, each at its own largest; they are not all there at its peak.

    Attributes:
        weights (`int`): Parameters and buffers.
        gradients (`int`): All of them, or layerwise the largest one; R where a layer makes that instead.
        state (`int`): The optimizer's moments and counters, without P's.
        projection (`int`): P and its moments.
        activations (`int`):
            What the forward pass keeps for the backward pass, up to the output head. With `source="activations"` this
            is x P where nobody else keeps x, and what P is to learn of x, which is there until the step.
        logits (`int`): What head and loss add to them.
        temporaries (`int`): What the optimizer's step of one parameter allocates.
        peak (`int`): The most that is there at once.
    """

    weights: int
    gradients: int
    state: int
    projection: int
    activations: int
    logits: int
    temporaries: int
    peak: int


def parts(weights: int, trace: StepTrace, method: Method) -> Parts:
    """The parts and the peak; `weights` in bytes."""
    largest = max(method.temporaries.values(), default=0)
    if method.layerwise:
        passes = int(trace.live.max())
        step = trace.left + largest
        if method.prepared is None:
            step = max(alive + method.temporaries.get(name, 0) for name, (alive, _) in trace.arrivals.items())
    else:
        passes = int((trace.live + trace.done).max())
        step = trace.gradients + trace.left + largest
    return Parts(
        weights,
        trace.largest_gradient if method.layerwise else trace.gradients,
        method.state,
        method.projection,
        trace.activations,
        trace.logits,
        largest,
        weights + method.state + method.projection + max(passes, step),
    )


class Workload:
    """A model and its batches, from the config alone; runs are made when they are first asked for.

    Args:
        config (`PretrainedConfig`): Of the model.
        dtype (`torch.dtype`): Of its weights.
        sequence (`int`): Tokens of a sequence.
        lora_rank (`int`): Rank of the adapters of the model `lora`.
    """

    def __init__(self, config: Any, dtype: torch.dtype, sequence: int, lora_rank: int):
        self.config, self.dtype, self.sequence, self.lora_rank = config, dtype, sequence, lora_rank
        self._models: dict[tuple[str, bool], nn.Module] = {}
        self._runs: dict[tuple[str, bool, int], StepTrace] = {}

    def model(self, kind: str = "full", checkpointing: bool = False) -> nn.Module:
        """The model on the meta device: all of it trained, or its adapters."""
        key = ("full" if kind == "forward" else kind, checkpointing)
        if key not in self._models:
            model = meta_model(self.config, self.dtype)
            if kind == "lora":
                model = lora_model(model, self.lora_rank)
            if checkpointing:
                enable_checkpointing(model)
            self._models[key] = model
        return self._models[key]

    def run(self, kind: str, checkpointing: bool, batch: int) -> StepTrace:
        """Forward and backward pass of a batch.

        Raises:
            ValueError: If the model does not know checkpointing or adapters, or needs other inputs than it is given.
        """
        key = (kind, checkpointing, batch)
        if key not in self._runs:
            self._runs[key] = self._trace(self.model(kind, checkpointing), batch, forward=kind == "forward")
        return self._runs[key]

    def _trace(
        self,
        model: nn.Module,
        batch: int,
        known: Sequence[Tensor] = (),
        attach: Callable[[], object] | None = None,
        *,
        forward: bool = False,
    ) -> StepTrace:
        inputs = inputs_of(self.model(), batch, self.sequence)
        names = " and ".join(f"`{name}`" for name in inputs)
        with explained(f"{type(self.model()).__name__} could not be run on a batch of {names}"):
            return trace_forward(model, inputs) if forward else trace_step(model, inputs, known, attach)

    def _run(self, method: Method, checkpointing: bool, batch: int) -> StepTrace:
        key = (method.model, checkpointing, batch)
        if method.prepared is not None and key not in self._runs:
            model, optimizer = method.prepared
            (enable_checkpointing if checkpointing else disable_checkpointing)(model)
            attach = None if optimizer.stream is None else optimizer.stream.attach
            self._runs[key] = self._trace(model, batch, method.prepared.kept, attach)
            if optimizer.layers is not None:
                optimizer.layers.forget()  # what P was to learn: R is gone, which zero_grad would know it by
            if optimizer.stream is not None:
                method.prepared.end_step()
                optimizer.stream.remove()
            optimizer.zero_grad()
        return self.run(*key)

    def parts(self, method: Method, checkpointing: bool, batch: int) -> Parts:
        """What a step with this method takes."""
        return parts(self._weights(method), self._run(method, checkpointing, batch), method)

    def largest_batch(self, method: Method, checkpointing: bool, memory: int) -> int:
        """The largest batch whose peak is at most `memory`; 0 where there is none."""
        # A batch of one is its own case: a tensor expanded over the batch is a view then, and a copy else.
        two, three = (self._run(method, checkpointing, batch) for batch in (2, 3))
        weights = self._weights(method)

        def peak(batch: int) -> int:
            run = two.towards(three, batch - 2) if batch > 1 else self._run(method, checkpointing, 1)
            return parts(weights, run, method).peak

        return largest(peak, memory, LARGEST_BATCH, first=2)

    def _weights(self, method: Method) -> int:
        model = self.model(method.unprepared)  # stand-ins take no memory
        own = model if method.prepared is None else method.prepared.model
        kept = dict(own.named_parameters())  # maybe in int8
        weights = sum(held_bytes(kept.get(name, p)) for name, p in model.named_parameters())
        return weights + sum(b.nbytes for b in model.buffers())


def largest(peak: Callable[[int], int], memory: int, limit: int, first: int = 1) -> int:
    """The largest number from 1 to `limit` whose peak is at most `memory`, as all smaller ones' are; 0 if none.

    A peak is an estimate that takes seconds, and about linear: where the line through two of them meets `memory` is
    tried three times, then the middle, until a number fits and the next one does not.

    Args:
        peak (`Callable`): Bytes.
        memory (`int`): Bytes.
        limit (`int`): The largest number that is looked for.
        first (`int`, *optional*): A number to try first, because its peak is known.
    """
    low, high = 0, limit + 1  # fits, does not
    peaks: dict[int, int] = {}

    def narrow(number: int) -> None:
        nonlocal low, high
        peaks[number] = peak(number)
        low, high = (number, high) if peaks[number] <= memory else (low, number)

    for number in (first, limit, 1):
        if low < number < high:
            narrow(number)
    turn = 0
    while high - low > 1:
        turn += 1
        share = (memory - peaks[low]) / (peaks[high] - peaks[low]) if turn % 4 else 0.5
        narrow(min(max(low + int(share * (high - low)), low + 1), high - 1))
    return low
