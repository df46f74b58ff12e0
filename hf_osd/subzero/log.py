"""A run as the list of its rho: a file of kilobytes from which the fine-tuned weights are made again."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..hub.locate import Source
from ..optim.selection.wrappers import plain_name, unwrapped
from ..text import written_whole
from ..version import __version__
from .log_file import FILE, read_log, write_log
from .optimizer import SubZero, subzero_of
from .options import Options
from .selection import given_bases
from .weight import LowRankWeight
from .weights import Weights, fingerprint, means


FAR = 0.1  # of a run's way: what is no rounding


logger = logging.getLogger("hf_osd")


@dataclass(frozen=True, eq=False)
class SubZeroLog:
    """All that a run of [`SubZero`] did: seeds and rho of every step.

    Attributes:
        rho (`torch.Tensor`): (steps, queries) as the weights were updated by it, after clipping.
        lr (`torch.Tensor`): (steps, groups).
        config (`dict`): Options, parameters with dtype, shape and group, and fingerprints of start and end.
    """

    rho: Tensor
    lr: Tensor
    config: dict[str, Any]

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer) -> "SubZeroLog":
        """A copy of what an optimizer has done so far; accelerate's wrapper is looked through.

        Raises:
            ValueError: For another optimizer, before the first step, where V follows inputs, and after
                `load_best_model_at_end` has given the model other weights.
        """
        own = subzero_of(optimizer)
        if own is None or not own.steps:
            raise ValueError("A SubZeroLog needs an optimizer `SubZero` that has made a step.")
        if own.weights.following:
            raise ValueError("source='activations' leaves no SubZeroLog, which cannot tell V: save the model instead.")
        if own.replaced:
            raise ValueError(
                "The model has no longer the weights of the last step (`load_best_model_at_end`): use "
                "SubZeroLog.from_pretrained(trainer.state.best_model_checkpoint)."
            )
        rho, lr = own.history()
        return cls(rho.cpu(), lr, _config(own))

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Write `subzero_log.safetensors` into a folder, whole or not at all."""
        path = Path(save_directory, FILE)
        with written_whole(path) as temporary:
            write_log(temporary, {"rho": self.rho, "lr": self.lr}, self.config)
        return path

    @classmethod
    def from_pretrained(cls, folder_or_id: str | os.PathLike, **source: Any) -> "SubZeroLog":
        """Read it from a folder or a repository; `source` are `revision`, `subfolder`, `token` and so on.

        Raises:
            ProjectionFileError: If there is none, or one that cannot be read.
        """
        where = Source(folder_or_id, **source)
        tensors, config = read_log(where.path(FILE), f"{FILE} in {where.name}")
        return cls(tensors["rho"], tensors["lr"], config)

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload the log of SubZero", **options: Any) -> Any:
        """Upload the file in one commit; nothing else in the repository changes.

        Args:
            repo_id (`str`): Created if need be.
            commit_message (`str`, *optional*): Of the commit.
            options: `token`, `private`, `revision` and `create_pr`, as everywhere with the Hub.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=options.pop("token", None), library_name="hf_osd", library_version=__version__)
        repo_id = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            path = self.save_pretrained(folder)
            return api.upload_file(
                path_or_fileobj=path, path_in_repo=FILE, repo_id=repo_id, commit_message=commit_message, **options
            )


def replay(
    model: nn.Module, log: SubZeroLog | str | os.PathLike, init: Mapping | str | os.PathLike | None = None
) -> None:
    """Make the fine-tuned weights of the ones that the run started from, in place.

    On the same kind of machine and versions they are bit for bit the run's, elsewhere up to rounding; a warning tells.
    That of bfloat16 is random, and can be as long as the run's way.

    Args:
        model (`nn.Module`): As it was before the run: same weights, same dtype.
        log ([`SubZeroLog`], `str` or `os.PathLike`): Or a folder or repository that has it.
        init (`ProjectionState`, `str` or `os.PathLike`, *optional*): That of the run, if it had one.

    Raises:
        ValueError: For a model with other parameters or values, directions drawn on another kind of device, and where
            the weights end elsewhere than the run's.
    """
    log = log if isinstance(log, SubZeroLog) else SubZeroLog.from_pretrained(log)
    weights = _weights_of(unwrapped(model), log.config, init)
    if fingerprint(weights) != log.config["start"]:
        raise ValueError(
            "The weights are not those that the run started from: load its base model, in its dtype, or the "
            "checkpoint that it went on from without the optimizer's state."
        )
    start, parameters = means(weights), log.config["parameters"]
    decays = {name: entry["weight_decay"] for name, entry in parameters.items()}
    device = next(iter(weights.weights.values())).W.device
    with torch.no_grad():
        for step, (rho, rates) in enumerate(zip(log.rho.to(device), log.lr.tolist(), strict=True)):
            weights.begin(step)
            weights.update_(rho, {name: rates[entry["group"]] for name, entry in parameters.items()}, decays)
    if fingerprint(weights) != log.config["end"]:
        _tell_how_far(weights, start, log.config["means"])


def _tell_how_far(weights: Weights, *few: list[float]) -> None:
    """Warn of weights that end near the run's, raise for others; `few` are means of its start and end."""
    here, start, end = (torch.tensor(values, dtype=torch.float64) for values in (means(weights), *few))
    off, way = (here - end).norm().item(), (end - start).norm().item()
    if off <= FAR * way:
        logger.warning(
            "The weights differ from the run's by rounding (%.2g of its way): it ran on another machine or with other "
            "versions.",
            off / max(way, 1e-300),
        )
        return
    text = f"The weights end {off:.2g} off the run's, whose way was {way:.2g}: they were changed beside it"
    if any(weight.W.dtype == torch.bfloat16 for weight in weights.weights.values()):
        logger.warning("%s, or it ran on another machine, where bfloat16 is rounded otherwise.", text)
        return
    raise ValueError(f"{text}, or it drew otherwise, with another version of torch.")


def _config(optimizer: SubZero) -> dict[str, Any]:
    weights = optimizer.weights.weights
    parameters = {
        name: {
            "dtype": str(weights[name].W.dtype).removeprefix("torch."),
            "shape": list(weights[name].W.shape),
            "low_rank": isinstance(weights[name], LowRankWeight),
            "group": index,
            "weight_decay": group["weight_decay"],
        }
        for index, group in enumerate(optimizer.weight_groups)
        for name in group["param_names"]
    }
    config = getattr(optimizer.model, "config", None)
    return {
        "hf_osd": __version__,
        "torch": torch.__version__,
        "base_model": getattr(config, "_name_or_path", None) or "",
        "device": None if optimizer.weights.portable else optimizer.direction.device.type,
        "options": optimizer.options.plain(),
        "bases": optimizer.weights.bases,
        "start": optimizer.param_groups[-1]["start"],
        "end": fingerprint(optimizer.weights),
        "means": means(optimizer.weights),
        "parameters": parameters,
    }


def _weights_of(model: nn.Module, config: Mapping[str, Any], init: Any) -> Weights:
    """The parameters that the run trained, as they were perturbed in it."""
    named = {plain_name(name): p for name, p in model.named_parameters()}
    for name, entry in config["parameters"].items():
        here = named.get(name)
        found = None if here is None else (str(here.dtype).removeprefix("torch."), list(here.shape))
        if found != (entry["dtype"], entry["shape"]):
            raise ValueError(f"The run trained {name} ({entry['dtype']}, {entry['shape']}), this model has {found}.")
        assert here is not None
        if config["device"] not in (None, here.device.type):
            raise ValueError(f"The run drew on {config['device']}: move the model there, for others draw otherwise.")
    if config["options"]["init"] != (init is not None):
        raise ValueError("The run had an `init`: give it." if init is None else "The run had no `init`: leave it out.")
    options = Options(**{**config["options"], "init": init})
    trained = {name: named[name] for name in config["parameters"]}
    matrices = {name for name, entry in config["parameters"].items() if entry["low_rank"]}
    weights = Weights(trained, matrices, options, given_bases(options, trained, matrices), {})
    if weights.bases != config["bases"]:
        raise ValueError("`init` is another one than the run's.")
    return weights
