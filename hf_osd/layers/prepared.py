"""Prepare a model's linear layers, in place, so that their gradients never exist, and give the plain ones back."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .candidates import keeping_without_memory, owners_of, zeros_like_R
from .divided import reason_of, zeros_by_rows
from .exchange import add_energies, all_holders, average_inputs, ddp_may_come, share_int8
from .first_pass import end_first_pass, wait_for_first_pass
from .fsdp import groups_of_fsdp, keep_from_fsdp
from .int8 import Int8Weight, quantize_
from .layer import LayerInfo, Meeting, plain_class
from .linear import prepared_classes
from .other_optimizers import watch_others
from .plain import CHILD, make_plain, quantize_again, unload_others
from .shared_input import SharedInput


logger = logging.getLogger("hf_osd")


class PreparedLayers(nn.Module):
    """The prepared layers of a model, as a child of it, for it holds parameters: for each weight a stand-in of zeros.

    The gradient of a stand-in is R, with what comes beside it (`outside`), so everything that works on gradients works
    on R: accumulation, clipping, loss scaling, DDP. Where weights are divided, it is divided like them. Weights keep
    `requires_grad` and get no gradient from their layers; what else a model does with them is seen by the gradient
    that they get from there. Nothing of this is in the model's `state_dict`, none of it in a copy of the model, which
    has plain layers.

    Args:
        model (`nn.Module`): The model.
        ranks (`Mapping[str, int]`): Rank by name of weight; those that cannot be prepared are left.
        plain_name (`Callable`): Makes such a name the one that the optimizer calls the weight by.
        sharding_of (`Callable`): Says how a parameter of a name is divided; `None` for a whole one.
        residual_sample (`int`, *optional*): See [`SharedInput`].

    Attributes:
        layers (`dict[str, LayerInfo]`): By name of the weight.
        left (`dict[str, str]`): What could not be prepared, and why.
        meeting ([`Meeting`]): Where they find those that are given the same tensor.
        installed (`bool`): Whether the layers are in the model.
        owner (`Callable`): Gives the optimizer while it is there, whose hooks (`stream`), if any, go with the layers.
        findable (`bool`): Whether a loop is being made: DDP, and who lists what to clip, must find the stand-ins.
        counting (`bool`): Whether somebody counts the model's parameters, and must not find them.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Mapping[str, int],
        plain_name: Callable[[str], str],
        sharding_of: Callable[[Tensor, str], Any],
        residual_sample: int | None = None,
    ):
        super().__init__()
        self._model, self._sharding_of = (model,), sharding_of  # no child
        self.layers: dict[str, LayerInfo] = {}
        self.left: dict[str, str] = {}
        self.meeting = Meeting(self.layers)
        self.installed = self.findable = self.counting = self._following = False
        self.owner: Callable[[], Any] = lambda: None
        self._watch: Any = None
        owners = owners_of(model)
        whole = (sharding_of(model.get_parameter(name), name) is None for name in ranks)
        self._exchanged = ddp_may_come() and all(whole)
        self._shown: list[LayerInfo] = []
        self._given_back: dict[LayerInfo, Int8Weight] = {}  # whose layers have floats until they are installed again
        for name, rank in ranks.items():
            p, name = model.get_parameter(name), plain_name(name)
            modules, reason = owners[p]
            if reason is not None:
                self.left[name] = reason
                continue
            key = name.replace(".", "/")
            self.register_parameter(
                key, nn.Parameter(zeros_like_R(p, rank, modules[0], self._exchanged, residual_sample))
            )
            self.layers[name] = LayerInfo(name, modules, self, key, self.meeting, residual_sample)
        keep_from_fsdp(self)
        self.follow_weights()

    def forward(self, x: Any) -> Any:
        """Nothing: an `nn.Sequential` calls all its children."""
        return x

    def quantize(self, params: Iterable[Tensor]) -> None:
        """Keep those of these parameters that are the layers' in int8 from now on, one after the other."""
        layers = self.by_weight()
        for p in params:
            if p in layers:
                quantize_(layers[p].weight, layers[p].name)

    @property
    def int8(self) -> bool:
        """Whether any weight of theirs is in 8 bits now."""
        return any(isinstance(layer.weight, Int8Weight) for layer in self.layers.values())

    def install(self) -> None:
        """Put the layers into the model, or leave them there. What else it was prepared with goes out."""
        (model,) = self._model
        unload_others(model, keep=self if self.installed else None)
        if not self.layers:  # none could be prepared
            self.installed = True
            return
        for layer in self.layers.values():
            if layer in self._given_back:
                quantize_again(layer, self._given_back.pop(layer))
            for module in layer.modules:
                module.__class__ = prepared_classes()[plain_class(module)]
                vars(module)["osd"] = layer
            layer.weight_id = id(layer.modules[0]._parameters.get("weight"))
            if self._exchanged:
                layer.show()
                layer.hide()
        model.add_module(CHILD, self)
        self.installed = self.findable = True
        self.send_ahead()
        if self._watch is None:
            self._watch = watch_others(self)
        if any(layer.input is None for layer in self.layers.values()):
            wait_for_first_pass(self)

    def remove(self) -> None:
        """Make all layers plain again, and take the optimizer's hooks off, by which others would be stepped still."""
        (model,), stream = self._model, getattr(self.owner(), "stream", None)
        if stream is not None:
            stream.remove()
        for layer in self.layers.values():
            kept = make_plain(layer)
            if kept is not None:
                self._given_back[layer] = kept
            layer.show()
        end_first_pass(self)
        self.meeting.wholes.detach()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self.installed = False
        if model._modules.get(CHILD) is self:
            del model._modules[CHILD]

    def named_modules(self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        """None for the model, unless the stand-ins are to be found, or have gradients to be clipped or cleared.

        What pairs the model's parameters with another's, to average or copy them, finds the model's own.
        """
        self.follow_weights()
        if memo is None or not self.counting and (self.findable or self.has_gradients):
            yield from super().named_modules(memo, prefix, remove_duplicate)

    def show(self) -> None:
        """Let weights that DDP is not to find require gradients, for who asks them before the first forward pass."""
        self._shown += [layer for layer in self.layers.values() if layer.hidden]
        for layer in self._shown:
            layer.show()

    def hide(self) -> None:
        """The end of that."""
        for layer in self._shown:
            layer.hide()
        self._shown.clear()

    def leave(self, name: str, reason: str, expected: bool = False) -> None:
        """Make one layer plain for good; its stand-in stays where somebody expects to find it again."""
        layer = self.layers.pop(name)
        make_plain(layer)
        if not expected:
            delattr(self, layer.key)
        self.left[name] = reason

    def follow_weights(self) -> None:
        """Let stand-ins lie as their weights do: accelerate has FSDP2 divide them when there is an optimizer already.

        It then exchanges the optimizer's parameters, and looks for the model's: that is how it comes by here.
        """
        found = {layer: self._sharding_now(layer) for layer in self.layers.values() if layer.sharding is None}
        found = {layer: sharding for layer, sharding in found.items() if sharding is not None}
        if self._following or not found:
            return
        self._following = True  # a look for FSDP2 comes by here, too
        managed = groups_of_fsdp(self._model[0])
        self._following = False
        for layer, sharding in found.items():
            layer.show()
            reason = reason_of(sharding, layer.transposed)
            if reason is not None:
                self.leave(layer.name, reason, expected=self.installed)
                if self.installed:
                    logger.warning("%s learns from its gradients, not from activations: %s.", layer.name, reason)
                continue
            B, W = layer.stand_in, layer.weight
            self._parameters[layer.key] = zeros_by_rows(sharding, B.shape, W.dtype, W.device)
            layer.divide(sharding, next((managed[m] for m in layer.modules if m in managed), None))

    def _sharding_now(self, layer: LayerInfo) -> Any:
        W = layer.modules[0]._parameters.get("weight")
        if W is None or (W.is_meta and self.installed):  # computed from others; on its way to a device
            return None
        return self._sharding_of(W, layer.name)

    def by_weight(self) -> dict[Tensor, LayerInfo]:
        """The layers by weight, as these are now: moving and sharding a model exchanges them."""
        return {self._given_back.get(layer, layer.weight): layer for layer in self.layers.values()}

    def shareable(self, holders: Mapping[str, str]) -> dict[str, str]:
        """Those of `holders` (see `share_as`) whose layers are prepared, and of one kind."""
        kinds = {name: layer.kind for name, layer in self.layers.items()}
        pairs = holders.items()
        return {name: own for name, own in pairs if name in kinds and own in kinds and kinds[name] == kinds[own]}

    def share_as(self, holders: Mapping[str, str]) -> None:
        """Share inputs as a saved state, or other processes, say; that is right whatever the layers are given.

        Args:
            holders (`Mapping[str, str]`): By name of weight, the weight that holds P.
        """
        known = {shared.leader: shared for shared in self.inputs()}
        for name, holder in self.shareable(holders).items():
            if holder not in known:
                known[holder] = self.layers[holder].new_input()
            self.layers[name].input = known[holder]
            self.meeting.changed = True

    def restart(self, shared: SharedInput) -> None:
        """Let P of an input start anew, and forget the R that it has made."""
        shared.restart()
        shared.forget()
        for layer in self.layers.values():
            if layer.input is shared:
                layer.forget()

    def inputs(self) -> Iterator[Any]:
        """Every input that has been met, once."""
        return iter(dict.fromkeys(layer.input for layer in self.layers.values() if layer.input is not None))

    def agree(self) -> None:
        """Before a step: let all processes share inputs alike, and average what they have seen of them."""
        end_first_pass(self)
        group, meeting = self.meeting.group, self.meeting
        if meeting.rows is not None:  # what a backward pass that was broken off has left
            meeting.rows.finish()
        meeting.wholes.forget()
        if group is None:
            for layer in self.layers.values():  # nobody else takes what requires a gradient from now on
                layer.show()
            return
        meeting.refuse_join()
        if meeting.sharing:
            holders = {name: layer.input.leader for name, layer in self.layers.items() if layer.input is not None}
            self.share_as({name: name for name in self.layers} | all_holders(holders, group))
            meeting.sharing = False
            share_int8([layer.weight for layer in self.layers.values()], group)
            for layer in self.layers.values():
                layer.show()
                if layer.input is not None and layer.input.P is None:  # another process may have called it
                    rows = layer.weight.shape[0 if layer.transposed else 1]
                    layer.input.P = layer.first.draw(rows, layer.weight.device)
        layers = self.layers.values()
        inputs = {met: layer.weight.dtype for layer in layers if (met := layer.input) is not None}
        add_energies([shared for shared in inputs if shared.rows is not None], group)
        average_inputs({shared: dtype for shared, dtype in inputs.items() if shared.rows is None}, group)

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass has made any R."""
        made = any(layer.made for layer in self.layers.values())
        return made or any(B.grad is not None for B in self._parameters.values() if B is not None)

    def forget(self) -> None:
        """Forget what was seen since the last step, R included."""
        for shared in self.inputs():
            shared.forget()
        for layer in self.layers.values():
            layer.forget()
        self.meeting.wholes.forget()
        self.send_ahead()

    def send_ahead(self) -> None:
        """Let the modules that FSDP2 gathers weights for send for each P that processes divide, from now on."""
        if self.installed:
            self.meeting.wholes.attach(self._model[0])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(keeping_without_memory(fn), recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Identity, ()  # of a copied model, whose layers are plain
