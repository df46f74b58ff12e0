"""The outer loop of RSO: what happens to a model and its optimizer between the inner optimizer's steps.

Letters: W (m, n) a weight as torch stores it (out, in); k the number of the interval; P (n, r) = P_k, which peft
keeps as lora_A.weight = Pᵀ (r, n); B (r, m), which peft keeps as lora_B.weight = Bᵀ (m, r). The paper writes x W for a
layer, so its W is ours transposed and its P acts on the inputs: the layer computes x Wᵀ + (x P) B, and what its
backward needs of the inputs is x P (tokens, r) alone. On the side of the outputs it would need all of x.
"""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim.selection.adapters import rso_loop
from .options import RSOOptions
from .plain_state import ADAPTER
from .sampling import sample


# Beside the inner optimizer's own entries of B, in its `state_dict` only: what is exact within an interval.
WEIGHT, FACTOR = "rso_weight", "rso_factor"
# In the parameter groups of B: a P is drawn again from these.
GROUP_KEYS = {"rso_seed": "seed", "rso_sampling": "sampling", "rso_interval": "interval"}
INDEX = "rso_index"

_attached: WeakKeyDictionary[Optimizer, WeakSet["OuterLoop"]] = WeakKeyDictionary()


class OuterLoop:
    """Merges, resamples and restarts; [`RSOCallback`] calls it in a Trainer, and a loop of one's own calls it itself.

    Args:
        layers (`dict[str, nn.Module]`): peft's LoRA layers by name, in the model's order.
        options ([`RSOOptions`]): Rank, interval, eta, sampling and seed.

    Attributes:
        index (`int`): k, the number of the current interval.

    Example:
    ```python
    >>> import torch
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from hf_osd.rso import create_rso_model, outer_loop, rso_param_groups

    >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = create_rso_model(AutoModelForCausalLM.from_config(config), rank=8, interval=2)
    >>> optimizer = torch.optim.AdamW(rso_param_groups(model, lr=1e-3))
    >>> loop, ids = outer_loop(model), torch.arange(16)[None]
    >>> for step in range(4):
    ...     loop.before_step(optimizer, step)
    ...     model(input_ids=ids, labels=ids).loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> loop.index
    1

    ```
    """

    def __init__(self, layers: dict[str, nn.Module], options: RSOOptions):
        self.layers, self.options, self.index = layers, options, 0
        self._draw(0)

    def factors(self) -> Iterator[tuple[Any, nn.Parameter]]:
        """Each LoRA layer with its lora_B.weight (m, r): what the inner optimizer trains."""
        for layer in self.layers.values():
            yield layer, layer.lora_B[ADAPTER].weight  # type: ignore[union-attr, index]

    def before_step(self, optimizer: Optimizer, step: int) -> None:
        """To be called before the forward pass of each step: ends the interval where `step` begins a new one.

        Args:
            optimizer (`torch.optim.Optimizer`): The inner optimizer, any that steps without a closure.
            step (`int`): Number of optimizer steps done.
        """
        self.attach(optimizer)
        if step // self.options.interval != self.index:
            self.advance(optimizer, step // self.options.interval)

    @torch.no_grad()
    def advance(self, optimizer: Optimizer, index: int) -> None:
        """W <- W + P B, B <- 0, P <- P_index, and the inner optimizer forgets its moments of B."""
        for layer, B in self.factors():
            layer.merge(adapter_names=[ADAPTER])
            layer.merged_adapters.clear()
            B.zero_()
            optimizer.state.pop(B, None)
        self._draw(index)
        self._note(optimizer)

    def attach(self, optimizer: Optimizer) -> None:
        """Add the proximal term to its steps and W and B to its `state_dict`; once for each optimizer."""
        attached = _attached.setdefault(optimizer, WeakSet())
        if self in attached:
            return
        held = {p for group in optimizer.param_groups for p in group["params"]}
        missing = sum(B not in held for _, B in self.factors())
        if missing:
            raise ValueError(f"The optimizer lacks B of {missing} layers: build it after `create_rso_model`.")
        optimizer.register_step_pre_hook(self._add_proximal_gradient)
        optimizer.register_state_dict_post_hook(self._add_to_state_dict)
        if not any(INDEX in group for group in self._groups(optimizer)):  # else it has loaded a checkpoint
            self._note(optimizer)
        attached.add(self)

    def begin(self, optimizer: Optimizer, step: int) -> None:
        """To be called before the first step of a training, after any `load_state_dict`.

        Args:
            optimizer (`torch.optim.Optimizer`): The inner optimizer.
            step (`int`): Number of steps done; 0 for a training that does not continue another.

        Raises:
            ValueError: If the checkpoint is of a run without RSO, or with another rank, seed, sampling or interval.
        """
        groups = self._groups(optimizer)
        loaded = any(optimizer.state.get(B) for _, B in self.factors())
        if loaded and not all(INDEX in group for group in groups):
            raise ValueError(
                "The optimizer's state is not of RSO: its checkpoint was trained with another optimizer. Continue it "
                "with that one, or start RSO anew from the checkpoint's model (`from_pretrained`)."
            )
        self.attach(optimizer)
        for group in groups:
            for key, option in GROUP_KEYS.items():
                self._check_same(option, group[key])
        for _, B in self.factors():
            saved = optimizer.state.get(B, {}).get(FACTOR)
            if saved is not None:
                self._check_same("rank", saved.shape[1])
        if self._restore(optimizer):
            self._draw(groups[0][INDEX])
        elif step == 0 or self.index != step // self.options.interval:
            self.advance(optimizer, step // self.options.interval)

    def _check_same(self, option: str, saved: Any) -> None:
        current = getattr(self.options, option)
        if saved != current:
            raise ValueError(
                f"The checkpoint was trained with {option}={saved!r}, this run has {current!r}. Continue it with the "
                "same."
            )

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer) -> bool:
        """Take W and B out of the state that the optimizer has just loaded; whether there were any."""
        found = False
        for layer, B in self.factors():
            state = optimizer.state.get(B, {})
            if WEIGHT in state:
                layer.base_layer.weight.copy_(state.pop(WEIGHT))
                B.copy_(state.pop(FACTOR))
                found = True
        return found

    @torch.no_grad()
    def _draw(self, index: int) -> None:
        self.index, options = index, self.options
        for matrix, layer in enumerate(self.layers.values()):
            A = layer.lora_A[ADAPTER].weight  # type: ignore[union-attr, index]
            r, n = A.shape
            A.copy_(sample((n, r), options.sampling, options.seed, index, matrix, A.dtype, A.device).mT)

    def _note(self, optimizer: Optimizer) -> None:
        """Write down in the groups of B what P is drawn from."""
        for group in self._groups(optimizer):
            group.update({key: getattr(self.options, option) for key, option in GROUP_KEYS.items()})
            group[INDEX] = self.index

    def _groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Those that hold B."""
        factors = {B for _, B in self.factors()}
        return [group for group in optimizer.param_groups if not factors.isdisjoint(group["params"])]

    @torch.no_grad()
    def _add_proximal_gradient(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """GB <- gB + B / eta, the gradient of ||B||² / (2 eta), after any clipping of the loss's own gradient."""
        if self.options.eta is None:
            return
        pairs = [(B.grad, B) for _, B in self.factors() if B.grad is not None]
        if pairs:
            gradients, factors = zip(*pairs, strict=True)
            torch._foreach_add_(gradients, factors, alpha=1 / self.options.eta)

    def _add_to_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """W and B beside the moments: the checkpoint's model has W + P B, from which rounding hides them."""
        layers: dict[Tensor, Any] = {B: layer for layer, B in self.factors()}
        for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for p, number in zip(group["params"], packed["params"], strict=True):
                entries = state_dict["state"].get(number)
                if p in layers and (entries or p.any()):  # else no step was made: B is 0
                    own = {WEIGHT: layers[p].base_layer.weight.detach(), FACTOR: p.detach()}
                    state_dict["state"][number] = (entries or {}) | own  # not in place: they are the live ones
        return state_dict


def outer_loop(model: nn.Module) -> OuterLoop | None:
    """The outer loop of a model that `create_rso_model` has prepared, however it is wrapped; else `None`."""
    return rso_loop(model)
