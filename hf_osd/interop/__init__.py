"""Other libraries of the ecosystem: what was learned with OSD as a PEFT adapter, and a PEFT adapter from P."""

from .lora_adapter import ExtractedLayer, ExtractedLora
from .lora_extraction import extract_lora
from .lora_initialization import init_lora_from_projection


__all__ = ["ExtractedLayer", "ExtractedLora", "extract_lora", "init_lora_from_projection"]
