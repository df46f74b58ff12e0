"""All of P for the forward pass, of which each process has some rows: gathered as FSDP2 gathers weights, and freed.

The P that the layers in one of FSDP2's groups of parameters need come together, when its module is called, whichever
of these layers a process then calls: as its weights do. The next group's are sent for meanwhile, which is the one that
came after it before in that pass. A checkpoint inside the module calls layers once more in the backward pass, where no
module is called: then the first of them asks or, where processes may differ in the layers that they call, FSDP2's
backward pass of the module does. Nothing is gathered where no gradients are computed. The backward pass itself needs
no P.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .fsdp import backward_of, may_differ, modules_of_fsdp
from .gather import BUCKET_LIMIT, Gather, narrower
from .shared_input import SharedInput


class Unit:
    """The P that are gathered together.

    Attributes:
        layers (`dict[SharedInput, LayerInfo]`): Of each input the layer whose weight holds P.
    """

    def __init__(self) -> None:
        self.layers: dict[SharedInput, Any] = {}
        self._gather: Gather | None = None

    @property
    def here(self) -> bool:
        """Whether it is, or is on its way."""
        return self._gather is not None

    @torch.no_grad()
    def send_for(self) -> None:
        """Gather, in the precision of the weights, unless P is kept in less. All processes come by here."""
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


class Wholes:
    """Brings all of P to who asks for it.

    A unit has the key of FSDP2's group that all layers of its inputs are in. An input of layers in several groups is a
    unit of its own, and its own key: of these groups each needs it.

    Args:
        layers (`Mapping[str, LayerInfo]`): The prepared layers of the model.
    """

    def __init__(self, layers: Mapping[str, Any]):
        self._layers = layers
        self._units: dict[Any, Unit] = {}
        self._keys: dict[SharedInput, Any] = {}
        self._needs: dict[Any, list[Unit]] = {}  # by key
        self._after: dict[tuple[bool, Any], Any] = {}  # by pass, backward or not, and key: the next one
        self._ahead: dict[Any, tuple[bool, Any]] = {}  # what was sent for after which, until it is asked for
        self._now: Any = None
        self._backward = False
        self._hooks: list[Any] = []
        self._modules: Counter[Any] = Counter()  # by group
        self._calls: list[tuple[Any, ...]] = []  # the groups of each module that is being called in a forward pass

    def add(self, shared: SharedInput, layer: Any) -> None:
        """Know an input whose P is divided, or that it is another tensor now."""
        groups = {other.fsdp for other in self._layers.values() if other.input is shared}
        known = self._keys.get(shared)
        if len(groups) > 1:
            key: Any = shared
        elif layer.fsdp is not None:
            key = layer.fsdp
        else:
            key = self._bucket(shared) if known is None else known
        if known is not None and known != key:
            self.remove(shared)
        self._keys[shared] = key
        unit = self._units.setdefault(key, Unit())
        unit.drop()
        unit.layers[shared] = layer
        self._needs.clear()

    def remove(self, shared: SharedInput) -> None:
        """Forget it: its P is whole."""
        key = self._keys.pop(shared, None)
        if key is not None:
            self._units[key].drop()
            del self._units[key].layers[shared]
            self._needs.clear()

    def _bucket(self, shared: SharedInput) -> int:
        """Where nothing is called that all of a group's layers are in, as with tensor parallelism: in their order."""
        last = max((key for key in self._units if isinstance(key, int)), default=0)
        inside = self._units[last].layers if last in self._units else ()
        size = sum(other.size * other.first.rank for other in (*inside, shared))
        return last + 1 if inside and size > BUCKET_LIMIT else last

    def take(self, shared: SharedInput) -> Tensor:
        """All of P, a tensor of its own.

        Raises:
            ValueError: Where not all processes may come by here, and it is not here.
        """
        key = self._keys[shared]
        unit = self._units[key]
        if not unit.here or not any(unit in self._of(other) for other in self._in_use()):
            layer = unit.layers[shared]
            if not may_differ(layer.fsdp):
                self._ask(key)
            elif not unit.here:
                raise ValueError(
                    f"{layer.name} is called outside of its module's call, maybe on some processes only "
                    "(`set_reduce_scatter_unused_params`): set `divide_projection=False`."
                )
        return unit.take(shared)

    def forget(self) -> None:
        """A pass has ended, or P is to move: free what is here."""
        for unit in self._units.values():
            unit.drop()
        for wrong in self._ahead.values():
            self._after.pop(wrong, None)
        self._ahead.clear()
        self._calls.clear()
        self._now = None

    def _of(self, key: Any) -> list[Unit]:
        """What is gathered for it."""
        if key not in self._needs:
            inputs = [layer.input for layer in self._layers.values() if layer.fsdp is not None and layer.fsdp is key]
            keys = dict.fromkeys([key, *(self._keys[shared] for shared in inputs if shared in self._keys)])
            units = (self._units[other] for other in keys if other in self._units)
            self._needs[key] = [unit for unit in units if unit.layers]
        return self._needs[key]

    def _in_use(self) -> Iterator[Any]:
        """Keys of what was asked for last, and of modules in their forward pass or, in a backward pass, in that."""
        yield self._now
        for keys in self._calls:
            yield from keys
        if _in_backward():
            yield from (key for key in self._units if backward_of(key))

    def _ask(self, key: Any) -> None:
        backward = _in_backward()
        if key != self._now:
            if self._now is not None and self._backward == backward:
                self._after[backward, self._now] = key
            self._now, self._backward = key, backward
        self._ahead.pop(key, None)
        for unit in self._of(key):
            unit.send_for()
        ahead = self._after.get((backward, key))
        kept = {unit for other in (*self._in_use(), ahead) for unit in self._of(other)}
        for unit in self._units.values():
            if unit not in kept:
                unit.drop()
        for wrong in self._ahead.keys() - {ahead}:
            self._after.pop(self._ahead.pop(wrong), None)
        if not all(unit.here for unit in self._of(ahead)):
            self._ahead[ahead] = backward, key
            for unit in self._of(ahead):
                unit.send_for()

    def attach(self, model: nn.Module) -> None:
        """Ask when a module is called that FSDP2 gathers weights for. Does nothing where that is so."""
        if self._hooks or not self._units:
            return
        own = weakref.ref(self)
        for module, groups in modules_of_fsdp(model):
            self._modules.update(groups)
            before, after = (torch.compiler.disable(partial(f, own, tuple(groups))) for f in (_called, _returned))
            self._hooks.append(module.register_forward_pre_hook(before))
            self._hooks.append(module.register_forward_hook(after, always_call=True))  # also where one is broken off

    def detach(self) -> None:
        """Ask no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._modules.clear()
        self.forget()

    def begin(self, keys: tuple[Any, ...]) -> None:
        """A module of these groups is called."""
        if not torch.is_grad_enabled():
            return
        if not _in_backward():
            self._calls.append(keys)
        for key in keys:
            self._ask_for_module(key)

    def _ask_for_module(self, key: Any) -> None:
        if self._of(key) and self._trains(key):
            self._ask(key)

    def end(self, keys: tuple[Any, ...], output: Any) -> None:
        """It has returned."""
        if keys in self._calls:
            self._calls.remove(keys)
        for key in keys:
            if key in self._units and self._modules[key] == 1 and key not in self._ahead:  # else it is to be called
                self._units[key].drop()
        if not self._calls and not _in_backward():
            self.forget()
        if torch.is_grad_enabled():
            for key in filter(may_differ, keys):
                ask = partial(_before_backward, weakref.ref(self), key)
                for y in tree_leaves(output):
                    if isinstance(y, Tensor) and y.requires_grad:
                        y.register_hook(ask)

    def _trains(self, key: Any) -> bool:
        return any(
            layer.fsdp is key and (layer.hidden or layer.weight.requires_grad) for layer in self._layers.values()
        )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _called(reference: Any, keys: tuple[Any, ...], *_: Any) -> None:
    wholes = reference()
    if wholes is not None:
        wholes.begin(keys)


def _returned(reference: Any, keys: tuple[Any, ...], module: Any, inputs: Any, output: Any) -> None:
    wholes = reference()
    if wholes is not None:
        wholes.end(keys, output)


def _before_backward(reference: Any, key: Any, _: Any) -> None:
    """The backward pass comes to the outputs of a module, as it does on all processes: FSDP2 gathers weights here."""
    wholes = reference()
    if wholes is not None:
        wholes._ask_for_module(key)


def _dtype(shared: SharedInput, layer: Any) -> torch.dtype:
    """FSDP2's for W, on all processes alike. Autocast may be on for one layer and off for another."""
    policy = None if layer.fsdp is None else layer.fsdp.mp_policy.param_dtype
    return narrower(shared.P, policy or layer.weight.dtype)  # type: ignore[arg-type]
