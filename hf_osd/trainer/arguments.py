"""Typed fields and command-line flags for the optimizer's options."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..optim.options.texts import flag
from .forward_only import check_subzero
from .settings import check_arguments


@dataclass
class OSDTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the options of [`OSD`] as fields; use them with an `osd_` or `rso_` name as `optim`.

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
    osd_rank: int | None = flag("rank")
    osd_source: str | None = flag("source")
    osd_subspace: str | None = flag("subspace")
    osd_alpha: float | None = flag("alpha")
    osd_projection_optim: str | None = flag("projection_optim")
    osd_projection_lr: float | None = flag("projection_lr")
    osd_projection_weight_decay: float | None = flag("projection_weight_decay")
    osd_scale: str | None = flag("scale")
    osd_init: str | None = flag("init")
    osd_side: str | None = flag("side")
    osd_carry_moments: bool | None = flag("carry_moments")
    osd_restart_moments: bool | None = flag("restart_moments")
    osd_residual: str | None = flag("residual")
    osd_residual_scale: float | None = flag("residual_scale")
    osd_residual_sample: int | None = flag("residual_sample")
    osd_projection_sample: int | None = flag("projection_sample")
    osd_projection_dtype: str | None = flag("projection_dtype")
    osd_weight_dtype: str | None = flag("weight_dtype")
    osd_moment_dtype: str | None = flag("moment_dtype")
    osd_stochastic_rounding: bool | None = flag("stochastic_rounding")
    osd_seed: int | None = flag("seed")
    osd_projection_interval: int | None = flag("projection_interval")
    osd_lambda: float | None = flag("lambda")
    osd_update_interval: int | None = flag("update_interval")
    osd_distribution: str | None = flag("distribution")
    osd_unbiased: bool | None = flag("unbiased")
    osd_mixing: float | None = flag("mixing")
    osd_momentum: float | None = flag("momentum")
    osd_layerwise_clipping: str | None = flag("layerwise_clipping")
    osd_capturable: bool | None = flag("capturable")
    osd_projection_stream: bool | None = flag("projection_stream")
    osd_partial_load: bool | None = flag("partial_load")
    osd_divide_projection: bool | None = flag("divide_projection")
    osd_rank_pattern: str | None = flag("rank_pattern")
    osd_lr_pattern: str | None = flag("lr_pattern")
    osd_full_size_optim: str | None = flag("full_size_optim")
    osd_embedding_lr_ratio: float | None = flag("embedding_lr_ratio")
    osd_task_head_lr_ratio: float | None = flag("task_head_lr_ratio")
    osd_preset: str | None = flag("preset")
    # end of options

    osd_exclude_modules: None | str | list[str] = field(
        default=None, metadata={"help": "What optim_target_modules names and is not projected, in the same form."}
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
        check_subzero(self)
