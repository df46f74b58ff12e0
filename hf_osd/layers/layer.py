"""What a prepared layer knows, and how layers that are given the same tensor find each other."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import new_handle, project_compiled
from .exchange import group_of_ddp
from .fsdp import RowExchange
from .shared_input import Seen, SharedInput
from .start import FirstProjection
from .wholes import Wholes


def plain_class(module: nn.Module) -> type[nn.Module]:
    """What a layer is when it is not prepared."""
    return type(module).plain if "osd" in vars(module) else type(module)  # type: ignore[attr-defined]


class Meeting:
    """Where layers meet that are given the same tensor, in their first forward pass.

    Attributes:
        changed (`bool`): Whether any has met its input since the optimizer has looked.
        sharing (`bool`): Whether they may share: processes have agreed on it once the first step is made.
        group (`ProcessGroup`, *optional*): Those that average what P learns from, where there are several.
        rows ([`RowExchange`], *optional*): Theirs, where FSDP2 divides the weights.
        late (`bool`): Whether P learns in the backward pass, in which it moves.
        wholes ([`Wholes`]): Where all of a P is, of which each process has some rows.
        newest (`list[torch.Tensor]`): See [`SharedInput`].

    Args:
        layers (`Mapping[str, LayerInfo]`): All layers by name, as they come to be.
    """

    def __init__(self, layers: Mapping[str, "LayerInfo"]) -> None:
        self.changed, self.sharing, self.late, self.wholes = False, True, False, Wholes(layers)
        self.group: Any = None
        self.rows: RowExchange | None = None
        self._ddp: Any = lambda: None
        self.newest: list[Tensor] = []
        self._seen: list[tuple[Any, int, Any, SharedInput]] = []

    def find_ddp(self) -> None:
        """Know the DDP, if this is in a forward pass of one."""
        if self.group is None:
            self.group, self._ddp = group_of_ddp()

    def divide(self, layer: "LayerInfo") -> None:
        """Know the processes that a weight is divided among."""
        mesh = layer.sharding.mesh
        if mesh.size() > 1:
            self.group = layer.sharding.group
        if layer.fsdp is not None:
            self.rows = self.rows or RowExchange(layer.sharding, self.wholes.forget)
            if (self.rows.mesh, self.rows.placements) != (mesh, layer.sharding.placements):
                raise ValueError(
                    f"{layer.name} lies on another mesh than other layers. With source='activations' all must lie on "
                    "one: leave it out (`exclude_modules`)."
                )
            self.rows.layers.append(layer)

    def refuse_join(self) -> None:
        """Raise `ValueError` in torch's `Join`, which shadows the exchanges of DDP and none of ours."""
        ddp = self._ddp()
        if ddp is not None and ddp._join_config.enable:
            raise ValueError(
                "source='activations' exchanges in each step what P learns from, which `Join` does not shadow: give "
                "all processes as many batches, or use source='gradients'."
            )

    def join(self, x: Tensor, layer: "LayerInfo") -> SharedInput:
        """The input of the first layer, of the same kind, that was given this very tensor; else a new one."""
        self.changed = True
        self._seen = [entry for entry in self._seen if entry[0]() is not None]
        for known, version, kind, shared in self._seen:
            if self.sharing and known() is x and version == x._version and kind == layer.kind:
                return shared
        shared = layer.new_input()
        self._seen.append((weakref.ref(x), x._version, layer.kind, shared))
        return shared


class LayerInfo:
    """A weight whose R comes from the layers, one or several tied ones, that it is the weight of.

    Args:
        name (`str`): Of the weight.
        modules (`list[nn.Module]`): The layers.
        stand_ins (`nn.Module`): Holds the stand-in, whose gradient is R, as the parameter `key`.
        key (`str`): As above.
        meeting ([`Meeting`]): Of all layers of the model.
        residual_sample (`int`, *optional*): See [`SharedInput`].

    Attributes:
        stand_ins ([`PreparedLayers`]): As above.
        input ([`SharedInput`], *optional*): Of the layer; `None` before its first forward pass, unless it was loaded.
        weight_id (`int`): `id` of the model's own W, whatever a call is given for it; a reference would keep what is
            exchanged for a sharded one.
        met (`bool`): Whether it has had its first forward pass.
        first ([`FirstProjection`]): How P starts; the optimizer sets it.
        every (`int`): P learns of every k-th token; likewise.
        hidden (`bool`): Whether W requires its gradient, although it does not say so.
        sharding (`Sharding`, *optional*): How W, and with it the stand-in, is divided by rows.
        fsdp (`FSDPParamGroup`, *optional*): FSDP2's group of parameters that W is in, if FSDP2 divides it.
        leaf (`torch.Tensor`, *optional*): What this process's R arrives at, under FSDP2.
        width (`int`): Columns of what the layers make: r, and those of G for a residual.
        kind (hashable): Layers of one kind may share P: those of one parameter group and rank; likewise.
    """

    first: FirstProjection
    every: int
    kind: Any

    def __init__(
        self,
        name: str,
        modules: list[nn.Module],
        stand_ins: nn.Module,
        key: str,
        meeting: Meeting,
        residual_sample: int | None,
    ):
        self.name, self.modules, self.key, self.stand_ins, self._meeting = name, modules, key, stand_ins, meeting
        self.residual_sample = residual_sample
        self.transposed = plain_class(modules[0]) is not nn.Linear
        self.width = self.stand_in.shape[0 if self.transposed else 1]
        self.input: SharedInput | None = None
        self.weight_id = 0
        self.hidden = self.met = False
        self.sharding: Any = None
        self.fsdp: Any = None
        self.leaf: Tensor | None = None
        self._divided: Any = None
        self._handle, self._known_leaf = new_handle(self), self.stand_in

    def hide(self) -> None:
        """Keep W out of DDP, which would wait for its gradient: it takes what requires one when it wraps the model."""
        self.hidden, self.met = self.weight.requires_grad, False
        self.weight.requires_grad_(False)

    def show(self) -> None:
        """Let W require its gradient again: what comes of that is from elsewhere than its layers, and must be seen."""
        if self.hidden:
            self.hidden = False
            self.weight.requires_grad_(True)

    @property
    def side(self) -> str:
        """The side of the inputs, for a weight as it is stored."""
        return "left" if self.transposed else "right"

    @property
    def weight(self) -> nn.Parameter:
        """W; where it is divided, as it lies between steps, also while FSDP2 has it gathered, or divided by fewer."""
        W: Any = self.modules[0].weight
        if self._divided is None:
            return W
        if isinstance(W, type(self._divided)) and W.device_mesh == self.sharding.mesh:
            self._divided = W
        return self._divided

    @property
    def stand_in(self) -> nn.Parameter:
        """B: looked up each time, for what shards a model exchanges its parameters."""
        return self.stand_ins._parameters[self.key]  # type: ignore[return-value]

    def divide(self, sharding: Any, fsdp: Any) -> None:
        """Know that W is divided: by FSDP2 where there is a group of its, else by tensor parallelism."""
        self._divided, self.sharding, self.fsdp = self.modules[0].weight, sharding, fsdp
        self._known_leaf = self.stand_in
        self._meeting.divide(self)

    def new_input(self) -> SharedInput:
        """An input that this is the first layer of, whose weight then holds P."""
        return SharedInput(self.name, self.first, self.every, self.residual_sample, self._meeting.newest)

    def use(self, P: Tensor, code: Tensor | None, rows: Any) -> None:
        """Let the layers that have its input use this P of the optimizer from now on; see [`SharedInput.bind`]."""
        shared = self.input
        assert shared is not None
        shared.bind(P, code, rows, None if rows is None else self._meeting.wholes)
        if rows is not None:
            self._meeting.wholes.add(shared, self)

    @property
    def made(self) -> bool:
        """Whether there is R that this process has not sent."""
        return self.leaf is not None and self.leaf.grad is not None

    def _leaf(self, W: Tensor) -> Any:
        """What R arrives at: the stand-in, and under FSDP2 a leaf that it is sent from."""
        rows = self._meeting.rows
        if self.fsdp is None or rows is None:
            return self.stand_in
        if self.leaf is None or self.leaf.dtype != W.dtype:
            if W.device != self.weight.device:
                raise ValueError(
                    f"{self.name} is offloaded, which source='activations' does not support: leave `CPUOffloadPolicy` "
                    "out, or use source='gradients'."
                )
            zero = torch.zeros(1, 1, dtype=W.dtype, device=W.device)
            self.leaf = zero.expand(self.stand_in.shape).requires_grad_()
            self.leaf.register_post_accumulate_grad_hook(lambda _: rows.arrive(self))
        return self.leaf

    def forget(self) -> None:
        """Forget R."""
        self.stand_in.grad = None
        if self.leaf is not None:
            self.leaf.grad = None

    def meet(self, x: Tensor, W: Tensor) -> None:
        """Settle whose input x is, at the first forward pass."""
        self._known_leaf = self._leaf(W)
        self._meeting.find_ddp()
        if not self.hidden or self._meeting.group is not None:  # else DDP is yet to take what requires a gradient
            self.show()
            self.met = True
        if self.input is None:
            self.input = self._meeting.join(x, self)
        if self.input.P is None:
            self.input.P = self.first.draw(x.shape[-1], x.device)

    def in_subspace(self, x: Tensor, W: Tensor) -> tuple[Tensor, Any, Seen | None]:
        """The product x P of the input x, what R is to arrive at, and what P learns late; W is as the pass has it."""
        if torch.compiler.is_compiling():  # a look-up by key would be a graph for each key
            handle = self.input.handle if self.met else self._handle  # type: ignore[union-attr]
            return project_compiled(x, handle, self.width), self._known_leaf, None
        if not self.met:
            self.meet(x, W)
        xP, kept = self.input.project(x, self._meeting.late)  # type: ignore[union-attr]
        return xP, self._leaf(W), kept

    def product(self, x: Tensor, dtype: torch.dtype, compiled: bool) -> Tensor:
        """Of a compiled function that was given the handle of a layer, since it had not met its input."""
        if not self.met:
            self.meet(x, self.modules[0].weight)  # type: ignore[arg-type]
        return self.input.product(x, dtype, compiled)  # type: ignore[union-attr]
