"""The options of a parameter group that belong to no rule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...declare import Need, boolean, integer, number, number_or, one_of, option
from ...subspace import SIDES, SUBSPACES, SubspaceRule, is_rule, rule_class
from ...subspace.initialization import INITS
from ...subspace.protocol import Renewed
from ...subspace.static import Static
from ...update_rules import RULES, build_rule, has_carry


DEFAULT_RANK = 128  # of a run with a name: GaLore's and APOLLO's in transformers
FLOAT_DTYPES = ("float32", "bfloat16")
RESIDUALS = ("none", "scaled", "sign")
SOURCES = ("gradients", "activations")
PROJECTION_SAMPLE = 4  # the default of `projection_sample`, where that is not 1
SAVED = "tensors, as `hf_osd.hub.ProjectionState.from_pretrained` gives them of a folder or repository"
RESIDUAL_SAMPLE = 4  # the default of `residual_sample`


def _rule(holds: Callable[[type[SubspaceRule]], bool], unknown: bool = True) -> Callable[[Mapping[str, Any]], bool]:
    """Whether something holds of a group's subspace rule, which a saved group may have and this process not know."""
    return lambda group: holds(rule_class(group["subspace"])) if is_rule(group["subspace"]) else unknown


def in_subspace(text: str = "") -> Callable[[Mapping[str, Any]], str]:
    """Text of a need that the subspace rule does not meet."""
    return lambda group: f"with subspace={group['subspace']!r}{text}"


def names_in_code(rules: Iterable[str]) -> str:
    """`a`, `b`, `c`."""
    return ", ".join(f"`{name}`" for name in rules)


RANK = Need(lambda group: group["rank"] is not None, "without a `rank`")
GRADIENTS = Need(lambda group: group["source"] == "gradients", "with source='activations', where there is no gradient")
SIGNS_SUFFICE = Need(
    lambda group: group["source"] == "gradients" or group["residual"] != "scaled",
    GRADIENTS.without,
    ", or use residual='sign', which is of a part of it at each step",
)
LEARNED = Need(_rule(lambda rule: rule.learns, unknown=False), in_subspace(), ", or use subspace='online_pca'")


@dataclass(frozen=True)
class Options:
    """The options that belong to no rule. `OSD` documents them."""

    rank: int | None = option(
        None,
        "Rank r of the subspaces.\n\n"
        "It is for matrices (m, n), and stacks (E, m, n) of experts' matrices, of which each is projected by itself "
        "and left alone in steps in which its gradient is zero. Parameters of other dimensions are updated at full "
        "size (in a group that has a `rank` of its own they are refused), and so are groups without it. Clipped to "
        "min(m, n), with one warning. Without a model, embeddings and heads are matrices like others, and the weight "
        "of a Conv1d is a stack: `create_osd_optimizer` leaves them at full size.",
        check=integer(1),
        state=True,
        in_run=str(DEFAULT_RANK),
    )
    weight_rule: str = option(
        "adamw",
        f"Update rule of the weights: {names_in_code(RULES)}.",
        check=one_of(RULES),
        state=True,
        argument="optim='osd_*'",
    )
    source: str = option(
        "gradients",
        "What R and P are made of: `gradients`, or `activations`, with which gradients of projected linear layers "
        "never exist.\n\nThe layers make R in the backward pass, and P learns from their inputs, one P for those that "
        "are given the same. For `online_pca`, `power`, `random` and `static`. [`create_osd_optimizer`] and Trainer "
        "prepare the model for it. What cannot be prepared goes by gradients. Norms and clipping are those of what "
        "the layers make.",
        check=one_of(SOURCES),
        needs=(RANK,),
        state=True,
        card="what P learns from",
    )
    subspace: str | SubspaceRule = option(
        "online_pca",
        f"How P moves: {names_in_code(SUBSPACES)}.\n\nOr a [`SubspaceRule`] of your own.",
        check=one_of(
            SUBSPACES,
            lambda value: isinstance(value, SubspaceRule) or is_rule(value),
            "an instance of a SubspaceRule",
        ),
        needs=(RANK,),
        state=True,
    )
    alpha: float = option(
        5.0, "P's learning rate over the weights' (the paper's default).", check=number(0), needs=(RANK, LEARNED)
    )
    projection_rule: str | None = option(
        None,
        f"Update rule of P: {names_in_code(RULES)} (every pair of the paper's Table 6).",
        check=one_of(RULES),
        key="projection_optim",
        needs=(RANK, LEARNED),
        state=True,
        unset="the weights' own",
    )
    projection_lr: float | None = option(
        None,
        "P's learning rate at the initial learning rate, instead of `alpha`; it follows the schedule, and has the "
        "weights' multiples.",
        check=number(0),
        needs=(RANK, LEARNED),
        card="learning rate of P",
    )
    projection_weight_decay: float | None = option(
        None,
        "P's decoupled decay (remark of Algorithm 1).",
        check=number(0),
        needs=(RANK, LEARNED),
        unset="the weights' own",
    )
    scale: float | str = option(
        1.0,
        "Factor on the projected update (GaLore's 0.25; the paper's text has none), or `auto`: sqrt(s/r) of each "
        "weight, s its projected dimension, by which updates have the root mean square of those at full size.\n\n"
        "On both sides sqrt(m n)/r. The residual is scaled by it, too; signs, whose size is AdamW's, not by `auto`.",
        check=number_or("auto", 0, open_below=True),
        needs=(RANK,),
    )
    weight_decay: float = option(0.0, "Decoupled weight decay.", check=number(0), argument="weight_decay")
    init: str | Sequence[Tensor] | Mapping[str, Tensor] = option(
        "auto",
        "P's start: `svd` or `randomized_svd` of the first gradient, `auto`: one of them by size, `orthonormal`, or a "
        "saved P.\n\nThat is tensors here: one for each parameter of the group, or by parameter name. See "
        "[`~subspace.choose_init`].",
        check=one_of(INITS, lambda value: isinstance(value, (Mapping, list, tuple)), SAVED),
        needs=(RANK, Need(_rule(lambda rule: rule.uses_init), in_subspace(", which makes its own P"))),
    )
    side: str = option(
        "auto",
        "Projected dimension: `left`, `right`, `auto`: the shorter (if sharded: whole) one, or `two_sided` (P X Q of "
        "the paper's section 4.3, whose moments are r x r).",
        check=one_of(("auto", *SIDES)),
        needs=(RANK, GRADIENTS),
        state=True,
    )
    carry_moments: bool = option(
        False,
        "Turn moments into the new basis when P moves (LDAdam, arXiv 2410.16103).\n\n"
        "It helps where P is drawn from gradients often: `power`, and `svd` at short intervals.",
        check=boolean(),
        needs=(
            RANK,
            Need(_rule(lambda rule: not issubclass(rule, Static)), in_subspace(", whose P never moves")),
            Need(
                lambda group: has_carry(group["weight_rule"]),
                lambda group: f"with weight_rule={group['weight_rule']!r}, whose moments are means",
            ),
        ),
        card="moments carried into a new basis",
    )
    restart_moments: bool = option(
        False,
        "Start moments and their bias correction anew with each new P (RSO, arXiv 2502.07222).",
        check=boolean(),
        needs=(
            RANK,
            Need(_rule(lambda rule: issubclass(rule, Renewed)), in_subspace(", whose P is not made anew")),
            Need(lambda group: not group["carry_moments"], "with `carry_moments`"),
            Need(
                lambda group: build_rule(group["weight_rule"], group).moments((2, 2)) != (),
                lambda group: f"with weight_rule={group['weight_rule']!r}, which keeps none",
            ),
        ),
        state=True,
        card="moments restarted with each new P",
    )
    residual: str = option(
        "none",
        "The gradient outside the subspace: `none` drops it (the paper), `scaled` adds it in the scale of the inside "
        "(Fira, arXiv 2410.01673), `sign` adds its sign (FRUGAL, arXiv 2411.07837).\n\nFrom activations it is of "
        "some columns at a time (`residual_sample`), and only `sign` goes. See [`~optim.step.residual`].",
        check=one_of(RESIDUALS),
        needs=(
            RANK,
            SIGNS_SUFFICE,
            Need(
                lambda group: not group["unbiased"] and group["distribution"] != "gaussian",
                "with `unbiased` or distribution='gaussian', whose P is no projection",
            ),
        ),
        state=True,
        card="residual",
    )
    residual_scale: float = option(
        1.0,
        "Factor on the residual.",
        check=number(0, open_below=True),
        needs=(RANK, Need(lambda group: group["residual"] != "none", "without residual='scaled' or 'sign'")),
        card="factor on the residual",
    )
    residual_sample: int = option(
        RESIDUAL_SAMPLE,
        "With `source=activations` the residual is of one column of the gradient in `residual_sample`, others at each "
        "step.\n\nThe fewer, the less is computed, kept of the inputs and exchanged for them. Steps in them are "
        "sqrt(residual_sample) times as long: the root mean square of all is the same.",
        check=integer(1),
        needs=(
            RANK,
            Need(lambda group: group["source"] == "activations", "with source='gradients', which has all of them"),
            Need(lambda group: group["residual"] == "sign", "without residual='sign'"),
        ),
        state=True,
        card="residual of one column of the gradient in",
    )
    projection_sample: int | None = option(
        None,
        "P learns of one in `projection_sample` parts of the gradient, another at each step.\n\n"
        "They are blocks of the rows of G (the columns, where P is on its left), or tokens of the activations. "
        "A, the only product that is there for P alone, costs as much less, and is without bias the same.",
        check=integer(1),
        needs=(
            RANK,
            Need(_rule(lambda rule: rule.moves()), in_subspace()),
            Need(lambda group: group["side"] != "two_sided", "with side='two_sided'"),
        ),
        card="parts of the gradient for each that P learns of",
        unset=f"{PROJECTION_SAMPLE}, and 1 with `power` on gradients and two-sided",
    )
    projection_dtype: str | None = option(
        None,
        "How P is kept: `float32`, `bfloat16`, or `int8` with a scale for each row.\n\n"
        "In less than float32 P is rounded at random, so that small steps add up. Float64 parameters have float64 "
        "unless told.",
        check=one_of((*FLOAT_DTYPES, "int8")),
        needs=(RANK, Need(_rule(lambda rule: rule.code is None), in_subspace(", which keeps no P"))),
        state=True,
        card="dtype of P",
        unset="float32",
    )
    weight_dtype: str | None = option(
        None,
        "How projected weights are kept: `int8`, with a scale for each row, stepped by stochastic rounding "
        "(Q-GaLore, arXiv 2407.08296, keeps them so).\n\n"
        "They are read in the dtype that they had, for one layer at a time, and saved in it.",
        check=one_of(("int8",)),
        needs=(
            RANK,
            Need(
                lambda group: group["source"] == "activations",
                "with source='gradients', which are those of floats",
                ", or use source='activations'",
            ),
        ),
        state=True,
        card="dtype of projected weights",
        unset="the model's own",
    )
    moment_dtype: str | None = option(
        None,
        "How the weights' moments are kept: `float32` or `bfloat16`; second moments, which could never fall in "
        "bfloat16, in float32.",
        check=one_of(FLOAT_DTYPES),
        needs=(
            Need(
                lambda group: not RULES[group["weight_rule"]].eight_bit,
                lambda group: f"with the 8-bit rule {group['weight_rule']!r}",
                ", or use a rule without `8bit`",
            ),
            Need(
                lambda group: any(m.signed for m in build_rule(group["weight_rule"], group).moments((2, 2))),
                lambda group: f"with weight_rule={group['weight_rule']!r}, which has second moments or none",
            ),
        ),
        state=True,
        card="dtype of the moments",
        unset="float32",
    )
    stochastic_rounding: bool = option(
        False,
        "Round bfloat16 weights at random: steps too small for them add up instead of vanishing.",
        check=boolean(),
        card="stochastic rounding",
    )
    seed: int = option(
        0,
        "Seed of random P and rounding, the same on all processes.",
        check=integer(0, below=2**32),
        in_run="the run's",
    )


def projection_sample_of(group: Mapping[str, Any]) -> int:
    """The `projection_sample` that a group goes by."""
    given: int | None = group["projection_sample"]
    if given is not None:
        return given
    # a rule that makes a whole new P of A needs an A of full rank
    small_steps = _rule(lambda rule: rule.learns)(group) and group["side"] != "two_sided"
    return PROJECTION_SAMPLE if small_steps or group["source"] == "activations" else 1


def residual_sample_of(group: Mapping[str, Any]) -> int | None:
    """The `residual_sample` that a group's layers go by; `None` where they make nothing for a residual."""
    asked = group["source"] == "activations" and group["residual"] == "sign"
    return group["residual_sample"] if asked else None
