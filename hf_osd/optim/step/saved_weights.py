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

    def with_int8(self, states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """States by position in which those of int8 weights have these, which a model is not saved in."""
        whole = dict(states)
        for index, p in enumerate(self._weights):
            if index in states and isinstance(p, Int8Weight):
                whole[index] = states[index] | dict(zip(INT8, (p.int_data, p.scale), strict=True))
        return whole

    def take_int8(self) -> None:
        """Let int8 weights be those of states that have been loaded, where a model that has been is these, rounded."""
        for p in self._weights:
            own: Any = self.state.get(p, {})
            K, s = (own.pop(name, None) for name in INT8)
            if isinstance(p, Int8Weight) and K is not None and not p.become_(Int8Weight(K, s, p.dtype)):
                logger.warning(
                    "%s is not the weight that was saved with the state, and stays as it is.",
                    self._weights[p].geometry.name,
                )
