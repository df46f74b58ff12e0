"""A projection that never moves: the control that the other rules are measured against."""

from dataclasses import dataclass
from typing import ClassVar

from .protocol import SubspaceRule


@dataclass(frozen=True)
class Static(SubspaceRule):
    """P stays what it was at the first step. Its state is P, s x r; a step costs nothing."""

    capturable: ClassVar[bool] = True
