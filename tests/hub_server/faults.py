"""Failures that tests switch on."""

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    match: re.Pattern[str]  # searched in "METHOD /path?query"
    left: int  # how many requests it still hits
    status: int | None = None  # answer this, or
    code: str | None = None  # with this error code
    after_bytes: int = 0  # cut the connection after so many bytes of the body, or
    holds: bool = False  # do not answer until healed
    healed: threading.Event = field(default_factory=threading.Event)


class Faults:
    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        with self._lock:
            for fault in self._faults:
                fault.healed.set()
            self._faults.clear()

    def hit(self, line: str) -> Fault | None:
        """The fault for this request, if any; counts it."""
        with self._lock:
            for fault in self._faults:
                if fault.left > 0 and fault.match.search(line):
                    fault.left -= 1
                    return fault
        return None
