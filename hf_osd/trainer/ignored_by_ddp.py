"""Parameters that DDP leaves alone, by a mark on the model that its constructor reads."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


MARK = "_ddp_params_and_buffers_to_ignore"  # torch's name
_of_users: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # what each marked model had before


def ignore_all_but_one(model: nn.Module) -> None:
    """Let DDP hold the gradient of one small trained parameter alone, until `unmark`."""
    unmark(model)
    users = getattr(model, MARK, None)
    # as DDP asks: by every name of a tied parameter, ".name" for one of the model itself
    trained = [
        (f"{prefix}.{name}", p)
        for prefix, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad
    ]
    _, kept = min(trained, key=lambda entry: (entry[1].numel() == 0, entry[1].numel()))
    others = [name for name, p in trained if p is not kept]
    _of_users[model] = users
    setattr(model, MARK, [*(users or ()), *others, *(name[1:] for name in others if name.startswith("."))])


def unmark(model: nn.Module) -> None:
    """Give a model the mark back that its user had made, if any: another training's DDP must not see ours."""
    if model not in _of_users:
        return
    users = _of_users.pop(model)
    if users is None:
        delattr(model, MARK)
    else:
        setattr(model, MARK, users)
