"""From a model to an optimizer: parameter groups, and the factory for loops without a Trainer."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..declare import plain, refuse_unknown
from ..layers import PreparedLayers, unload
from ..layers.candidates import refuse_wrapped
from ..subspace import SubspaceRule, name_rule
from ..text import shortened
from .arrival.hooks import release
from .groups import by_name
from .options.asked import Asked
from .options.full_size import by_size
from .options.general import DEFAULT_RANK, residual_sample_of
from .options.mode import MODE_DEFAULTS, mode_of
from .options.presets import BY_NAME, KEYWORD_OF, KEYWORDS, Ratio, lr_ratios, resolve
from .options.table import LR_MULTIPLE
from .osd import OSD
from .selection.adapters import module_names
from .selection.patterns import RANKS, RATES
from .selection.ratios import multiples
from .selection.targets import ALL_LINEAR, Selection, parse_modules, select
from .selection.wrappers import plain_name, unwrapped
from .step.sharding import INT8_NOT_SHARDED, is_sharded, sharding_of
from .summary import announce_summary


def selected_groups(
    selection: Selection,
    ranks: Mapping[str, int],
    rates: Mapping[str, float],
    init: Any,
    full_size: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Groups of (name, parameter) pairs: of each learning rate those of each rank and at full size.

    Args:
        selection ([`Selection`]): What is projected.
        ranks (`Mapping[str, int]`): Rank of every projected parameter, by name.
        rates (`Mapping[str, float]`): Multiple of the learning rate of every parameter, by name.
        init (`str` or tensors by name): P_0 of the projected groups.
        full_size (`Mapping[str, Any]`): Options of the groups at full size.
    """
    groups: list[dict[str, Any]] = []
    # those at the learning rate itself first: Trainer logs that of the first group
    for rate in sorted(dict.fromkeys(rates.values()), key=lambda rate: rate != 1):
        own = {} if rate == 1 else {LR_MULTIPLE: rate}
        groups += [
            {
                "params": [
                    (name, p) for name, p in selection.projected.items() if (ranks[name], rates[name]) == (rank, rate)
                ],
                "rank": rank,
                "init": init,
                **own,
            }
            for rank in dict.fromkeys(ranks.values())
        ]
        rest = [(name, p) for name, p in selection.full_size.items() if rates[name] == rate]
        groups.append({"params": rest, **full_size, **own})
    return groups


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters with weight decay and those without, as `Trainer` groups them."""
    names = set(decay_parameter_names(model))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [
        {
            "params": [p for name, p in trained.items() if (name in names) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Parameters that weight decay applies to, as `Trainer` decides it: no biases, no norms."""
    from transformers import Trainer

    # a method that does not use its `self`
    return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]


def osd_kwargs(
    model: nn.Module,
    settings: Mapping[str, Any],
    target_modules: str | Iterable[str] = ALL_LINEAR,
    exclude_modules: str | Iterable[str] | None = None,
    rank_pattern: str | Mapping[str, int] | None = None,
    rank_given: bool = True,
    lr_pattern: str | Mapping[str, float] | None = None,
    full_size: Mapping[str, Any] | None = None,
    ratios: Mapping[str, Ratio] | None = None,
    preset: str | None = None,
) -> dict[str, Any]:
    """What [`OSD`] is constructed with besides parameters, learning rate and mode: options and what they go for.

    Args:
        model (`nn.Module`): The model.
        settings (`dict`): All options, as `full_size.by_size` gives them.
        target_modules, exclude_modules: See [`~optim.selection.targets.select`].
        rank_pattern (`str` or `Mapping[str, int]`, *optional*): See [`create_osd_optimizer`].
        rank_given (`bool`, *optional*, defaults to `True`): Whether a P in `init` must have the rank of `settings`.
        lr_pattern (`str` or `Mapping[str, float]`, *optional*): See [`create_osd_optimizer`].
        full_size (`dict`, *optional*): What groups at full size have instead, as `full_size.by_size` gives it.
        ratios (`dict[str, Ratio]`, *optional*): Learning rates of kinds of parameters, as `lr_ratios` gives them.
        preset (`str`, *optional*): What the settings are from.
    """
    unload(model)
    whole, model = model, unwrapped(model)
    pattern, multiples_asked = RANKS.parse(rank_pattern), RATES.parse(lr_pattern)
    target_modules = parse_modules(target_modules)
    exclude_modules = None if exclude_modules is None else parse_modules(exclude_modules)
    selection = select(model, target_modules, exclude_modules, settings["rank"])
    if selection.left_out:
        warnings.warn(
            f"{len(selection.left_out)} modules match but are not projected, because they are no linear layers: "
            f"{shortened(selection.left_out, 5)}{selection.hint}.",
            stacklevel=3,
        )
    own = {name: value for name, value in settings.items() if name not in ("rank", "init", "weight_decay")}
    usual = dict.fromkeys(selection.projected, settings["rank"])
    if isinstance(settings["init"], Mapping) and not rank_given:
        learned = by_name(settings["init"], map(plain_name, usual))
        usual |= {name: rank for name in usual if (rank := learned_rank([learned.get(plain_name(name))]))}
    plain_modules = module_names(model).plain
    first: dict[Tensor, str] = {}
    everywhere = model.named_parameters(remove_duplicate=False)
    shared = {name: first[p] for name, p in everywhere if first.setdefault(p, name) != name}
    ranks = RANKS.values(usual, pattern, plain_modules, shared)
    trained = dict.fromkeys([*selection.projected, *selection.full_size], 1.0)
    trained |= multiples(model, selection, ratios or {})
    rates = RATES.values(trained, multiples_asked, plain_modules, shared)
    if full_size and not selection.full_size:
        raise ValueError("`full_size_optim` has no effect: all that is trained is projected. Leave it out.")
    if settings["source"] == "activations":
        refuse_wrapped(whole)
        release(model.parameters(), keep=None)  # layers whose weights have hooks could not be prepared
        if settings["weight_dtype"] is not None and any(map(is_sharded, selection.projected.values())):
            raise ValueError(INT8_NOT_SHARDED)
        own["layers"] = PreparedLayers(model, ranks, plain_name, sharding_of, residual_sample_of(settings))
    own["asked"] = Asked(
        preset=preset,
        init=settings["init"] if isinstance(settings["init"], str) else "auto",
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        lr_pattern=multiples_asked,
        full_size_optim=(full_size or {}).get("weight_rule"),
        lr_ratios={name: ratio.value for name, ratio in (ratios or {}).items()},
    )
    return {"selection": selected_groups(selection, ranks, rates, settings["init"], full_size or {}), **own}


def warn_compiled(model: nn.Module, later: bool = False) -> None:
    """Say where layerwise steps would free next to nothing: a compiled module gives all its gradients at once.

    Args:
        model (`nn.Module`): The model, as it is.
        later (`bool`, *optional*, defaults to `False`): Whether it is to be compiled as a whole.
    """

    def trained(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    compiled = (m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None)
    if later or any(2 * trained(module) > trained(model) for module in compiled):
        warnings.warn(
            "Layerwise frees no gradients while a compiled model delivers them all at once. "
            "Compile its blocks: `for block in model.model.layers: block.compile()`.",
            stacklevel=3,
        )


def learned_rank(init: Any) -> int | None:
    """The largest rank of the P in what may be given as `init`, by name or in a list; `None` where there is none."""
    given: Any = init.values() if isinstance(init, Mapping) else init if isinstance(init, (list, tuple)) else ()
    projections = [getattr(one, "projection", one) for one in given]
    return max((P.shape[-1] for P in projections if isinstance(P, Tensor) and P.ndim), default=None)


def create_osd_optimizer(
    model: nn.Module,
    optim: str = "osd_adamw",
    lr: float | Tensor = 1e-3,
    *,
    rank: int | None = None,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    exclude_modules: str | Iterable[str] | None = None,
    preset: str | None = None,
    init: str | Mapping[str, Tensor] | Sequence[Tensor] = "auto",
    **options: Any,
) -> OSD:
    """An [`OSD`] optimizer for a model, with the same groups as in a Trainer. It says what is projected.

    Args:
        model (`nn.Module`): The model. Frozen parameters are not passed to the optimizer.
        optim (`str`, *optional*, defaults to `"osd_adamw"`):
            `osd_adamw`, `osd_adamw8bit`, `osd_lion`, `osd_lion8bit`, `osd_adafactor` or `osd_sgd`, or one of them
            with `_layerwise`.
        lr (`float` or `torch.Tensor`, *optional*, defaults to 1e-3): Learning rate, see [`OSD`].
        rank (`int`, *optional*): r. Defaults to that of each P in `init`, else to 128.
        target_modules, exclude_modules: What is projected, see [`~optim.selection.targets.select`].
        preset (`str`, *optional*):
            Options for a purpose, which those given beside it win over: [`~optim.options.preset_table.PRESETS`].
        init (`str`, `ProjectionState` or `Mapping[str, torch.Tensor]`, *optional*, defaults to `"auto"`):
            P_0, see [`OSD`]; with a [`ProjectionState`], the subspaces that another run has learned.
        options:
            Any other option of [`OSD`], by name (`projection_optim` for its `projection_rule`), and `rank_pattern`
            (`Mapping[str, int]` or `str`), other ranks for some modules: regular expressions for the end of a module's
            or parameter's name, of which the first that matches counts. `{"q_proj": 64, "layers.0.mlp.*": 32}`, or
            `"q_proj:64;layers.0.mlp.*:32"`. `lr_pattern` (`Mapping[str, float]` or `str`), in the same form, has
            multiples of `lr` for parameters, projected or not; P's learning rate goes with its weights'. They become
            groups with an `lr` of their own, which schedules scale as others (but OneCycleLR and CyclicLR set rates:
            they need lists, one per group); from activations, layers of one input share a P within a group.
            `full_size_optim` (`str`) is the update rule of what is not projected; `embedding_lr_ratio` and
            `task_head_lr_ratio` (`float`) are multiples of `lr` for embeddings and output heads, and for the layer
            that gives out a task's classes or values, where `lr_pattern` names none.

    Raises:
        ValueError: For an unknown name or option, with the nearest one, or an empty selection.
        TypeError: For anything but a model.

    Example:
    ```python
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> import hf_osd

    >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> optimizer = hf_osd.create_osd_optimizer(model, "osd_adamw", lr=1e-3, rank=16)

    ```
    """
    where = "create_osd_optimizer"
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"create_osd_optimizer takes the model, by whose names it chooses what is projected, not a "
            f"{type(model).__name__}. OSD takes parameters."
        )
    for name in options.keys() & BY_NAME.keys():
        raise ValueError(f"Give {BY_NAME[name].argument} instead of `{name}` of {where}.")
    refuse_unknown(options, [*KEYWORDS, "lr", "target_modules", "exclude_modules"], where)
    given = {KEYWORDS[name].name: plain(value) for name, value in options.items()}
    rank_pattern, lr_pattern = given.pop("rank_pattern", None), given.pop("lr_pattern", None)
    full_size_optim, ratios = given.pop("full_size_optim", None), lr_ratios(given, preset, where)
    mode = mode_of(optim, {name: given.pop(name) for name in MODE_DEFAULTS if name in given})
    learned = learned_rank(init) or DEFAULT_RANK
    settings = resolve(optim, {"rank": learned if rank is None else plain(rank), "init": init, **given}, preset, where)
    if isinstance(settings["subspace"], SubspaceRule):
        settings["subspace"] = name_rule(settings["subspace"])
    settings, full_size = by_size(settings, full_size_optim, where, KEYWORD_OF)
    if mode["layerwise"]:
        warn_compiled(model)
    chosen = target_modules, exclude_modules, rank_pattern, rank is not None, lr_pattern, full_size, ratios, preset
    kwargs = osd_kwargs(model, settings, *chosen)
    optimizer = OSD(decay_groups(model, settings["weight_decay"]), lr=lr, **mode, **kwargs)
    if not optimizer.param_groups[0]["params"][0].is_meta:  # else nobody trains: it is measured
        announce_summary(optimizer, model)
        optimizer.weights.let_go()
    return optimizer
