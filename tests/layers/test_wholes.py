"""When P that processes divide are sent for: tests/distributed trains by them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_osd.layers import wholes


sent: list[list[str]] = []


class Sent:
    """In place of `Gather`: what was sent for, by name."""

    def __init__(self, parts: Any, dtype: torch.dtype) -> None:
        sent.append([shared.name for shared in parts])

    def wait(self) -> None:
        pass

    def take(self, shared: Any) -> str:
        return shared.name


class Input(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def make(monkeypatch: pytest.MonkeyPatch, limit: int) -> tuple[wholes.Wholes, list[Input]]:
    monkeypatch.setattr(wholes, "Gather", Sent)
    monkeypatch.setattr(wholes, "BUCKET_LIMIT", limit)
    found = wholes.Wholes({})
    layer = SimpleNamespace(weight=torch.zeros(1), fsdp=None)
    inputs = [
        Input(name=name, size=10, P=torch.zeros(5, 2), rows=None, first=SimpleNamespace(rank=2)) for name in "abcd"
    ]
    for shared in inputs:
        found.add(shared, layer)
    sent.clear()
    return found, inputs


def passes(found: wholes.Wholes, inputs: list[Input], names: str) -> list[list[str]]:
    """What a pass that asks for these sends for; afterwards nothing is left."""
    sent.clear()
    for name in names:
        assert found.take(next(shared for shared in inputs if shared.name == name)) == name
        assert sum(unit.here for unit in found._units.values()) <= 2
    found.forget()
    assert not any(unit.here for unit in found._units.values())
    return list(sent)


def test_without_modules_of_fsdp_they_come_in_buckets(monkeypatch):
    found, inputs = make(monkeypatch, limit=40)
    assert passes(found, inputs, "abcd") == [["a", "b"], ["c", "d"]]
    found.remove(inputs[1])  # whose P is whole again
    assert passes(found, inputs, "acd") == [["a"], ["c", "d"]]


def test_the_next_ones_are_sent_for_and_a_wrong_guess_is_not_made_again(monkeypatch):
    found, inputs = make(monkeypatch, limit=1)
    assert passes(found, inputs, "abcd") == [["a"], ["b"], ["c"], ["d"]]
    assert passes(found, inputs, "abcd") == [["a"], ["b"], ["c"], ["d"]]  # each when the one before is asked for
    assert passes(found, inputs, "a") == [["a"], ["b"]]
    assert passes(found, inputs, "a") == [["a"]]
    assert passes(found, inputs, "acd") == [["a"], ["c"], ["d"]]
    assert passes(found, inputs, "ac") == [["a"], ["c"], ["d"]]
