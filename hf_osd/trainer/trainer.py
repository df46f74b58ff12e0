"""A Trainer that knows what its optimizer is; a stock `Trainer` works as well."""

import torch
from transformers import Trainer

from ..optim import OPTIM_NAMES, OSD
from .settings import constructor_arguments, optim_name, uses_osd


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
            decay_names = self.get_decay_parameter_names(module)
            self.optimizer = OSD(**constructor_arguments(self.args, module, decay_names))
        return self.optimizer
