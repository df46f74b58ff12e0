"""R of weights that FSDP2 divides: averaged over the processes, and divided by rows like the weights.

Letters and shapes as in `product`. FSDP2 gathers W for the forward and for the backward pass, and finds no gradient of
it to reduce. What process j makes in its backward pass is the whole R^j (m, r) of its own tokens; process i needs

    R_i = rows i of  1/p sum_j R^j

for its W_i. R of many weights are sent together, as soon as they are enough, and have become the gradients of the
stand-ins when the backward pass returns. When, in which precision and by what to divide is FSDP2's to say.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from .gather import collective


BUCKET = 2**25  # bytes of R that are sent together
ON_THE_WAY = 2  # buckets: bounds the memory that they take


def groups_of_fsdp(model: nn.Module) -> dict[nn.Module, Any]:
    """FSDP2's group of parameters that the weight of each module is in; empty where it manages none."""
    found: dict[nn.Module, Any] = {}
    for _, groups in modules_of_fsdp(model):
        for group in groups:
            for where in (managed._module_info for managed in group.fsdp_params):
                if where.param_name == "weight":
                    found |= dict.fromkeys([where.module, *where.shared_modules], group)
    return found


def modules_of_fsdp(model: nn.Module) -> Iterator[tuple[nn.Module, list[Any]]]:
    """The modules at whose calls FSDP2 gathers weights, and the groups of parameters that it gathers there."""
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # older torch has one, or none
            yield module, [*filter(None, [state._fsdp_param_group])] if groups is None else list(groups)


def may_differ(group: Any) -> bool:
    """Whether processes may differ in the layers of a group that they call."""
    return getattr(group, "reduce_scatter_unused_params", False)


def backward_of(group: Any) -> bool:
    """Whether the backward pass is in the module of a group, for which FSDP2 has its weights gathered."""
    return getattr(getattr(group, "_training_state", None), "name", None) == "PRE_BACKWARD"


def keep_from_fsdp(module: nn.Module) -> None:
    """Let `fully_shard` leave the parameters of a module alone, as it leaves those that are replicated."""
    if dist.is_available():
        from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem

        setattr(module, REGISTRY_KEY, {"replicate": RegistryItem()})


class Sent(NamedTuple):
    """R of some layers on their way.

    Attributes:
        layers (`list[LayerInfo]`): The layers.
        work (`Work`): Ends when the rows are there.
        given (`torch.Tensor`): What this process has sent, alive until then.
        rows (`torch.Tensor`): This process's rows of each, padded, one after another.
    """

    layers: list[Any]
    work: Any
    given: Tensor
    rows: Tensor


class RowExchange:
    """Sends and receives R of the layers of a model.

    Args:
        sharding (`Sharding`): How all of their weights lie on one mesh: by rows, on HSDP's several times.
        end (`Callable`): Is called at the end of each backward pass.
    """

    def __init__(self, sharding: Any, end: Callable[[], None]):
        self._end = end
        self.mesh, self.placements, self.group = sharding.mesh, sharding.placements, sharding.group
        self.layers: list[Any] = []
        self._divided, *others = sorted(range(self.mesh.ndim), key=lambda i: sharding.placements[i].is_replicate())
        self._copied = [i for i in others if self.mesh.size(i) > 1]
        self._waiting: dict[Any, None] = {}
        self._bytes = 0  # of what waits
        self._sent: list[Sent] = []
        self._pass, self._agreed = -1, self.mesh.size() == 1

    def arrive(self, layer: Any) -> None:
        """The backward pass has made R of a layer; it may come by it once more, as where a checkpoint has it twice."""
        this = torch._C._current_graph_task_id()
        if this != self._pass:
            self._pass = this
            Variable._execution_engine.queue_callback(self.finish)  # type: ignore[attr-defined]
        if self._agreed and layer.fsdp.reduce_grads and not _fills_up(layer):
            self._waiting[layer] = None
            self._bytes += layer.leaf.grad.nbytes
            if self._bytes >= BUCKET:
                self._send(self._waiting)

    @torch.no_grad()
    def finish(self) -> None:
        """The backward pass ends: send what there is of R, unless it is to add up here, and take in what comes."""
        ready = [layer for layer in self.layers if layer.fsdp.reduce_grads]
        if ready and not self._agreed:
            self._agree([layer.name for layer in ready if layer.made and not _fills_up(layer)])
        self._send({layer: None for layer in ready if layer.made or _fills_up(layer)})
        while self._sent:
            self._take_in(self._sent.pop(0))
        self._end()

    def _agree(self, called: list[str]) -> None:
        """Raise `ValueError` where processes have called different layers: what they exchange would not fit."""
        every: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(every, called, group=self.group)
        differing = set().union(*every) - set(called).intersection(*every)
        if differing:
            raise ValueError(
                f"{min(differing)} is called on some processes only. Tell FSDP2 so: "
                "`model.set_reduce_scatter_unused_params(True)`."
            )
        self._agreed = True

    @torch.no_grad()
    def _send(self, layers: dict[Any, None]) -> None:
        """Reduce-scatter R of these layers, as many at once as are one bucket."""
        reduce_scatter = collective("reduce_scatter_single", "reduce_scatter_tensor")
        for members in _buckets(layers):
            if len(self._sent) == ON_THE_WAY:
                self._take_in(self._sent.pop(0))
            given = self._by_process(members)
            rows = torch.empty_like(given[0])
            group = self.mesh.get_group(self._divided)
            work = reduce_scatter(rows, given.view(-1), group=group, async_op=True)
            self._sent.append(Sent(members, work, given, rows))
        self._waiting, self._bytes = {}, 0

    def _by_process(self, layers: list[Any]) -> Tensor:
        """The rows of each R that every process is to have, (processes, numbers); R is free then."""
        parts = self.mesh.size(self._divided)
        sizes = [rows * r for rows, r in (_padded(layer, parts) for layer in layers)]
        given = torch.zeros(parts, sum(sizes), dtype=_dtype(layers[0]), device=layers[0].weight.device)
        for layer, part in zip(layers, given.split(sizes, dim=1), strict=True):
            if not layer.made:
                continue
            R, (rows, _) = layer.leaf.grad, _padded(layer, parts)
            full = len(R) // rows
            part[:full] = R[: full * rows].reshape(full, -1)
            if full * rows < len(R):
                rest = R[full * rows :]
                part[full, : rest.numel()] = rest.flatten()
            part.div_(getattr(layer.fsdp, "gradient_divide_factor", None) or self.mesh.size())
            layer.leaf.grad = None
        return given

    def _take_in(self, sent: Sent) -> None:
        """Add what has arrived to the gradients of the stand-ins."""
        sent.work.wait()
        for i in self._copied:
            dist.all_reduce(sent.rows, group=self.mesh.get_group(i))
        shapes = [_padded(layer, self.mesh.size(self._divided)) for layer in sent.layers]
        parts = sent.rows.split([rows * r for rows, r in shapes])
        for layer, shape, part in zip(sent.layers, shapes, parts, strict=True):
            B = layer.stand_in
            R = part.view(shape)[: layer.sharding.local_size].to(B.dtype)
            if B.grad is None:
                B.grad = layer.sharding.wrap(R, B.shape, 0)
            else:
                B.grad.to_local().add_(R)


def _fills_up(layer: Any) -> bool:
    """Whether zeros are sent for a layer that was not called here, for others may have."""
    return may_differ(layer.fsdp) and layer.weight.requires_grad


def _dtype(layer: Any) -> torch.dtype:
    """The precision that FSDP2 would reduce gradients of W in."""
    policy = layer.fsdp.mp_policy
    return policy.reduce_dtype or policy.param_dtype or layer.weight.dtype


def _padded(layer: Any, parts: int) -> tuple[int, int]:
    """Shape of what each process gets, ceil(m / p) rows: where there are fewer, they are padded."""
    m, r = layer.stand_in.shape
    return -(-m // parts), r


def _buckets(layers: dict[Any, None]) -> Iterator[list[Any]]:
    """Those of one precision, in their order, up to a bucket's size."""
    for dtype in dict.fromkeys(map(_dtype, layers)):
        members: list[Any] = []
        size = 0
        for layer in layers:
            if _dtype(layer) == dtype:
                if members and size + layer.stand_in.numel() * dtype.itemsize > BUCKET:
                    yield members
                    members, size = [], 0
                members.append(layer)
                size += layer.stand_in.numel() * dtype.itemsize
        if members:
            yield members
