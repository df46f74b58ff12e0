"""Linear layers whose gradients never exist (`source="activations"`)."""

from .prepared import CHILD, PreparedLayers, unload


__all__ = ["CHILD", "PreparedLayers", "unload"]
