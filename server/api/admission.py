"""Which requests the engine gets: a queue with bounds, in sequences and in prompt tokens, and an honest "later" past them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable

from server.api.errors import RequestError
from server.engine.observer import EngineObserver
from server.types import EngineInfo, FinishReason, GenerateRequest, PoolRequest, StepOutput

# As vLLM's metric names them.
QUEUED_REQUESTS = "max_num_queued_reqs"
QUEUED_TOKENS = "max_num_queued_tokens"

_RATE_SECONDS = 30.0  # of the past that the next seconds are judged by
_UNKNOWN_WAIT = 5  # seconds, while nothing is known
_LONGEST_WAIT = 120


class Admission:
    """An `EngineObserver` that knows how much waits, and refuses what is too much.

    A sequence waits for its seat until a step has run it; its prompt tokens wait until its first token has come. What would take
    the queue past a bound is refused, but for one case: while nothing waits any request is let in, however many sequences or
    tokens it brings by itself, since it would be refused for ever else.
    """

    def __init__(
        self,
        max_queued_requests: int = 2**62,
        max_queued_tokens: int = 2**62,
        num_seats: int = 2**62,
        on_refused: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests = max_queued_requests
        self._max_tokens = max_queued_tokens
        self._num_seats = num_seats
        self._on_refused = on_refused
        self._clock = clock
        self._unfinished: set[str] = set()
        self._prompts: dict[str, int] = {}  # tokens of those without a first token
        self._queued_tokens = 0
        self._seats = num_seats  # what the engine last had room for
        self._progress: deque[tuple[float, int, int]] = deque()  # (when, sequences that ended, prompt tokens computed)
        self._num_ended = 0  # of `_progress`, together
        self._num_computed = 0

    @property
    def num_queued(self) -> int:
        """Sequences without a seat, as of the last step and what was sent since."""
        return max(0, len(self._unfinished) - self._seats)

    @property
    def num_queued_tokens(self) -> int:
        return self._queued_tokens

    def refuse_if_full(self) -> None:
        """Before anything is spent on a request: raises RequestError where not even the smallest would be let in."""
        self.check(1, 1)

    def check(self, num_sequences: int, num_tokens: int) -> None:
        """Raises RequestError (429) where a request of so many sequences and prompt tokens must come later."""
        queued, unfinished = self.num_queued, len(self._unfinished)
        excess = unfinished + num_sequences - self._seats - self._max_requests
        if excess > 0 and (queued or (not self._max_requests and unfinished >= self._seats)):
            message = f"{queued} sequences wait, and {self._max_requests} may"
            self._refuse(QUEUED_REQUESTS, message, self._num_ended, excess)
        excess = self._queued_tokens + num_tokens - self._max_tokens
        if excess > 0 and self._queued_tokens:
            message = f"{self._queued_tokens} prompt tokens wait, and {self._max_tokens} may"
            self._refuse(QUEUED_TOKENS, message, self._num_computed, excess)

    def _refuse(self, reason: str, message: str, worked: int, excess: int) -> None:
        self._on_refused(reason)
        raise RequestError(
            f"the server is busy: {message}; try again later",
            status=429,
            code="queue_full",
            headers={"Retry-After": str(self._seconds_until(worked, excess))},
        )

    def _seconds_until(self, worked: int, amount: int) -> int:
        """When so much will have been worked off, where the last seconds did `worked` of it."""
        if not worked:
            return _UNKNOWN_WAIT
        seconds = max(self._clock() - self._progress[0][0], 1.0)
        return max(1, min(_LONGEST_WAIT, math.ceil(amount * seconds / worked)))

    def _note_progress(self, num_ended: int, num_computed: int) -> None:
        now = self._clock()
        self._progress.append((now, num_ended, num_computed))
        self._num_ended += num_ended
        self._num_computed += num_computed
        while self._progress[0][0] < now - _RATE_SECONDS:
            _, ended, computed = self._progress.popleft()
            self._num_ended -= ended
            self._num_computed -= computed

    # -- EngineObserver ------------------------------------------------------------------------------------------------

    def on_submit(self, request: GenerateRequest | PoolRequest) -> None:
        self._unfinished.add(request.request_id)
        self._queued_tokens -= self._prompts.pop(request.request_id, 0)  # sent again
        self._prompts[request.request_id] = len(request.prompt_token_ids)
        self._queued_tokens += len(request.prompt_token_ids)

    def on_step(self, output: StepOutput) -> None:
        num_ended = num_computed = 0
        for event in output.events:
            if event.finish_reason is not None and event.request_id in self._unfinished:
                self._unfinished.discard(event.request_id)
                num_ended += 1
            if event.token_ids or event.finish_reason is not None:
                num_tokens = self._prompts.pop(event.request_id, 0)
                self._queued_tokens -= num_tokens
                num_computed += num_tokens
        # Where somebody waits, the engine has no room for more than it runs, whatever seats it has left.
        stats = output.stats
        self._seats = stats.num_running if stats.num_waiting else self._num_seats
        if num_ended or num_computed:
            self._note_progress(num_ended, num_computed)

    def on_lost(self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ERROR) -> None:
        for request_id in request_ids:
            self._unfinished.discard(request_id)
            self._queued_tokens -= self._prompts.pop(request_id, 0)
        self._seats = self._num_seats

    def on_crash(self, num_retried: int) -> None:
        """Those that are computed again stay where they are."""
        self._seats = self._num_seats

    def on_start(self, info: EngineInfo, is_restart: bool) -> None: ...

    def on_refused(self) -> None: ...


class Observers:
    """Several `EngineObserver`s as one."""

    def __init__(self, *observers: EngineObserver) -> None:
        self._observers = observers

    def on_submit(self, request: GenerateRequest | PoolRequest) -> None:
        for observer in self._observers:
            observer.on_submit(request)

    def on_step(self, output: StepOutput) -> None:
        for observer in self._observers:
            observer.on_step(output)

    def on_lost(self, request_ids: Iterable[str], reason: FinishReason) -> None:
        lost = tuple(request_ids)
        for observer in self._observers:
            observer.on_lost(lost, reason)

    def on_crash(self, num_retried: int) -> None:
        for observer in self._observers:
            observer.on_crash(num_retried)

    def on_start(self, info: EngineInfo, is_restart: bool) -> None:
        for observer in self._observers:
            observer.on_start(info, is_restart)

    def on_refused(self) -> None:
        for observer in self._observers:
            observer.on_refused()
