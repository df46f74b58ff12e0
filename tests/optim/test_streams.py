"""P's movement on a stream of its own, with streams that a CPU can have: work waits in them until it is asked for."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_osd import OSD
from hf_osd.optim import osd
from hf_osd.optim.step import movement, streams
from hf_osd.update_rules import blockwise


SHAPES = [(40, 64), (64, 40), (40, 56), (48, 80), (2, 32, 72), (40, 72)]
MAIN, SIDE = "main", "side"


class Streams:
    """In the place of `torch.cuda`: two streams, of which the second one does its work as late as events allow.

    Attributes:
        log (`list`): What happened on which stream, in the order of the host.
    """

    def __init__(self, monkeypatch):
        self.log: list[tuple[str, str, Any]] = []
        self.late: list[Callable[[], object]] = []  # what the second stream has to do, in its order
        self.done, self.current, self.events = 0, MAIN, 0
        self.by_name = {name: Stream(self, name) for name in (MAIN, SIDE)}
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.by_name[self.current])
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.by_name[SIDE])
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(osd, "SideStreams", lambda types: streams.SideStreams({"cuda"}))
        move = movement._move_all

        def launched(waiting: list) -> None:
            if self.current == MAIN:
                move(waiting)
                return
            own = list(waiting)
            self.log.append((SIDE, "work", [moving.A for moving in own]))
            self.late.append(lambda: move(own))
            waiting.clear()  # the caller's list is nobody's business any more

        monkeypatch.setattr(movement, "_move_all", launched)
        streams.second_stream.cache_clear()

    @contextmanager
    def on(self, stream: "Stream") -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def run_until(self, place: int) -> None:
        while self.done < place:
            self.late[self.done]()
            self.done += 1


class Stream:
    def __init__(self, streams: Streams, name: str):
        self.streams, self.name = streams, name

    def record_event(self) -> tuple[str, int, int]:
        self.streams.events += 1
        event = (self.name, self.streams.events, len(self.streams.late))
        self.streams.log.append((self.name, "record", event))
        return event

    def wait_event(self, event: tuple[str, int, int]) -> None:
        self.streams.log.append((self.name, "wait", event))
        if event[0] == SIDE:
            self.streams.run_until(event[2])


@pytest.fixture
def cuda(monkeypatch) -> Iterator[Streams]:
    yield Streams(monkeypatch)
    streams.second_stream.cache_clear()


def make(**options: Any) -> tuple[list[nn.Parameter], OSD]:
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    return params, OSD([{"params": params, "rank": 12}], lr=1e-2, **options)


def run(params: list[nn.Parameter], optimizer: OSD, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


def tensors(params: list[nn.Parameter], optimizer: OSD) -> list[Tensor]:
    return [*params, *(value for p in params for value in optimizer.state[p].values())]


@pytest.mark.parametrize("limit", [0, 2 * 40 * 12, 1 << 20], ids=["one by one", "two", "together"])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_rule": "lion"}, {"subspace": "power", "carry_moments": True}, {"projection_dtype": "int8"}],
    ids=str,
)
def test_as_late_as_events_allow_is_in_its_turn(cuda: Streams, options: dict[str, Any], limit: int, monkeypatch):
    monkeypatch.setattr(movement, "STACK_LIMIT", limit)
    aside, plain = make(**options, projection_stream=True), make(**options)
    run(*aside, range(4))
    assert cuda.done == len(cuda.late)  # nothing is left when a step has returned
    assert (len(cuda.late) > 0) == (limit < 1 << 20 or "subspace" in options)  # the last ones need not go aside
    run(*plain, range(4))
    assert all(torch.equal(X, Y) for X, Y in zip(tensors(*aside), tensors(*plain), strict=True))


def test_each_waits_for_what_comes_before_it(cuda: Streams, monkeypatch):
    monkeypatch.setattr(movement, "STACK_LIMIT", 0)
    params, optimizer = make(projection_stream=True)
    run(params, optimizer, range(1))  # P starts
    cuda.log.clear()
    run(params, optimizer, range(1, 2))
    works = [place for place, (_, what, _) in enumerate(cuda.log) if what == "work"]
    assert len(works) == len(SHAPES) + 1  # two experts: each has filled its stack
    for place in works:  # its stream waits for an event that the other has recorded after A was made
        (a, record, event), (b, wait, awaited) = cuda.log[place - 2 : place]
        assert (a, record, b, wait) == (MAIN, "record", SIDE, "wait") and event is awaited
        assert cuda.log[place + 1][:2] == (SIDE, "record")
    last = [event for name, what, event in cuda.log if (name, what) == (SIDE, "record")][-1]
    assert cuda.log[-1] == (MAIN, "wait", last)
    waited = [event for name, what, event in cuda.log[:-1] if (name, what) == (MAIN, "wait")]
    assert len(waited) == len(works) - streams.AT_ONCE  # what it was given is not kept for longer


def test_what_it_was_given_lives_as_long_as_it_is_used(cuda: Streams):
    aside, A = streams.SideStreams({"cuda"}), torch.ones(3)
    alive = weakref.ref(A)
    given = [A]
    aside.run(list.clear, given, torch.device("cuda"))
    del A
    assert not given and alive() is not None  # the memory is the first stream's to use again
    aside.join()
    assert alive() is None


def test_a_step_that_fails_leaves_nothing_running(cuda: Streams, monkeypatch):
    monkeypatch.setattr(movement, "STACK_LIMIT", 0)
    params, optimizer = make(projection_stream=True)
    run(params, optimizer, range(2))
    optimizer.state[params[3]]["projection"] = torch.zeros(3, 3, dtype=torch.float64)
    params[3].grad = torch.ones(48, 80, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert cuda.done == len(cuda.late)


def test_where_it_would_do_nothing_it_is_refused():
    W = nn.Parameter(torch.randn(24, 16))
    for options, reason in [
        ({"subspace": "svd"}, "`projection_stream` has no effect: no P moves beside"),
        ({"layerwise": True}, "`projection_stream` of OSD has no effect with `layerwise`"),
    ]:
        with pytest.raises(ValueError, match=reason):
            OSD([W], rank=4, projection_stream=True, **options)
    optimizer = OSD([W], rank=4, projection_stream=True)
    W.grad = torch.randn(24, 16)
    with pytest.raises(ValueError, match="`projection_stream` is for CUDA devices, and parameters are on cpu"):
        optimizer.step()
    assert not optimizer.state


def test_moments_are_encoded_on_the_stream_that_made_them(monkeypatch):
    """Bitsandbytes' encoder runs on the default stream of CUDA, whichever is the current one."""
    handle = 0
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": handle}))
    assert not blockwise._on_another_stream(torch.device("cuda"))
    handle = 5
    assert blockwise._on_another_stream(torch.device("cuda"))
    assert not blockwise._on_another_stream(torch.device("cpu"))
