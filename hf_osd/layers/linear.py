"""Linear layers that keep x P of their inputs x, from which the backward pass makes R."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .divided import parallel_product
from .int8 import Int8Weight
from .layer import LayerInfo
from .product import SubspaceProduct


class InSubspace:
    """What the prepared layers share. A copy of one, by pickle or deepcopy, is the plain layer that it was."""

    osd: LayerInfo
    plain: type[nn.Module]
    transposed = False

    def forward(self, x: Tensor) -> Tensor:
        """As of the plain layer; where gradients are computed, through [`SubspaceProduct`]."""
        osd, W = self.osd, self.weight  # type: ignore[attr-defined]
        trained = W.requires_grad or osd.hidden
        # what is no parameter has been made of one, by pruning or a parametrization; another is a caller's own
        own = torch.compiler.is_compiling() or osd.sharding is not None or id(W) == osd.weight_id
        if not trained or not torch.is_grad_enabled() or not own or not isinstance(W, nn.Parameter):
            return self.plain.forward(self, x)
        if osd.sharding is not None and osd.fsdp is None:
            return parallel_product(osd, x, W, self.bias)  # type: ignore[attr-defined]
        xP, B, kept = osd.in_subspace(x, W)
        if not B.requires_grad:  # as where all parameters were frozen, and W is no longer
            B.requires_grad_(True)
        return SubspaceProduct.apply(x, W, self.bias, B, xP, self.transposed, kept)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in vars(self).items() if name != "osd"}
        own = state["_parameters"]
        state["_parameters"] = own | {name: _plain_parameter(p) for name, p in own.items()}
        return _new, (self.plain,), state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        W = destination.get(prefix + "weight")
        if isinstance(W, Int8Weight):  # where there may be no room for all of them
            destination[prefix + "weight"] = W.plain().cpu()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        W = self.weight  # type: ignore[attr-defined]
        if not isinstance(W, Int8Weight):
            super()._apply(fn, recurse)  # type: ignore[misc]
            self.osd.weight_id = id(self._parameters.get("weight"))  # type: ignore[attr-defined]
            return self
        own = vars(self)
        del own["_parameters"]["weight"]
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
        finally:
            own["_parameters"] = {"weight": W} | own["_parameters"]
        W.convert_(fn(torch.empty(0, dtype=W.dtype, device=W.device)))
        return self


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _plain_parameter(p: Any) -> Any:
    return nn.Parameter(p.plain(), p.requires_grad) if isinstance(p, Int8Weight) else p


class SubspaceLinear(InSubspace, nn.Linear):
    """[`InSubspace`] for `nn.Linear`."""

    plain = nn.Linear


@cache
def prepared_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """The layers that can be prepared, by class; of a subclass nobody knows what else it does with its weight."""
    from transformers.pytorch_utils import Conv1D

    class SubspaceConv1D(InSubspace, Conv1D):
        """[`InSubspace`] for GPT-2's `Conv1D`."""

        plain, transposed = Conv1D, True

    return {nn.Linear: SubspaceLinear, Conv1D: SubspaceConv1D}
