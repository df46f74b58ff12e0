"""An attribute of one object, replaced for one call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_object(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute, and then what it had: its own, which a user may have set, or its class's."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
