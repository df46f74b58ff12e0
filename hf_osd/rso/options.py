"""RSO's options: their types, defaults and checks, in one place for `create_rso_model` and training arguments."""

import math
from dataclasses import dataclass

from .sampling import SAMPLINGS


# GaLore's, and the periodic SVD's of this package; not tuned for RSO.
DEFAULT_INTERVAL = 200


@dataclass(frozen=True)
class RSOOptions:
    """What one model is trained with. `create_rso_model` documents the fields.

    Raises:
        ValueError: For a wrong type or range.
    """

    rank: int
    interval: int = DEFAULT_INTERVAL
    eta: float | None = None
    sampling: str = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("rank", 1), ("interval", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"`{name}` of RSO must be an integer >= {lowest}, got {value!r}.")
        if self.eta is not None and not (isinstance(self.eta, (int, float)) and 0 < self.eta < math.inf):
            raise ValueError(
                f"`eta` of RSO must be a number above 0, got {self.eta!r}. Leave it out for no proximal term."
            )
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"`sampling` of RSO must be one of {', '.join(SAMPLINGS)}, got {self.sampling!r}.")


def check_scale(scale: float) -> None:
    """Raise `ValueError` unless `scale`, the factor on B's learning rate, is a number above 0."""
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"`scale` of RSO must be a number above 0, got {scale!r}.")
