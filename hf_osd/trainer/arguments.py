"""Typed fields and command-line flags for the optimizer's options."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .rso import check_rso_arguments
from .settings import check_arguments


@dataclass
class OSDTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the options of [`OSD`] as fields; use them with an `osd_` name as `optim`.

    `rso_*` are options of `optim="rso_adamw"` and `"rso_adamw8bit"` (see [`~rso.create_rso_model`]), which also take
    `osd_rank`, `osd_scale`, `osd_seed` and `osd_exclude_modules`.

    A field left at `None` takes the optimizer's default, or the preset's. `learning_rate`, `weight_decay`,
    `adam_beta1`, `adam_beta2` and `adam_epsilon` keep their meaning, and `optim_target_modules` says what is projected
    (see [`~optim.selection.targets.select`]).

    Raises:
        ValueError: At construction, for values that are wrong, given twice, or would have no effect.

    Example:
    ```python
    >>> from hf_osd import OSDTrainingArguments

    >>> args = OSDTrainingArguments(
    ...     output_dir="out", optim="osd_adamw", osd_rank=128, optim_target_modules=["q_proj", "v_proj"]
    ... )

    ```

    With the arguments of another library, such as trl's, name this class last, so that their defaults stay:

    ```python
    >>> @dataclass
    ... class SFTArguments(trl.SFTConfig, OSDTrainingArguments):
    ...     pass

    ```
    """

    # options: written by `make options`
    osd_rank: int | None = field(default=None, metadata={"help": "Rank r of the subspaces. Defaults to 128."})
    osd_subspace: str | None = field(
        default=None,
        metadata={
            "help": "How P moves: online_pca, svd, random, cosine, importance, power, static. Defaults to online_pca.",
        },
    )
    osd_alpha: float | None = field(
        default=None, metadata={"help": "P's learning rate over the weights' (the paper's default). Defaults to 5."}
    )
    osd_projection_optim: str | None = field(
        default=None,
        metadata={
            "help": "Update rule of P: adamw, adamw8bit, lion, lion8bit, adafactor, sgd (every pair of the paper's "
            "Table 6). Defaults to the weights' own.",
        },
    )
    osd_projection_lr: float | None = field(
        default=None,
        metadata={
            "help": "P's learning rate at the initial learning rate, instead of alpha; it follows the schedule.",
        },
    )
    osd_projection_weight_decay: float | None = field(
        default=None, metadata={"help": "P's decoupled decay (remark of Algorithm 1). Defaults to the weights' own."}
    )
    osd_scale: float | None = field(
        default=None,
        metadata={
            "help": "Factor on the projected update (GaLore's 0.25; the paper's text has none). Defaults to 1.",
        },
    )
    osd_init: str | None = field(
        default=None,
        metadata={
            "help": "P's start: svd or randomized_svd of the first gradient, auto: one of them by size, orthonormal, "
            "or a saved P. Defaults to auto.",
        },
    )
    osd_side: str | None = field(
        default=None,
        metadata={
            "help": "Projected dimension: left, right, auto: the shorter (if sharded: whole) one, or two_sided (P X Q "
            "of the paper's section 4.3, whose moments are r x r). Defaults to auto.",
        },
    )
    osd_carry_moments: bool | None = field(
        default=None, metadata={"help": "Turn moments into the new basis when P moves (LDAdam, arXiv 2410.16103)."}
    )
    osd_residual: str | None = field(
        default=None,
        metadata={
            "help": "The gradient outside the subspace: none drops it (the paper), scaled adds it in the scale of the "
            "inside (Fira, arXiv 2410.01673), sign adds its sign (FRUGAL, arXiv 2411.07837). Defaults to "
            "none.",
        },
    )
    osd_residual_scale: float | None = field(default=None, metadata={"help": "Factor on the residual. Defaults to 1."})
    osd_projection_dtype: str | None = field(
        default=None, metadata={"help": "How P is kept: float32 or bfloat16. Defaults to float32."}
    )
    osd_moment_dtype: str | None = field(
        default=None,
        metadata={
            "help": "How the weights' moments are kept: float32 or bfloat16; second moments, which could never fall "
            "in bfloat16, in float32. Defaults to float32.",
        },
    )
    osd_stochastic_rounding: bool | None = field(
        default=None,
        metadata={
            "help": "Round bfloat16 weights at random: steps too small for them add up instead of vanishing.",
        },
    )
    osd_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of random P and rounding, the same on all processes. Defaults to the run's.",
        },
    )
    osd_projection_interval: int | None = field(
        default=None,
        metadata={
            "help": "Steps between moves of P: a step in between costs two products with the gradient, not three. For "
            "online_pca and power. Defaults to 1.",
        },
    )
    osd_lambda: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the orthogonality term of the PCA loss, Eq. 6 (the paper's default). For online_pca. "
            "Defaults to 0.1.",
        },
    )
    osd_update_interval: int | None = field(
        default=None,
        metadata={
            "help": "Steps between new P (GaLore's update_proj_gap and its default). For svd, random, cosine and "
            "importance. Defaults to 200.",
        },
    )
    osd_distribution: str | None = field(
        default=None,
        metadata={
            "help": "orthonormal columns, uniform over all subspaces (GoLore), or gaussian entries N(0, 1/s) (Flora). "
            "For random. Defaults to orthonormal.",
        },
    )
    osd_mixing: float | None = field(
        default=None,
        metadata={
            "help": "Share of the momentum in what P follows, rho (Adam's beta1; LDAdam's is 0.908). For power. "
            "Defaults to 0.9.",
        },
    )
    osd_momentum: float | None = field(
        default=None,
        metadata={
            "help": "Decay of SGD's momentum, in both roles; 0 keeps no state. For sgd. Defaults to 0.9.",
        },
    )
    osd_layerwise_clipping: str | None = field(
        default=None,
        metadata={
            "help": "How max_grad_norm clips when layerwise: by previous_norm, the norm of the step before (at the "
            "first step each parameter by its own), or by parameter, each by its own. Defaults to "
            "previous_norm.",
        },
    )
    osd_ddp_compression: str | None = field(
        default=None, metadata={"help": "subspace: DDP averages r (m + n) numbers of a projected gradient, not m n."}
    )
    osd_partial_load: bool | None = field(
        default=None,
        metadata={
            "help": "Start parameters anew that a loaded checkpoint does not fit, instead of refusing it.",
        },
    )
    osd_rank_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Other ranks for some modules, as peft's, by regular expressions for the end of their names, of "
            "which the first that matches counts: q_proj:64;layers.0.mlp.*:32.",
        },
    )
    osd_preset: str | None = field(
        default=None,
        metadata={
            "help": "reference: the settings of the paper's published code, which differ from its text.",
        },
    )
    # end of options

    osd_exclude_modules: None | str | list[str] = field(
        default=None, metadata={"help": "What optim_target_modules names and is not projected, in the same form."}
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
        check_arguments(self)
        check_rso_arguments(self)
