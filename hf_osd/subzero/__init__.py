"""SubZero and MeZO: fine-tuning with forward passes alone."""

from .log import SubZeroLog, replay
from .optimizer import SubZero, subzero_of
from .options import NAME


__all__ = ["NAME", "SubZero", "SubZeroLog", "replay", "subzero_of"]
