"""How an [`OSD`] is saved, loaded, copied and pickled: as torch's optimizers, whatever it keeps beside them."""

import copy
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layers import PreparedLayers
from .arrival.clipping import take_norm
from .arrival.stream import GradientStream
from .loading import as_of_today, match_state, saved_inputs
from .options.asked import Asked
from .options.mode import Mode
from .options.table import loaded_lr
from .step.layer_weights import LayerWeights
from .step.weights import Weights


STAND_INS = "stand_ins"  # key of the group that holds them
CHECKPOINT = "torch.distributed.checkpoint.state_dict"  # pairs `param_groups` with `state_dict`, group by group


class SavedOptimizer(torch.optim.Optimizer):
    """Groups and states with the weights that are made of them. [`OSD`] makes and steps them."""

    mode: Mode
    asked: Asked
    partial_load: bool
    _given_projections: dict[str, Tensor]
    _stream: GradientStream | None
    _layers: PreparedLayers | None
    _weights: Weights | None
    _groups: list[dict[str, Any]] | None

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """All groups, that of stand-ins last; that one is hidden from [`torch.distributed.checkpoint`]."""
        asking = _asking()
        if asking is None:
            return self.__dict__["param_groups"]
        if self._layers is not None and asking != "_get_optim_state_dict":  # which looks once more after `state_dict`
            self._layers.show()
        return self.trained_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    @property
    def trained_groups(self) -> list[dict[str, Any]]:
        """`param_groups` without the one of stand-ins."""
        return [group for group in self.__dict__["param_groups"] if STAND_INS not in group]

    @property
    def weights(self) -> Weights:
        """All weights as they are stepped."""
        raise NotImplementedError

    @property
    def _layer_weights(self) -> LayerWeights:
        weights = self.weights
        assert isinstance(weights, LayerWeights)
        return weights

    def _weights_now(self) -> Callable[[], Weights]:
        """A way to `weights` that does not keep the optimizer alive, so that one that is dropped steps no more."""
        reference = weakref.ref(self)
        return lambda: reference().weights  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer; the norm that `previous_norm` clips by is in the groups."""
        self.weights.meet()
        self.weights.use_given()
        everything, self.param_groups = self.param_groups, self.trained_groups
        try:
            saved = super().state_dict()
        finally:
            self.param_groups = everything
        if saved["state"]:  # whole, for torch.distributed.checkpoint loads no entries that are not there
            for index, entries in self.weights.missing_states().items():
                saved["state"][index] = entries | saved["state"].get(index, {})
            if self._layers is not None:
                asked = _asking() is not None  # for what a saved state is read into, before its model is
                saved["state"] = self._layer_weights.with_int8(saved["state"], copies=asked)
                if asked:  # nor does its reader know which layers share a P
                    saved["state"] = self._layer_weights.with_shared(saved["state"])
        else:
            self.weights.let_go()
        if self._layers is not None:
            self._layers.hide()
        return saved if self._stream is None else self._stream.clipping.with_norm(saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state exactly: dtypes as saved, on the parameters' devices.

        Raises:
            ValueError: If it was saved with other rules, ranks, sides or targets, with a table of what differs (unless
                `partial_load`), or if an entry does not fit; nothing is changed then.
        """
        # torch's loader casts every entry but `step` to the parameter's dtype: P and 8-bit codes would be lost. Its
        # hooks see the state before and after, as they do there.
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        live = self.trained_groups
        self.weights.meet()  # which settles the sides of parameters that were sharded since
        shared = {} if self._layers is None else self._layers.shareable(saved_inputs(state_dict))
        state, groups = match_state(
            live, state_dict, self.partial_load, shared, self.mode.divide_projection is not False
        )
        groups, clip_norm2 = take_norm(copy.deepcopy(groups))
        for own, group in zip(live, groups, strict=True):
            group.update({name: own[name] for name in ("params", "param_names") if name in own})
            group["lr"] = loaded_lr(group["lr"], own["lr"])
        groups += [group for group in self.param_groups if STAND_INS in group]
        if self._layers is not None:  # nothing is refused any more
            loaded = {layer.name for p, layer in self._layers.by_weight().items() if p in state}
            self._layers.share_as({name: holder for name, holder in shared.items() if {name, holder} <= loaded})
            self._layers.forget()
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        self.weights.meet()  # with the options that the state was saved with, before anybody changes them
        if self._layers is not None:
            self._take_int8(later=_asking() is not None)
            self._layer_weights.give_projections()
            self._layers.hide()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
        if self._stream is not None:
            self._stream.load(clip_norm2)

    def _take_int8(self, later: bool) -> None:
        """Let int8 weights be those of the state; with `later`, also if the model is loaded before the next step."""
        self._layer_weights.take_int8()
        if not later:
            self._layer_weights.forget_int8()
            return

        def forget(*_: Any) -> None:
            self._layer_weights.forget_int8()
            handle.remove()

        handle = self.register_step_pre_hook(forget)

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and deepcopy keep: everything that cannot be derived."""
        kept = "_given_projections _uncycled _clipped _constructed partial_load mode asked _stream _layers".split()
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and forget what was derived."""
        super().__setstate__(state)  # torch's `load_state_dict` comes by here too, with state and groups alone
        defaults = {"mode": Mode(), "asked": Asked(), "_stream": None, "_layers": None, "_weights": None}
        for name, default in defaults.items():  # of what was saved before there were any
            self.__dict__.setdefault(name, default)
        for group in self.param_groups:
            today = as_of_today(group)  # may be another version's
            group.clear()
            group.update(today)
        alone = self._layers is not None and not isinstance(self._layers, PreparedLayers)
        if alone:  # copied: the copy of the model has plain layers
            self._layers = None
        if state.get("_stream") is not None:
            state["_stream"].restore(self._weights_now(), attach=not alone)


def _asking() -> str | None:
    """The function of torch.distributed.checkpoint that has called a method of ours, maybe by accelerate's wrapper."""
    frame: Any = sys._getframe(2)
    while frame.f_globals.get("__name__") == "accelerate.optimizer":
        frame = frame.f_back
    return frame.f_code.co_name if frame.f_globals.get("__name__") == CHECKPOINT else None
