"""Linear layers whose gradients never exist (`source="activations"`)."""

from .plain import CHILD, unload
from .prepared import PreparedLayers


__all__ = ["CHILD", "PreparedLayers", "unload"]
