"""The requests that the engine holds, as the API process knows them: who listens, what was delivered, and what becomes of each
when the engine crashes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass, field

from server.types import FinishReason, GenerateRequest, PoolRequest, StepOutput, TokenEvent


class Mailbox:
    """The events of one or more requests, in order. One reader."""

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list[TokenEvent]:
        """All events that wait, at least one: a reader that falls behind gets several steps at once."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events


@dataclass(slots=True, eq=False)
class Held:
    """A request that has not finished. `mailbox` is None once nobody listens any more."""

    request: GenerateRequest | PoolRequest
    mailbox: Mailbox | None
    abort_reason: FinishReason | None = None
    has_output: bool = False  # tokens were delivered
    num_crashes: int = 0  # of engines in the middle of a step of this request
    withheld: list[TokenEvent] = field(default_factory=list)

    def deliver(self, event: TokenEvent) -> None:
        if self.mailbox is not None:
            self.mailbox.put(event)
        self.has_output = self.has_output or bool(event.token_ids)


@dataclass(frozen=True, slots=True)
class Triage:
    """What becomes of the requests of an engine that crashed."""

    retried: list[Held]  # were in its last step, for the first time: computed again, each alone in its steps
    waiting: list[Held]  # had not begun: they wait on
    failed: list[Held]  # have delivered tokens, or were retried before
    aborted: list[Held]  # nobody listens
    running: list[GenerateRequest | PoolRequest]  # all that were in the last step


class RequestTable:
    """All unfinished requests by id, in order of arrival.

    While requests are being retried (`retry`), tokens are withheld until each of them has come through its first step: what was
    not delivered can be computed once more if one of the others takes the new engine down as well.
    """

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._on_trial: set[str] = set()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    def __iter__(self) -> Iterator[Held]:
        return iter(self._held.values())

    @property
    def on_trial(self) -> Set[str]:
        """Ids of those that are retried and have not come through their first step yet."""
        return self._on_trial

    def add(self, request: GenerateRequest | PoolRequest, mailbox: Mailbox) -> None:
        assert request.request_id not in self._held, f"request id {request.request_id} is in use"
        self._held[request.request_id] = Held(request, mailbox)

    def silence(self, request_id: str, reason: FinishReason) -> bool:
        """Nobody listens any more. False where that was so before."""
        held = self._held.get(request_id)
        if held is None or held.mailbox is None:
            return False
        held.mailbox, held.abort_reason = None, reason
        return True

    def take_in(self, output: StepOutput) -> list[tuple[Held, FinishReason]]:
        """Delivers a step's events; returns the requests that have finished, and how."""
        finished = []
        was_trial = bool(self._on_trial)
        for event in output.events:
            held = self._held.get(event.request_id)
            if held is None:
                continue
            self._on_trial.discard(event.request_id)
            if event.finish_reason is None and self._on_trial:
                held.withheld.append(event)
                continue
            self._release(held)
            held.deliver(event)
            if event.finish_reason is not None:
                del self._held[event.request_id]
                finished.append((held, event.finish_reason))
        if was_trial and not self._on_trial:
            for held in self._held.values():
                self._release(held)
        return finished

    def triage(self, running_ids: Collection[str] | None) -> Triage:
        """Sorts all of them after a crash in a step of `running_ids` (None: unknown, so any). Those that failed or were aborted
        are held no longer."""
        triage = Triage([], [], [], [], [])
        for request_id, held in list(self._held.items()):
            held.withheld.clear()
            was_running = running_ids is None or request_id in running_ids
            if was_running:
                held.num_crashes += 1
                triage.running.append(held.request)
            if held.mailbox is None:
                triage.aborted.append(self._held.pop(request_id))
            elif held.has_output or (was_running and held.num_crashes > 1):
                triage.failed.append(self._held.pop(request_id))
            elif was_running or request_id in self._on_trial:
                triage.retried.append(held)
            else:
                triage.waiting.append(held)
        self._on_trial = {held.request.request_id for held in triage.retried}
        return triage

    def drop(self, condition: Callable[[Held], bool]) -> list[Held]:
        """Those of which it holds, and which no engine has, are held no longer."""
        dropped = [held for held in self._held.values() if condition(held)]
        for held in dropped:
            del self._held[held.request.request_id]
            self._on_trial.discard(held.request.request_id)
        return dropped

    def take_all(self) -> list[Held]:
        """Holds nothing any more."""
        held, self._held, self._on_trial = list(self._held.values()), {}, set()
        return held

    @staticmethod
    def _release(held: Held) -> None:
        for event in held.withheld:
            held.deliver(event)
        held.withheld.clear()
