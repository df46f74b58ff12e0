"""A Trainer that knows what its optimizer is; a stock `Trainer` works as well."""

import torch
from transformers import Trainer

from ..optim import OPTIM_NAMES, OSD, osd_kwargs
from .optim_args import optim_name, read_settings, uses_osd


class OSDTrainer(Trainer):
    """`Trainer` for an `osd_` optimizer.

    Differs from a stock `Trainer` in two points: an `optim` that is not ours is refused, and a subclass that overrides
    `get_decay_parameter_names` is heard.
    """

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Build [`OSD`] from the training arguments."""
        if self.optimizer is None:
            if not uses_osd(self.args):
                raise ValueError(
                    f"OSDTrainer needs one of optim={', '.join(OPTIM_NAMES)}, got {optim_name(self.args)!r}. Use "
                    "Trainer for other optimizers."
                )
            module = self.model if model is None else model
            assert module is not None
            settings = read_settings(self.args)
            kwargs = osd_kwargs(
                module,
                settings.options,
                settings.target_modules,
                settings.exclude_modules,
                self.get_decay_parameter_names(module),
            )
            self.optimizer = OSD(lr=self.args.learning_rate, partial_load=settings.partial_load, **kwargs)
        return self.optimizer
