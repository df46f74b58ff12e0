"""What a model card tells about a run, read from the run itself."""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...optim import OSD, adamw_state_bytes, predicted_state_bytes
from ...optim.options.rules import rules_of
from ...optim.options.table import DEFAULTS, LR_MULTIPLE
from ...optim.osd import osd_of
from ...optim.selection.ratios import KINDS
from ...optim.step.geometry import ProjectedGeometry
from ...subspace import SUBSPACES
from ...subspace.initialization import INITS
from ..config import group_options, versions


if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments


HUB_ID = re.compile(r"([A-Za-z0-9_][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
NLL_LOSSES = (None, "nll", "chunked_nll")  # of trl's SFTConfig


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells about a run with [`OSD`]."""

    model_name: str  # title of a card that is made from nothing
    repo_id: str  # where the model will be found, such as `user/name`
    optim: str  # such as `osd_adamw8bit`
    options: Mapping[str, tuple[Any, ...]]  # name in `osd_config.json` -> its values over the projected groups
    ranks: tuple[int, ...]  # the effective ranks, ascending
    matrices: int  # how many weights are projected; each expert's counts
    from_activations: int  # how many of them go by activations
    projections: int  # how many P there are: layers that are given one input share theirs
    projected_parameters: int  # elements of these
    full_size_parameters: int  # elements of all other parameters of the optimizer
    state_bytes: int  # of the optimizer's state
    adamw_bytes: int  # of the state that AdamW would hold for the same parameters
    learning_rate: float  # the initial one
    lr_scheduler: str  # name of the schedule
    steps: int  # so far
    targets: str | list[str] | None  # what to project, as the optimizer was asked
    exclude: str | list[str] | None  # what not to project, likewise
    preset: str | None  # its name
    init: str | None  # where P started from, if that was asked for
    lr_pattern: str | None  # as one text
    full_size_optim: str | None  # update rule at full size, if that was asked for
    lr_ratios: Mapping[str, float]  # by option, those that a trained parameter has and that are not 1
    train_loss: float | None  # the last one that was logged
    eval_loss: float | None  # the last one
    perplexity: float | None  # exp(eval_loss), where that is the mean loss of a causal language model
    log_history: tuple[dict[str, Any], ...]  # as in `TrainerState`
    library_name: str  # `transformers` or `peft`
    model_class: str | None  # the class that loads the model, such as `transformers.AutoModelForCausalLM`
    base_model: str | None  # the model on the Hub that training started from
    datasets: tuple[str, ...]  # names of the data sets
    versions: Mapping[str, str]  # as in `osd_config.json`

    @classmethod
    def from_run(
        cls,
        optimizer: torch.optim.Optimizer,
        args: "TrainingArguments",
        state: "TrainerState",
        model: nn.Module,
        *,
        base_model: str | None = None,
        dataset: str | Sequence[str] | None = None,
        repo_id: str | None = None,
    ) -> "CardFacts":
        """Read the facts from what a Trainer holds.

        Args:
            optimizer ([`OSD`]): accelerate's wrapper is looked through.
            args (`TrainingArguments`): The run's arguments.
            state (`TrainerState`): Holds steps and losses.
            model (`nn.Module`): The model.
            base_model (`str`, *optional*): Defaults to the name that the model was loaded by; a folder is none.
            dataset (`str` or `list[str]`, *optional*):
                Names of the data. Those of the form `user/name` get into the metadata as data sets on the Hub.
            repo_id (`str`, *optional*): Defaults to `args.hub_model_id`, or a placeholder with the folder's name.
        """
        osd = osd_of(optimizer)
        if osd is None:
            raise ValueError(f"CardFacts.from_run needs an OSD optimizer, got {type(optimizer).__name__}.")
        projected = [group for group in osd.trained_groups if group["rank"] is not None]
        groups = [group_options(group) for group in projected or osd.trained_groups]
        for own, group in zip(groups, projected, strict=bool(projected)):
            if group["subspace"] in SUBSPACES:
                own["update_interval"] = getattr(rules_of(group).subspace, "update_interval", None)
        sizes = [(osd.weight_of(p).geometry, p.numel()) for group in osd.trained_groups for p in group["params"]]
        low_rank = [(geometry, numel) for geometry, numel in sizes if isinstance(geometry, ProjectedGeometry)]
        asked = osd.asked
        repo_id = repository_of(args, repo_id)
        eval_loss, first = _last(state, "eval_loss"), osd.param_groups[0]
        return cls(
            model_name=repo_id.split("/")[-1],
            repo_id=repo_id,
            optim=groups[0]["optim"],
            options=_options(groups) if projected else {},
            ranks=tuple(sorted({geometry.rank for geometry, _ in low_rank})),
            matrices=sum(geometry.matrices for geometry, _ in low_rank),
            from_activations=sum(geometry.holder is not None for geometry, _ in low_rank),
            projections=sum(geometry.matrices for geometry, _ in low_rank if geometry.holds_projection),
            projected_parameters=sum(numel for _, numel in low_rank),
            full_size_parameters=sum(
                numel for geometry, numel in sizes if not isinstance(geometry, ProjectedGeometry)
            ),
            state_bytes=predicted_state_bytes(osd),
            adamw_bytes=adamw_state_bytes(osd),
            learning_rate=float(first.get("initial_lr", first["lr"])) / first.get(LR_MULTIPLE, 1),
            lr_scheduler=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            steps=state.global_step,
            targets=asked.target_modules,
            exclude=asked.exclude_modules,
            preset=asked.preset,
            init=_start(asked.init),
            lr_pattern=";".join(f"{modules}:{rate:g}" for modules, rate in asked.lr_pattern.items()) or None,
            full_size_optim=asked.full_size_optim,
            lr_ratios={name: rate for name, rate in asked.lr_ratios.items() if _has(osd, KINDS[name](model), rate)},
            train_loss=_last(state, "loss"),
            eval_loss=eval_loss,
            perplexity=_perplexity(eval_loss) if is_causal_lm(model) and _loss_is_nll(args) else None,
            log_history=tuple(dict(row) for row in state.log_history),
            library_name=library_of(model),
            model_class=model_class(model),
            base_model=_on_hub(base_model) or base_model_of(model, repo_id),
            datasets=(dataset,) if isinstance(dataset, str) else tuple(dict.fromkeys(dataset or ())),
            versions=versions(),
        )

    @property
    def datasets_on_hub(self) -> list[str]:
        """Those of `datasets` that can be repositories of a user."""
        return users_on_hub(self.datasets)


def repository_of(args: "TrainingArguments", repo_id: str | None = None) -> str:
    """Where a model will be found: as given, or as its arguments say, or a placeholder `user/name`."""
    name = (repo_id or args.hub_model_id or Path(str(args.output_dir)).absolute().name).split("/")[-1]
    return next((given for given in (repo_id, args.hub_model_id) if given and "/" in given), f"user/{name}")


def users_on_hub(names: Iterable[str]) -> list[str]:
    """Those that can be repositories of a user."""
    return [name for name in names if "/" in name and _on_hub(name)]


def _options(groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    names = dict.fromkeys(name for own in groups for name in own)
    return {name: _distinct(own.get(name, DEFAULTS.get(name)) for own in groups) for name in names}


def _distinct(values: Any) -> tuple[Any, ...]:
    found: list[Any] = []
    for value in values:
        if value is not None and value not in found:
            found.append(value)
    return tuple(found)


def _last(state: "TrainerState", key: str) -> float | None:
    return next((float(row[key]) for row in reversed(state.log_history) if key in row), None)


def _start(init: str) -> str | None:
    """Where P starts from, if that is not left to the package; the name of a folder tells nobody anything."""
    return None if init == "auto" else "a folder" if init not in INITS and os.path.isdir(init) else init


def _has(osd: OSD, known: Collection[nn.Parameter], multiple: float) -> bool:
    """Whether one of these is trained at so many times the learning rate, which `lr_pattern` may say otherwise."""
    groups = [group for group in osd.trained_groups if group.get(LR_MULTIPLE, 1) == multiple]
    return any(p in known for group in groups for p in group["params"])


def _perplexity(loss: float | None) -> float | None:
    if loss is None or not math.isfinite(loss):
        return None
    return math.exp(loss) if loss < 700 else None


def _loss_is_nll(args: "TrainingArguments") -> bool:
    """Whether `eval_loss` is a mean log-likelihood: not with label smoothing, nor in trl's preference trainers."""
    trl = [kind.__name__ for kind in type(args).__mro__ if kind.__module__.split(".")[0] == "trl"]
    supervised = not trl or ("SFTConfig" in trl and getattr(args, "loss_type", None) in NLL_LOSSES)
    return supervised and not args.label_smoothing_factor


def _base(model: nn.Module) -> nn.Module:
    """The model inside peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model, maybe inside peft's, is a causal language model of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return any(kind.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for kind in type(_base(model)).__mro__)


def library_of(model: nn.Module) -> str:
    """The library that loads a model: `peft`, or `transformers`."""
    return "transformers" if _base(model) is model else "peft"


def model_class(model: nn.Module) -> str | None:
    """The class that loads a model, such as `transformers.AutoModelForCausalLM`; `None` for one of a user's own."""
    kind = type(_base(model))
    if _base(model) is not model:
        return "peft.AutoPeftModelForCausalLM" if is_causal_lm(model) else "peft.AutoPeftModel"
    if kind.__module__.split(".")[0] != "transformers":
        return None
    return "transformers.AutoModelForCausalLM" if is_causal_lm(model) else f"transformers.{kind.__name__}"


def _on_hub(name: str | None) -> str | None:
    """A name that can be a repository's, `user/name` or `gpt2`; not the path of a folder."""
    return name if name and HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def base_model_of(model: nn.Module, repo_id: str) -> str | None:
    """The repository that a model was loaded from, unless it is the one that it goes to."""
    name = _on_hub(getattr(getattr(model, "config", None), "_name_or_path", None))
    return name if name != repo_id else None
