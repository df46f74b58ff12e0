"""Names without what torch wraps models in: one model has one name for each parameter, however it is trained."""

from collections.abc import Sequence

from torch import nn


WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})  # no names of anyone's own
DDP = "module"  # which may be


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP's, DataParallel's and torch.compile's wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def plain_name(name: str) -> str:
    """A name without the wrappers that are inside of a model, as where its blocks are compiled one by one."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_names(names: Sequence[str]) -> list[str]:
    """All names of a model without wrappers: `module.`, with which DDP begins each of them, as well."""
    names = list(map(plain_name, names))
    while names and all(name.startswith(f"{DDP}.") for name in names):
        names = [name.removeprefix(f"{DDP}.") for name in names]
    return names
