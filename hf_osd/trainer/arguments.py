"""Typed fields and command-line flags for the optimizer's options."""

import re
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .optim_args import check_arguments
from .rso import check_rso_arguments


@dataclass
class OSDTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the options of [`OSD`] as fields; use them with an `osd_` name as `optim`.

    `rso_*` are options of `optim="rso_adamw"` and `"rso_adamw8bit"` (see [`~rso.create_rso_model`]), which also take
    `osd_rank`, `osd_scale`, `osd_seed`, `osd_target_modules` and `osd_exclude_modules`.

    A field left at `None` takes the optimizer's default, or the preset's. `learning_rate`, `weight_decay`,
    `adam_beta1`, `adam_beta2` and `adam_epsilon` keep their meaning.

    Raises:
        ValueError: At construction, for values that are wrong, given twice, or would have no effect.

    Example:
    ```python
    >>> from hf_osd import OSDTrainingArguments

    >>> args = OSDTrainingArguments(
    ...     output_dir="out", optim="osd_adamw", osd_rank=128, osd_target_modules=["q_proj", "v_proj"]
    ... )

    ```

    With the arguments of another library, such as trl's, name this class last, so that their defaults stay:

    ```python
    >>> @dataclass
    ... class SFTArguments(trl.SFTConfig, OSDTrainingArguments):
    ...     pass

    ```
    """

    osd_rank: int | None = field(default=None, metadata={"help": "Rank of the projections. Defaults to 128."})
    osd_rank_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Other ranks for some modules, by regular expressions for the end of their names: "
            "q_proj:64;v_proj:32."
        },
    )
    osd_alpha: float | None = field(
        default=None, metadata={"help": "P's learning rate is this times the learning rate. Defaults to 5."}
    )
    osd_lambda: float | None = field(
        default=None, metadata={"help": "Weight of the orthogonality term of the PCA loss. Defaults to 0.1."}
    )
    osd_scale: float | None = field(default=None, metadata={"help": "Factor on the projected update. Defaults to 1."})
    osd_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers to project: names, one regular expression, or all-linear (the default): every linear "
            "layer inside the model's blocks.",
            "nargs": "+",
        },
    )
    osd_exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to leave out again: names or one regular expression.", "nargs": "+"}
    )
    osd_projection_optim: str | None = field(
        default=None,
        metadata={
            "help": "Update rule of P: adamw, adamw8bit, lion, lion8bit, adafactor or sgd. Defaults to the weights'."
        },
    )
    osd_subspace: str | None = field(
        default=None,
        metadata={
            "help": "How P moves: online_pca (the default), svd (periodic, as GaLore), random, cosine, importance, "
            "power or static."
        },
    )
    osd_init: str | None = field(
        default=None,
        metadata={
            "help": "First P: auto (the default), svd, randomized_svd, orthonormal, or a folder or "
            "repository on the Hub with the P of another run."
        },
    )
    osd_side: str | None = field(default=None, metadata={"help": "auto (the default), left, right or two_sided."})
    osd_projection_lr: float | None = field(
        default=None, metadata={"help": "P's learning rate at the initial learning rate, instead of osd_alpha."}
    )
    osd_projection_schedule: str | None = field(
        default=None,
        metadata={"help": "lr (the default): P's learning rate follows the schedule; constant: it does not."},
    )
    osd_projection_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of P. Defaults to weight_decay."}
    )
    osd_projection_dtype: str | None = field(
        default=None, metadata={"help": "How P is kept: float32 (the default) or bfloat16."}
    )
    osd_moment_dtype: str | None = field(
        default=None, metadata={"help": "How moments are kept: float32 (the default) or bfloat16."}
    )
    osd_update_interval: int | None = field(
        default=None,
        metadata={"help": "Steps between new P with osd_subspace svd, random, cosine or importance. Defaults to 200."},
    )
    osd_projection_interval: int | None = field(
        default=None,
        metadata={"help": "Steps between moves of P with osd_subspace online_pca or power. Defaults to 1."},
    )
    osd_distribution: str | None = field(
        default=None, metadata={"help": "With osd_subspace=random: orthonormal (the default) or gaussian."}
    )
    osd_mixing: float | None = field(
        default=None, metadata={"help": "With osd_subspace=power: share of the momentum. Defaults to 0.9."}
    )
    osd_carry_moments: bool | None = field(
        default=None, metadata={"help": "Turn moments into the new basis when P moves."}
    )
    osd_residual: str | None = field(
        default=None,
        metadata={
            "help": "The gradient outside the subspace: none (the default) drops it, scaled adds it in the scale of "
            "the inside, sign adds its sign."
        },
    )
    osd_residual_scaling: str | None = field(
        default=None, metadata={"help": "With osd_residual=scaled: by column (the default) or matrix."}
    )
    osd_residual_limit: float | None = field(
        default=None,
        metadata={"help": "With osd_residual=scaled: largest growth of its norm a step; 0: none. Defaults to 1.01."},
    )
    osd_residual_scale: float | None = field(default=None, metadata={"help": "Factor on the residual. Defaults to 1."})
    osd_momentum: float | None = field(default=None, metadata={"help": "Momentum of SGD. Defaults to 0.9."})
    osd_stochastic_rounding: bool | None = field(
        default=None,
        metadata={
            "help": "Round updates of bfloat16 weights at random, so that tiny steps add up instead of vanishing."
        },
    )
    osd_seed: int | None = field(
        default=None, metadata={"help": "Seed of random projections and rounding. Defaults to seed."}
    )
    osd_preset: str | None = field(
        default=None, metadata={"help": "reference: the settings of the paper's published code."}
    )

    osd_partial_load: bool | None = field(
        default=None,
        metadata={"help": "Start parameters anew that a resumed checkpoint does not fit, instead of refusing it."},
    )

    osd_layerwise: bool | None = field(
        default=None,
        metadata={
            "help": "Step each parameter during the backward pass and free its gradient, as osd_*_layerwise do."
        },
    )
    osd_layerwise_clipping: str | None = field(
        default=None,
        metadata={
            "help": "How max_grad_norm clips when layerwise: previous_norm (the default), by the norm of the step "
            "before, or parameter, each parameter by its own."
        },
    )
    osd_ddp_compression: str | None = field(
        default=None,
        metadata={
            "help": "subspace: average r (m + n) numbers of a projected gradient over DDP's processes, not m n."
        },
    )

    rso_interval: int | None = field(
        default=None, metadata={"help": "Steps with one random subspace with optim=rso_*. Defaults to 200."}
    )
    rso_eta: float | None = field(
        default=None,
        metadata={"help": "Adds ||B||² / (2 eta) to the objective with optim=rso_*. Default: no such term."},
    )
    rso_sampling: str | None = field(
        default=None, metadata={"help": "P with optim=rso_*: gaussian (the default) or orthonormal."}
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of base classes in which our copy of `TrainingArguments`' defaults hides another class's."""
        super().__init_subclass__(**kwargs)
        behind = cls.__mro__[cls.__mro__.index(OSDTrainingArguments) + 1 :]
        hidden = [base.__name__ for base in behind if issubclass(base, TrainingArguments)][:-1]
        if hidden:
            raise TypeError(
                f"{cls.__name__} would lose the defaults of {hidden[0]}: write `class {cls.__name__}({hidden[0]}, "
                "OSDTrainingArguments)`."
            )

    def __post_init__(self):
        """Check everything that can be checked without a model."""
        super().__post_init__()
        for name in ("osd_target_modules", "osd_exclude_modules"):
            setattr(self, name, _unwrap(getattr(self, name)))
        check_arguments(self)
        check_rso_arguments(self)


def _unwrap(modules: list[str] | str | None) -> list[str] | str | None:
    """A list of one entry that cannot be a module's name is a regular expression: command lines give lists only."""
    if isinstance(modules, list) and len(modules) == 1 and not re.fullmatch(r"[\w.]+", modules[0]):
        return modules[0]
    return modules
