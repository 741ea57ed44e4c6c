"""Faults on demand: which requests they meet, and what happens to those."""

import random
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

LATE_S = 0.25


@dataclass(frozen=True)
class Fault:
    """One kind of trouble.

    It meets requests whose method and (unquoted) path match, from the `nth` such request on, `count` times (None: ever after),
    each time with `probability`. Several kinds may be set at once: a delay and then a status.
    """

    path: str = ""  # a regular expression, searched for
    method: str = ""  # a regular expression, of the whole method
    nth: int = 1
    count: int | None = 1
    probability: float = 1.0
    seed: int = 0
    after: bool = False  # delay_s, status and reset come after the request was handled: it has had its effect
    delay_s: float = 0.0
    status: int | None = None
    code: str | None = None  # X-Error-Code
    message: str = "A fault on demand"
    retry_after_s: int | None = None  # also told as RateLimit where the status is 429
    reset: bool = False  # the connection is reset instead of an answer
    truncate_at: int | None = None  # the connection ends after that many bytes of the body
    download_rate: float | None = None  # bytes per second of the answer's body
    upload_rate: float | None = None  # bytes per second of the request's body
    shared: bool = False  # the rates are those of one line that all requests share, not of each

    def __post_init__(self) -> None:
        re.compile(self.path), re.compile(self.method)
        if self.nth < 1 or (self.count is not None and self.count < 1):
            raise ValueError(f"nth and count begin at 1, got {self.nth} and {self.count}")
        rates = (self.download_rate, self.upload_rate)
        if not any([self.delay_s, self.status, self.reset, self.truncate_at is not None, *rates]):
            raise ValueError("a fault without an effect: give delay_s, status, reset, truncate_at or a rate")
        if any(rate is not None and rate <= 0 for rate in rates):
            raise ValueError(f"rates are above 0 bytes per second, got {rates}")


class Line:
    """What bytes go over one after the other, at a rate in bytes per second.

    A server that wakes too late on a busy machine makes up for it, up to LATE_S: a line would not have waited for it.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._free_at = time.monotonic()

    def take(self, nbytes: int) -> float:
        """Put bytes on the line: the seconds until they are through."""
        now = time.monotonic()
        self._free_at = max(now - LATE_S, self._free_at) + nbytes / self.rate
        return max(self._free_at - now, 0.0)


@dataclass
class Armed:
    """A fault in force, and how it has fared."""

    fault: Fault
    met: int = 0
    fired: int = 0
    dice: random.Random = field(init=False)
    _lines: dict[str, Line] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.fault.seed)

    def line(self, name: Literal["download_rate", "upload_rate"]) -> Line | None:
        """What slows one request in that direction; None where nothing does."""
        rate = getattr(self.fault, name)
        if rate is None:
            return None
        return self._lines.setdefault(name, Line(rate)) if self.fault.shared else Line(rate)

    def fires(self, method: str, path: str) -> bool:
        fault = self.fault
        if not (re.fullmatch(fault.method or ".*", method) and re.search(fault.path, path)):
            return False
        self.met += 1
        if self.met < fault.nth or self.fired == fault.count or self.dice.random() >= fault.probability:
            return False
        self.fired += 1
        return True


class Faults:
    """All faults in force; those that meet a request all happen to it."""

    def __init__(self) -> None:
        self._armed: list[Armed] = []
        self._lock = threading.Lock()

    def add(
        self,
        path: str = "",
        *,
        method: str = "",
        nth: int = 1,
        count: int | None = 1,
        probability: float = 1.0,
        seed: int = 0,
        after: bool = False,
        delay_s: float = 0.0,
        status: int | None = None,
        code: str | None = None,
        message: str = "A fault on demand",
        retry_after_s: int | None = None,
        reset: bool = False,
        truncate_at: int | None = None,
        download_rate: float | None = None,
        upload_rate: float | None = None,
        shared: bool = False,
    ) -> Armed:
        """Arm a Fault; what it has done by now can be read from the answer."""
        armed = Armed(
            Fault(
                path, method, nth, count, probability, seed, after, delay_s, status, code, message, retry_after_s, reset,
                truncate_at, download_rate, upload_rate, shared,
            )
        )  # fmt: skip
        with self._lock:
            self._armed.append(armed)
        return armed

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()

    def all(self) -> list[Armed]:
        with self._lock:
            return list(self._armed)

    def meeting(self, method: str, path: str) -> list[Armed]:
        with self._lock:
            return [armed for armed in self._armed if armed.fires(method, path)]
