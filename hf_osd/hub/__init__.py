"""P as files that can be shared on the Hub: what a run's subspaces were, to start another one from."""

from .checks import ProjectionFileError
from .projection import Projection
from .projection_state import ProjectionState
from .size import projection_bytes


__all__ = ["Projection", "ProjectionFileError", "ProjectionState", "projection_bytes"]
