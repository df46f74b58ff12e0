"""Our section of a README.md, rendered from facts."""

from keyword import iskeyword
from pathlib import Path
from typing import Any

from ...optim.options.table import DEFAULTS, OPTIONS
from ...subspace import SUBSPACES, rule_class
from ...text import format_bytes, format_count
from ..config import config_name, group_options
from .facts import CardFacts


START, END = "<!-- hf_osd:start -->", "<!-- hf_osd:end -->"
TEMPLATE = Path(__file__).parent / "templates" / "section.md"
LINE_LENGTH = 100  # of the code
EXACT = ".15g"  # of numbers that are to set a run as this one was
# Options that the code sets in a way of their own; P's seed and start come with P.
TOLD_ELSEWHERE = {"rank", "subspace", "weight_rule", "projection_rule", "update_interval", "init", "seed"}
# Options that arguments of Trainer's set, which `optim_args` does not take.
OF_TRAINER = {config_name(name) for name, own in OPTIONS.items() if own.argument is not None}

# option -> words for its row, where it was set
ROWS_IF_SET = {
    "projection_weight_decay": "weight decay of P",
    "momentum": "momentum",
    "betas": "betas",
    "eps": "epsilon",
}

# subspace -> what the text says of it
MOVEMENTS = {
    "online_pca": "which it learns by online PCA while it trains",
    "svd": "which it recomputes by SVD, as GaLore does",
    "random": "which it draws at random again and again",
    "cosine": "which it chooses again and again among those of cosines",
    "importance": "which it draws again and again from singular vectors of the gradients",
    "power": "which follow momentum and gradients by power iteration",
    "static": "which do not change",
}


def render_section(facts: CardFacts, *, picture: str | None, projections: bool) -> str:
    """Our section, markers included.

    Args:
        facts ([`CardFacts`]): The run.
        picture (`str`, *optional*): File name of the picture.
        projections (`bool`): Whether P lies beside the model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    rules = (facts.optim, *facts.options.get("projection_rule", ()))
    extras = ["8bit"] if any("8bit" in str(rule) for rule in rules) else []
    extras += ["peft"] if facts.library_name == "peft" else []
    values: dict[str, Any] = {
        "base_model": facts.base_model,
        "matrices": facts.matrices,
        "rank": _rank(facts),
        "movement": _movement(facts.options.get("subspace", ())),
        "from_activations": facts.from_activations,
        "without_gradients": 1 not in facts.options.get("residual_sample", ()),  # at 1 all columns are computed
        "rows": [(name, value) for name, value in _rows(facts) if value],
        "state_size": format_bytes(facts.state_bytes),
        "adamw_size": format_bytes(facts.adamw_bytes),
        "share": f"{facts.state_bytes / facts.adamw_bytes:.0%}" if facts.adamw_bytes else "",
        "picture": picture,
        "code": _code(facts, projections),
        "projections": projections,
        "optim_args": _optim_args(facts) if projections else "",
        "targets": "" if facts.targets in (None, "all-linear") else _literal(facts.targets),
        "versions": ", ".join(f"{key.removesuffix('_version')} {value}" for key, value in facts.versions.items()),
        "install": f'pip install ".[{",".join(extras)}]"' if extras else "pip install .",
    }
    # The template has a head, as all templates of model cards; only the text below it is ours to place.
    card = ModelCard.from_template(ModelCardData(tags=["hf_osd"]), template_path=str(TEMPLATE), **values)
    return card.text.strip("\n")


def _rows(facts: CardFacts) -> list[tuple[str, str]]:
    def option(name: str) -> str:
        return _joined(facts.options.get(name, ()))

    settings = _settings(facts)
    scheduled = f"{facts.learning_rate:g}, {facts.lr_scheduler} schedule"
    interval = f", every {option('update_interval')} steps" if option("update_interval") else ""
    decays = tuple(value for value in facts.options.get("weight_decay", ()) if value)
    loss = f"{facts.eval_loss:.4f}" if facts.eval_loss is not None else ""
    return [
        ("optimizer", f"`{facts.optim}`"),
        ("preset", f"`{facts.preset}`" if facts.preset else ""),
        ("rank", option("rank")),
        ("subspace", f"`{option('subspace')}`{interval}" if facts.matrices else ""),
        ("rule of P", f"`{option('projection_rule')}`" if option("projection_rule") else ""),
        ("alpha (learning rate of P over the weights')", option("alpha")),
        ("lambda (orthogonality)", option("lambda")),
        ("scale", option("scale")),
        ("side", f"`{option('side')}`" if option("side") not in ("", "auto") else ""),
        *((own.card, _cell(option(name))) for name, own in OPTIONS.items() if own.card is not None and option(name)),
        (OPTIONS["residual_sample"].card or "", _usual_sample(facts)),
        ("start of P", _cell(facts.init) if facts.init else ""),
        ("projected layers", _cell(facts.targets) if facts.targets and facts.matrices else ""),
        ("except", _cell(facts.exclude) if facts.exclude else ""),
        ("projected", f"{facts.matrices} matrices, {format_count(facts.projected_parameters)} parameters"),
        ("P", f"{facts.projections}, shared by layers with one input" if facts.projections < facts.matrices else ""),
        ("at full size", f"{format_count(facts.full_size_parameters)} parameters"),
        ("rule at full size", f"`{facts.full_size_optim}`" if facts.full_size_optim else ""),
        ("learning rate", scheduled),
        ("embeddings' over it", _ratio(facts, "embedding_lr_ratio")),
        ("task head's over it", _ratio(facts, "task_head_lr_ratio")),
        ("multiples of it", _cell(facts.lr_pattern) if facts.lr_pattern else ""),
        ("weight decay", _joined(decays)),
        *((words, _joined(_as_tuple(settings.get(name)))) for name, words in ROWS_IF_SET.items()),
        ("data", ", ".join(_cell(name) for name in facts.datasets)),
        ("steps", f"{facts.steps:,}"),
        ("last training loss", f"{facts.train_loss:.4f}" if facts.train_loss is not None else ""),
        ("evaluation loss", loss),
        ("perplexity (per token)", f"{facts.perplexity:.2f}" if facts.perplexity is not None else ""),
    ]


def _usual_sample(facts: CardFacts) -> str:
    """The default, which is as good as none where all of a gradient is there."""
    signs = facts.from_activations and "sign" in facts.options.get("residual", ())
    return f"`{DEFAULTS['residual_sample']}`" if signs and "residual_sample" not in facts.options else ""


def _ratio(facts: CardFacts, option: str) -> str:
    return f"{facts.lr_ratios[option]:g}" if option in facts.lr_ratios else ""


def _code(facts: CardFacts, projections: bool) -> str:
    """How to load the model and, where it lies beside it, P, with an optimizer as this run's."""
    starts = projections and _takes_init(facts)
    lines = ["from hf_osd import create_osd_optimizer"] if projections else []
    lines += ["from hf_osd.hub import ProjectionState"] if starts else []
    model = 'model = ...  # as you built it, with the weights of "{}"'
    if facts.model_class:
        module, name = facts.model_class.split(".")
        lines.insert(0, f"from {module} import {name}")
        trainable = ", is_trainable=True" if module == "peft" and projections else ""
        model = f'model = {name}.from_pretrained("{{}}"{trainable})'
    elif not projections:
        return ""
    lines += ["", model.format(facts.repo_id)]
    if projections:
        if starts:
            lines.append(f'projections = ProjectionState.from_pretrained("{facts.repo_id}")')
        arguments = ["model", f'"{facts.optim}"', f"lr={facts.learning_rate:{EXACT}}", *_arguments(facts)]
        call = f"optimizer = create_osd_optimizer({', '.join(arguments)})"
        if len(call) > LINE_LENGTH:
            call = "\n".join(["optimizer = create_osd_optimizer(", *(f"    {own}," for own in arguments), ")"])
        lines.append(call)
    return "\n".join(lines)


def _given(facts: CardFacts) -> dict[str, Any]:
    """The options in which all groups agree."""
    return {name: values[0] for name, values in facts.options.items() if len(values) == 1}


def _subspace(facts: CardFacts) -> str:
    return _given(facts).get("subspace", DEFAULTS["subspace"])


def _settings(facts: CardFacts) -> dict[str, Any]:
    """What was set otherwise than by default, where all groups agree, by its key; the rank in any case."""
    given, subspace = _given(facts), _subspace(facts)
    rules = {name: given.get(name) or DEFAULTS[name] for name in ("weight_rule", "projection_rule")}
    defaults = group_options(DEFAULTS | {"rank": 1, "subspace": subspace, **rules})
    # P has the weights' decay unless told
    defaults["projection_weight_decay"] = given.get("weight_decay")
    found = {"rank": given.get("rank")}
    if facts.targets not in (None, "all-linear"):
        found["target_modules"] = facts.targets
    found["exclude_modules"] = facts.exclude
    found["subspace"] = subspace if subspace != DEFAULTS["subspace"] else None
    told = [name for name in map(config_name, OPTIONS) if name in given and name not in TOLD_ELSEWHERE]
    changed = {name: given[name] for name in told if given[name] != defaults.get(name)}
    found |= {name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()}
    if found.get("projection_lr") is not None:
        found.pop("alpha", None)  # that follows from it
    if given.get("projection_rule") not in (None, given.get("weight_rule")):
        found["projection_optim"] = given["projection_rule"]
    found["update_interval"] = given.get("update_interval")
    return found | {"lr_pattern": facts.lr_pattern, "full_size_optim": facts.full_size_optim, **facts.lr_ratios}


def _arguments(facts: CardFacts) -> list[str]:
    """The arguments of `create_osd_optimizer`."""
    found, subspace = _settings(facts), _subspace(facts)
    arguments = [
        f"{name}_={_literal(value)}" if iskeyword(name) else f"{name}={_literal(value)}"
        for name, value in found.items()
        if value is not None
    ]
    if subspace not in SUBSPACES:  # a user's rule, named by how it is made
        rule = subspace.rsplit("<locals>.")[-1]
        arguments = [f"subspace={rule}" if one.startswith("subspace=") else one for one in arguments]
    if not _takes_init(facts):
        return arguments
    if found["rank"] is None:
        arguments.append('rank_pattern={name.removesuffix(".weight"): P.rank for name, P in projections.items()}')
    return [*arguments, "init=projections"]


def _takes_init(facts: CardFacts) -> bool:
    """Whether all of the run's rules can start from a P."""
    return all(rule_class(name).uses_init for name in facts.options.get("subspace", ()))


def _optim_args(facts: CardFacts) -> str:
    """What a Trainer needs to start from this P, set as this run was; nothing where a text cannot say that."""
    if any(len(values) > 1 for values in facts.options.values()) or not _takes_init(facts):
        return ""
    told = _settings(facts) | {"init": facts.repo_id}
    told = {name: value for name, value in told.items() if name not in {"target_modules", *OF_TRAINER}}
    texts = {name: _text(value) for name, value in told.items()}
    if facts.exclude or _subspace(facts) not in SUBSPACES or any({",", "="} & set(text) for text in texts.values()):
        return ""
    return ",".join(f"{name}={text}" for name, text in texts.items() if told[name] is not None)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:{EXACT}}" if isinstance(value, float) else str(value)


def _movement(subspaces: tuple[str, ...]) -> str:
    name = "online_pca" if "online_pca" in subspaces else subspaces[0] if subspaces else ""
    return MOVEMENTS.get(name, "which a rule of the run's own moves")


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return "r" * ("\\" in value) + f'"{value}"' if '"' not in value and not value.endswith("\\") else repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_literal(one) for one in value) + "]"
    return f"{value:{EXACT}}" if isinstance(value, float) else repr(value)


def _cell(value: str | list[str]) -> str:
    """Code in a cell of a table, where a bar would end the cell."""
    names = [value] if isinstance(value, str) else value
    return ", ".join(f"`{name}`" for name in names).replace("|", "\\|").replace("\n", " ")


def _joined(values: tuple[Any, ...]) -> str:
    return " and ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _rank(facts: CardFacts) -> str:
    if len(facts.ranks) < 2:
        return f"rank {facts.ranks[0]}" if facts.ranks else ""
    return f"ranks {facts.ranks[0]} to {facts.ranks[-1]}"
