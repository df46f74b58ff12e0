"""A Trainer that knows what its optimizer is; a stock `Trainer` works as well."""

import torch
from transformers import Trainer

from ..optim import OPTIM_NAMES
from .optim_args import optim_name
from .settings import uses_osd


class OSDTrainer(Trainer):
    """`Trainer` for an `osd_` optimizer.

    It differs from a stock `Trainer` in that it refuses an `optim` that is not ours.
    """

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Build [`OSD`] from the training arguments."""
        if self.optimizer is None and not uses_osd(self.args):
            raise ValueError(
                f"OSDTrainer needs one of optim={', '.join(OPTIM_NAMES)}, got {optim_name(self.args)!r}. Use "
                "Trainer for other optimizers."
            )
        return super().create_optimizer(model)
