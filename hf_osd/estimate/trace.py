"""A training step on the meta device: what it holds, and when. Nothing of the model's size is allocated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .live_bytes import LiveBytes, meta_device


@dataclass
class StepTrace:
    """Forward and backward pass of one batch: bytes beside the weights and the optimizer's state.

    Every gradient is taken as freed once it is complete; `done` has what the ordinary mode keeps. Where hooks have
    stepped parameters, `live` has what that allocated, too.

    Attributes:
        live (`torch.Tensor`): (T,) alive after each operation, complete gradients aside.
        done (`torch.Tensor`): (T,) bytes of the gradients that are complete by then.
        arrivals (`dict[str, tuple[int, int]]`):
            For each trained parameter, in order: what is alive when its gradient is complete, itself included, and
            the bytes of the gradient.
        forward (`int`): What is alive after the forward pass, for the backward pass.
        activations (`int`): What the forward pass holds where the output head begins.
        logits (`int`): What the head and the loss add to it at most.
        left (`int`): What is alive after the backward pass beside gradients, for the optimizer's step.
    """

    live: Tensor
    done: Tensor
    arrivals: dict[str, tuple[int, int]]
    forward: int
    activations: int
    logits: int
    left: int

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return sum(size for _, size in self.arrivals.values())

    @property
    def largest_gradient(self) -> int:
        """Bytes of the largest one."""
        return max(size for _, size in self.arrivals.values())

    def towards(self, other: "StepTrace", steps: int) -> "StepTrace":
        """The trace of a batch `steps` times as far from this one's as the other's: every tensor is affine in it.

        Raises:
            ValueError: If the two ran different operations, so that this does not hold.
        """
        if len(self.live) != len(other.live):
            raise ValueError("The model runs other operations for another batch size: no largest batch can be told.")

        def at(a, b):
            return a + steps * (b - a)

        return StepTrace(
            at(self.live, other.live),
            self.done,
            {name: (at(alive, other.arrivals[name][0]), size) for name, (alive, size) in self.arrivals.items()},
            at(self.forward, other.forward),
            at(self.activations, other.activations),
            at(self.logits, other.logits),
            at(self.left, other.left),
        )


def trace_step(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    known: Sequence[Tensor] = (),
    attach: Callable[[], object] | None = None,
) -> StepTrace:
    """Run a forward and a backward pass of a model on the meta device, in its mode of checkpointing.

    Args:
        model (`nn.Module`): The model.
        inputs (`dict[str, torch.Tensor]`): A batch.
        known (`list[torch.Tensor]`, *optional*): Tensors that do not count either: the optimizer's.
        attach (`Callable`, *optional*): Puts an optimizer's hooks on, which step parameters and free their gradients.
    """
    counter = LiveBytes([*model.parameters(), *model.buffers(), *inputs.values(), *known])
    marks: dict[str, int] = {}
    arrivals: dict[str, tuple[int, int]] = {}
    ends: list[int] = []  # of `series`, where each gradient is complete

    def arrived(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if p.grad is None:  # the weight of a layer that makes R instead
                return
            arrivals[name] = (counter.live, p.grad.nbytes)
            ends.append(len(counter.series))
            if attach is None:
                p.grad = None

        return hook

    handles = [
        p.register_post_accumulate_grad_hook(arrived(name)) for name, p in model.named_parameters() if p.requires_grad
    ]
    handles += _head_hooks(model, marks, counter)
    if attach is not None:  # after ours, which are called first
        attach()
    try:
        with meta_device(), counter:
            loss = loss_of(model(**inputs))
            forward, kept = len(counter.series), counter.live
            counter.backward = True
            loss.backward()
            del loss
    finally:
        for handle in handles:
            handle.remove()
    activations, logits = _parts(counter, marks, forward)
    live = torch.tensor(counter.series)
    done = torch.zeros_like(live)
    for end, (_, size) in zip(ends, arrivals.values(), strict=True):
        done[end:] += size
    return StepTrace(live, done, arrivals, kept, activations, logits, counter.live)


def trace_forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> StepTrace:
    """Run a forward pass without gradients, in evaluation mode; its most counts as activations, up to the head.

    Args:
        model (`nn.Module`): The model, on the meta device.
        inputs (`dict[str, torch.Tensor]`): A batch.
    """
    counter = LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()])
    marks: dict[str, int] = {}
    training, handles = model.training, _head_hooks(model, marks, counter)
    try:
        with meta_device(), counter, torch.no_grad():
            loss = loss_of(model.eval()(**inputs))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    start, most = marks.get("head", len(counter.series)), max(counter.series)
    activations = max(counter.series[:start])
    live = torch.tensor(counter.series)
    del loss
    return StepTrace(live, torch.zeros_like(live), {}, counter.live, activations, most - activations, counter.live)


def _head_hooks(model: nn.Module, marks: dict[str, int], counter: LiveBytes) -> list[Any]:
    """Note where the head begins, and where the gradient of the logits is there."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return []
    return [
        head.register_forward_pre_hook(lambda *_: marks.update(head=len(counter.series))),
        head.register_forward_hook(lambda *call: _mark(call[-1], marks, counter)),
    ]


def _parts(counter: LiveBytes, marks: dict[str, int], forward: int) -> tuple[int, int]:
    """What the forward pass holds where the head begins, and what head and loss add to it at most."""
    start = marks.get("head", forward)
    activations = counter.series[start - 1]
    return activations, max(counter.series[start : marks.get("logits", start)], default=activations) - activations


def _mark(logits: Any, marks: dict[str, int], counter: LiveBytes) -> None:
    """Note when the gradient of the logits is there: the loss is done with."""
    if isinstance(logits, Tensor) and logits.requires_grad:
        logits.register_hook(lambda _: marks.update(logits=len(counter.series)))


def loss_of(outputs: Any) -> Tensor:
    """What the backward pass starts from."""
    return outputs.loss if outputs.get("loss") is not None else outputs[0].float().sum()
