"""When an engine counts as hung, when one that crashed is started again, and which requests may not come back.

Rules and counters only: `server.engine.client` acts on them. All times are monotonic seconds that the caller gives.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from server.types import GenerateRequest, PoolRequest

TICK = 0.25
"""Seconds between two looks at the engine while it has work."""


class RequestRefused(Exception):
    """A request that was running in several crashes. The message is fit for users."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            "this prompt with this sampling was running each time the engine crashed lately; it is refused for another "
            f"{math.ceil(seconds)} seconds"
        )


@dataclass(frozen=True, slots=True)
class SupervisorPolicy:
    """A step hangs after `step_factor` times what it was to take, and `min_step_seconds` at least. The first load gets
    `load_seconds`; a later one `load_factor` times what the first took, and `min_reload_seconds` at least.

    After `max_crashes` crashes in a row the server gives up; a request that is served ends the row, and so do
    `calm_seconds` without a crash. `delays` are waited before the restarts of a row. A fingerprint that was running in
    `max_suspicions` crashes is refused for `refusal_seconds`.
    """

    min_step_seconds: float = 4.0
    step_factor: float = 10.0
    load_seconds: float = 1800.0
    load_factor: float = 10.0
    min_reload_seconds: float = 30.0
    max_crashes: int = 5
    calm_seconds: float = 300.0
    delays: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    max_suspicions: int = 2
    refusal_seconds: float = 600.0

    def step_limit(self, predicted: float) -> float:
        return max(self.min_step_seconds, self.step_factor * predicted)

    def load_limit(self, first_load: float | None) -> float:
        """`first_load`: seconds, None while it is the first."""
        if first_load is None:
            return self.load_seconds
        return min(self.load_seconds, max(self.min_reload_seconds, self.load_factor * first_load))


@dataclass(slots=True)
class Stall:
    """How long an engine with work has shown no progress, as far as this process was awake to see it: a look that comes late,
    since this process was stopped or starved, counts for two ticks at most."""

    seconds: float = 0.0
    _seen: object = None
    _last: float = 0.0

    def look(self, progress: object, now: float) -> float:
        """`progress` is not what it was as soon as there is any."""
        if progress != self._seen:
            self._seen, self.seconds = progress, 0.0
        else:
            self.seconds += min(now - self._last, 2 * TICK)
        self._last = now
        return self.seconds

    def reset(self) -> None:
        self._seen = None


@dataclass(slots=True)
class CrashRow:
    """Crashes in a row."""

    policy: SupervisorPolicy
    num_crashes: int = 0
    _last: float = 0.0

    def add(self, now: float) -> float | None:
        """Seconds to wait before the next start; None when there is to be none."""
        if self.num_crashes and now - self._last > self.policy.calm_seconds:
            self.num_crashes = 0
        self.num_crashes += 1
        self._last = now
        if self.num_crashes >= self.policy.max_crashes:
            return None
        delays = self.policy.delays
        return delays[min(self.num_crashes, len(delays)) - 1]

    def end(self) -> None:
        self.num_crashes = 0


def fingerprint(request: GenerateRequest | PoolRequest) -> bytes:
    """SHA-256 of what decides a request's computation: its prompt's ids and how it is sampled or pooled."""
    digest = hashlib.sha256(array("q", request.prompt_token_ids).tobytes())
    how = request.pooling if isinstance(request, PoolRequest) else request.sampling
    digest.update(repr(how).encode())
    return digest.digest()


@dataclass(slots=True)
class _Suspicion:
    num_crashes: int
    until: float  # when it is forgotten


@dataclass(slots=True)
class Suspects:
    """Fingerprints that were running in crashes. One that is served in the meantime is cleared."""

    policy: SupervisorPolicy
    _known: dict[bytes, _Suspicion] = field(default_factory=dict)

    def add(self, requests: Iterable[GenerateRequest | PoolRequest], now: float) -> None:
        """Of one crash."""
        self._forget(now)
        for key in {fingerprint(request) for request in requests}:
            suspicion = self._known.setdefault(key, _Suspicion(0, 0.0))
            suspicion.num_crashes += 1
            suspicion.until = now + self.policy.refusal_seconds

    def check(self, request: GenerateRequest | PoolRequest, now: float) -> None:
        """Raises RequestRefused where it is refused for now."""
        if not self._known:
            return
        self._forget(now)
        suspicion = self._known.get(fingerprint(request))
        if suspicion is not None and suspicion.num_crashes >= self.policy.max_suspicions:
            raise RequestRefused(suspicion.until - now)

    def clear(self, request: GenerateRequest | PoolRequest) -> None:
        if self._known:
            self._known.pop(fingerprint(request), None)

    def _forget(self, now: float) -> None:
        self._known = {key: suspicion for key, suspicion in self._known.items() if suspicion.until > now}
