"""Checkpoints of models that are sharded when they are loaded: `from_pretrained(..., distributed_config=...)`.

Trainer trains such a model, and refuses to save more of it than weights, which it then cannot read back. Here the
optimizer's state goes through `torch.distributed.checkpoint`, each process its own part, and is read by any number of
processes, one with a whole model included.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..optim import OSD
from ..optim.osd import osd_of
from ..optim.step.sharding import is_sharded, local
from ..text import shortened
from .settings import uses_osd


STATE_FOLDER = (
    "optimizer_dcp"  # in a checkpoint; Trainer without hf_osd takes note of it and does not find its own file
)


def sharded_when_loaded(model: Any) -> bool:
    """Whether `from_pretrained` has divided the model among processes."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


def refused_without_cause(given: Mapping[str, Any]) -> bool:
    """Whether Trainer's constructor, called with what is `given`, would refuse checkpoints that we can write.

    It refuses all but those of weights alone for such a model, whatever the optimizer is.
    """
    args = given.get("args")
    return (
        isinstance(args, TrainingArguments)
        and sharded_when_loaded(given.get("model"))
        and not args.save_only_model
        and (uses_osd(args) or osd_of((given.get("optimizers") or (None,))[0]) is not None)
    )


def forget(checkpoint: Path) -> None:
    """Let a folder that will be written over be no complete checkpoint, and have no state of an earlier run."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint / STATE_FOLDER, ignore_errors=True)


def save_state(model: nn.Module, optimizer: OSD, checkpoint: Path) -> None:
    """Write the optimizer's state into a checkpoint; all processes must call it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    if not dist.is_initialized() or dist.get_rank() == 0:
        forget(checkpoint)
    if dist.is_initialized():
        dist.barrier()
    saved: Any = get_optimizer_state_dict(model, optimizer)
    for key, entries in saved["state"].items():  # the optimizer's own, which must stay as they are
        saved["state"][key] = {name: _lying(value) for name, value in entries.items()}
    dcp.save({"optimizer": saved}, checkpoint_id=checkpoint / STATE_FOLDER)


def has_state(checkpoint: str | Path) -> bool:
    """Whether `save_state` has written into this checkpoint; `.metadata` comes last."""
    return (Path(checkpoint) / STATE_FOLDER / ".metadata").is_file()


def load_state(model: nn.Module, optimizer: OSD, checkpoint: str | Path) -> None:
    """Load what `save_state` has written, as [`OSD.load_state_dict`] does: exactly, or not at all.

    Each process reads what it needs. Entries that are whole here, or of another shape, are read as they were saved.

    Raises:
        ValueError: With a table of what differs, if another optimizer has saved it.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    folder = Path(checkpoint) / STATE_FOLDER
    live: Any = {}
    if any(is_sharded(p) for group in optimizer.trained_groups for p in group["params"]):
        live = get_optimizer_state_dict(model, optimizer)["state"]
    metadata = dcp.FileSystemReader(folder).read_metadata()
    places = {
        key: _place(path, metadata.state_dict_metadata[key], live) for key, path in metadata.planner_data.items()
    }
    read = {key: _lying(place) for key, place in places.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process alone reads all
        dcp.load(read, checkpoint_id=folder)
    saved: dict[str, Any] = {"state": {}, "param_groups": {}}
    for key, (_, kind, owner, name) in metadata.planner_data.items():
        saved[kind].setdefault(owner, {})[name] = _lying(read[key], places[key])
    saved["param_groups"] = [group for _, group in sorted(saved["param_groups"].items())]
    optimizer.load_state_dict(saved)


def _place(path: tuple[Any, ...], saved: Any, live: Mapping[str, Mapping[str, Any]]) -> Any:
    """What an entry is read into: the process's own part where it is divided here as well, else a whole tensor."""
    if not hasattr(saved, "size"):  # no tensor
        return None
    _, _, name, entry = path
    own = live.get(name, {}).get(entry)
    if isinstance(own, Tensor) and own.shape == saved.size and own.dtype == saved.properties.dtype:
        return torch.empty_like(own)  # what is there may have to stay
    return torch.empty(saved.size, dtype=saved.properties.dtype)


def _lying(X: Any, like: Any = None) -> Any:
    """A DTensor of `_StridedShard` (FSDP2 over tensor parallelism), which DCP takes for another, divided plainly.

    Anything else as it is. With `like`, it is back to how that lies.
    """
    if not is_sharded(X):
        return X
    from torch.distributed.tensor import Shard

    plain = tuple(Shard(p.dim) if hasattr(p, "split_factor") else p for p in X.placements)
    wanted = plain if like is None else tuple(like.placements)
    return X if wanted == tuple(X.placements) else X.redistribute(placements=wanted)


def load_weights(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Load a checkpoint's weights, each process its own part, as the model itself was loaded.

    Raises:
        ValueError: If some of the model's weights are not there, or of other shapes.
    """
    from torch.distributed.fsdp import FSDPModule

    kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    saved, told = kind.from_pretrained(
        checkpoint,
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        distributed_config=model.config.distributed_config,
        output_loading_info=True,
    )
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(f"{checkpoint} lacks {shortened(missing, 3)}: the run would go on with other weights.")
    found = saved.state_dict()
    for name, value in model.state_dict().items():
        local(value).copy_(local(found[name]))
