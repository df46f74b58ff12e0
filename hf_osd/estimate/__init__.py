"""What training will take, from a model's config alone."""

from .methods import Method, adamw, adamw8bit, galore, lora, osd, subzero
from .models import DTYPES, explained, load_config
from .peak import Parts, Workload, largest
from .processes import Share, share


__all__ = [
    "DTYPES",
    "Method",
    "Parts",
    "Share",
    "Workload",
    "adamw",
    "adamw8bit",
    "explained",
    "galore",
    "largest",
    "load_config",
    "lora",
    "osd",
    "share",
    "subzero",
]
