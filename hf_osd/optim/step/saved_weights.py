"""What a saved state has of the weights of layers beside their own entries: P that they share, and int8 weights."""

import logging
from typing import Any

from torch import Tensor

from ...layers.int8 import Int8Weight
from .input_weight import InputWeight
from .state import held_elsewhere
from .weights import Weights


logger = logging.getLogger("hf_osd")

INT8 = ("weight_int8", "weight_scale")  # entries of a saved state that are no state: the weight itself


class SavedWeights(Weights):
    """As [`Weights`], with what their states are saved with."""

    def with_shared(self, states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """States by position in which those of weights that share a P have it, too."""
        places = {weight: index for index, weight in enumerate(self._weights.values())}
        whole = dict(states)
        for weight, index in places.items():
            if index in states and isinstance(weight, InputWeight):
                held = states.get(places[weight.leader], {})
                shared = held.keys() & held_elsewhere(weight.geometry, weight.rules)
                whole[index] = states[index] | {name: held[name] for name in shared}
        return whole

    def with_int8(self, states: dict[int, dict[str, Tensor]], copies: bool) -> dict[int, dict[str, Tensor]]:
        """States by position in which those of int8 weights have these, which a model is not saved in."""
        whole = dict(states)
        for index, p in enumerate(self._weights):
            if index in states and isinstance(p, Int8Weight):
                parts = (X.clone() if copies else X for X in (p.int_data, p.scale))
                whole[index] = states[index] | dict(zip(INT8, parts, strict=True))
        return whole

    def take_int8(self) -> None:
        """Let int8 weights be those of states that have been loaded, where the model is these, rounded, or will be."""
        for p in self._weights:
            own: Any = self.state.get(p, {})
            K, s = (own.pop(name, None) for name in INT8)
            if isinstance(p, Int8Weight) and K is not None:
                W = Int8Weight(K, s, p.dtype)
                p.expected = None if p.become_(W) else W

    def forget_int8(self) -> None:
        """Expect no more models for the states that have been loaded, and tell of weights that are none of theirs."""
        for p, weight in self._weights.items():
            if isinstance(p, Int8Weight) and p.expected is not None:
                p.expected = None
                logger.warning(
                    "%s is not the weight that was saved with the state, and stays as it is.", weight.geometry.name
                )
