"""All of P for the forward pass, of which each process has some rows: gathered as FSDP2 gathers weights, and freed.

The P of one of FSDP2's groups of parameters come together, when its module is called, whichever layers in it a process
then calls: as its weights do. The next group's are sent for meanwhile, which is the one that came after it before. A
checkpoint may call layers once more in the backward pass, where no module is called: then the first of them asks.
Nothing is gathered where no gradients are computed. The backward pass itself needs no P.
"""

import weakref
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .fsdp import modules_of_fsdp
from .gather import BUCKET_LIMIT, Gather
from .shared_input import SharedInput, dtype_of_products


class Unit:
    """The P that are gathered together.

    Attributes:
        layers (`dict[SharedInput, LayerInfo]`): Of each input the layer whose weight holds P.
        held (`bool`): Whether a module that it is for is being called.
        guess (`tuple`, *optional*): What it was sent for after, until it is asked for.
    """

    def __init__(self) -> None:
        self.layers: dict[SharedInput, Any] = {}
        self.held = False
        self.guess: tuple[bool, Unit] | None = None
        self._gather: Gather | None = None

    @property
    def here(self) -> bool:
        """Whether it is, or is on its way."""
        return self._gather is not None

    @torch.no_grad()
    def send_for(self) -> None:
        """Gather, in the precision of the products, unless P is kept in less. All processes come by here."""
        if self._gather is None:
            parts = {shared: (shared.P, shared.rows) for shared in self.layers}
            dtypes = [_dtype(shared, layer) for shared, layer in self.layers.items()]
            self._gather = Gather(parts, max(dtypes, key=lambda dtype: dtype.itemsize))  # type: ignore[arg-type]

    def take(self, shared: SharedInput) -> Tensor:
        """All of one P."""
        assert self._gather is not None
        return self._gather.take(shared)

    def drop(self) -> None:
        """Free them."""
        if self._gather is not None:
            self._gather.wait()
            self._gather = None
        self.held, self.guess = False, None


class Wholes:
    """Brings all of P to who asks for it.

    Args:
        layers (`Mapping[str, LayerInfo]`): The prepared layers of the model.
    """

    def __init__(self, layers: Mapping[str, Any]):
        self._layers = layers
        self._units: dict[Any, Unit] = {}
        self._keys: dict[SharedInput, Any] = {}
        self._after: dict[tuple[bool, Unit], Unit] = {}  # by pass, backward or not, and unit: the next one
        self._now: Unit | None = None
        self._backward = False
        self._hooks: list[Any] = []
        self._called: Counter[Any] = Counter()  # modules by group

    def add(self, shared: SharedInput, layer: Any) -> None:
        """Know an input whose P is divided, or that it is another tensor now."""
        key = self._keys.get(shared)
        if key is None:
            key = self._keys[shared] = layer.fsdp or self._bucket(shared)
        unit = self._units.setdefault(key, Unit())
        unit.drop()
        unit.layers[shared] = layer

    def remove(self, shared: SharedInput) -> None:
        """Forget it: its P is whole."""
        key = self._keys.pop(shared, None)
        if key is not None:
            self._units[key].drop()
            del self._units[key].layers[shared]

    def _bucket(self, shared: SharedInput) -> int:
        """Where nothing is called that all of a group's layers are in, as with tensor parallelism: in their order."""
        last = max((key for key in self._units if isinstance(key, int)), default=0)
        inside = self._units[last].layers if last in self._units else ()
        size = sum(other.size * other.first.rank for other in (*inside, shared))
        return last + 1 if inside and size > BUCKET_LIMIT else last

    def take(self, shared: SharedInput) -> Tensor:
        """All of P, a tensor of its own."""
        unit = self._units[self._keys[shared]]
        if not unit.here or (unit is not self._now and not unit.held):
            self._ask(unit)
        return unit.take(shared)

    def forget(self) -> None:
        """A pass has ended, or P is to move: free what is here."""
        for unit in self._units.values():
            self._drop(unit)
        self._now = None

    def _ask(self, unit: Unit) -> None:
        backward = torch._C._current_graph_task_id() != -1
        if unit is not self._now:
            if self._now is not None and self._backward == backward:
                self._after[backward, self._now] = unit
            self._now, self._backward = unit, backward
        unit.guess = None
        unit.send_for()
        ahead = self._after.get((backward, unit))
        for other in self._units.values():
            if other is not unit and other is not ahead and not other.held:
                self._drop(other)
        if ahead is not None and ahead.layers and not ahead.here:
            ahead.send_for()
            ahead.guess = (backward, unit)

    def _drop(self, unit: Unit) -> None:
        if unit.guess is not None:  # which was wrong
            self._after.pop(unit.guess, None)
        unit.drop()

    def attach(self, model: nn.Module) -> None:
        """Ask when a module is called that FSDP2 gathers weights for. Does nothing where that is so."""
        if self._hooks or not self._units:
            return
        own = weakref.ref(self)
        for module, groups in modules_of_fsdp(model):
            self._called.update(groups)
            for key in groups:
                before, after = (torch.compiler.disable(partial(f, own, key)) for f in (_called, _returned))
                self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def detach(self) -> None:
        """Ask no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._called.clear()
        self.forget()

    def begin(self, key: Any) -> None:
        """A module of a group is called."""
        unit = self._units.get(key)
        if unit is None or not unit.layers or not torch.is_grad_enabled() or not self._trains(key):
            return
        self._ask(unit)
        # a checkpoint breaks a call in the backward pass off when it has what it needs: then nobody would free it
        unit.held = torch._C._current_graph_task_id() == -1

    def end(self, key: Any) -> None:
        """It has returned."""
        unit = self._units.get(key)
        if unit is None:
            return
        unit.held = False
        if self._called[key] == 1 and unit.guess is None:  # else another one is about to be called
            unit.drop()

    def _trains(self, key: Any) -> bool:
        return any(
            layer.fsdp is key and (layer.hidden or layer.weight.requires_grad) for layer in self._layers.values()
        )


def _called(reference: Any, key: Any, *_: Any) -> None:
    wholes = reference()
    if wholes is not None:
        wholes.begin(key)


def _returned(reference: Any, key: Any, *_: Any) -> None:
    wholes = reference()
    if wholes is not None:
        wholes.end(key)


def _dtype(shared: SharedInput, layer: Any) -> torch.dtype:
    """What products of an input come in, as far as can be told before it is there, on all processes alike."""
    W, P = layer.weight, shared.P
    policy = None if layer.fsdp is None else layer.fsdp.mp_policy.param_dtype
    dtype = dtype_of_products(W.device.type, policy or W.dtype)
    return min(dtype, P.dtype, key=lambda dtype: dtype.itemsize)  # type: ignore[union-attr]
